import math
from typing import Any

import pytest
import torch

from splitfed.errors import NonFiniteLoss
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example
from splitfed.training.generation_loss import sequence_loss
from tests.training.test_decoding import Heard, Split, split

T = 16
IDS = [5, 17, 3, 60, 22, 9, 31]
EXAMPLE = Example(IDS, [-100, -100, *IDS[2:]], "a record")


def loss_of(parts: Split, link: Heard, example: Example = EXAMPLE, **options: Any) -> float:
    return sequence_loss(link, parts.parts.bottom, parts.parts.top, example, max_tokens=T, **options).own


def of_the_whole(parts: Split, example: Example = EXAMPLE) -> float:
    logits_BTV = parts.whole(torch.tensor([example.input_ids])).logits
    return causal_lm_loss(logits_BTV, torch.tensor([example.labels]), 1.0).item()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
@pytest.mark.parametrize("cut", [(0, 0), (1, 2)])
def test_the_loss_is_that_of_the_unsplit_model(family: str, cut: tuple[int, int]) -> None:
    found = split(family, *cut)
    assert loss_of(found, found.link()) == pytest.approx(of_the_whole(found), rel=1e-5)


def test_the_last_tokens_row_does_not_leave() -> None:
    found = split()
    link = found.link()
    loss_of(found, link)
    assert [shape[1] for shape in link.shapes] == [len(IDS) - 1]


@pytest.mark.parametrize("length", [2, len(IDS), T])
def test_with_a_release_all_rows_but_one_of_the_declared_length_leave_in_one_piece(length: int) -> None:
    found = split()
    ids = [n % 50 + 1 for n in range(length)]
    link, example = found.link(), Example(ids, ids, "a record")
    loss = loss_of(found, link, example, release=lambda rows_1TD: rows_1TD)
    assert [shape[1] for shape in link.shapes] == [T - 1]
    assert loss == pytest.approx(of_the_whole(found, example), rel=1e-5)


def test_a_loss_that_is_not_finite_is_told_of() -> None:
    found = split()
    with pytest.raises(NonFiniteLoss, match="loss is not finite"):
        loss_of(found, found.link(change=lambda output_1TD: output_1TD * math.nan))


def test_what_is_not_finite_leaves_through_a_release_alone() -> None:
    found, link = split(), split().link()
    found.parts.bottom.register_forward_hook(lambda module, given, output: output * math.nan)
    with pytest.raises(NonFiniteLoss, match="not finite, so it was not sent"):
        loss_of(found, link)
    assert link.shapes == []
    loss_of(found, link, release=torch.nan_to_num)
    assert [shape[1] for shape in link.shapes] == [T - 1]
