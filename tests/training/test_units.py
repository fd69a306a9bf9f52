"""Which rows one token touches: what decides whether a token can be the unit of privacy."""

import pytest
import torch
from torch import Tensor

from splitfed.models import Top
from splitfed.training.client_step import causal_lm_loss
from tests.equivalence.tiny_models import VOCABULARY
from tests.training.split_client import D, T, tiny_parts

FAMILIES = ["llama", "gpt2"]
POSITION = 5


def two_texts() -> tuple[Tensor, Tensor]:
    """Two sequences that differ in one token."""
    first_1T = torch.randint(VOCABULARY, (1, T), generator=torch.Generator().manual_seed(0))
    second_1T = first_1T.clone()
    second_1T[0, POSITION] = (first_1T[0, POSITION] + 1) % VOCABULARY
    return first_1T, second_1T


def changed_rows(first_1TD: Tensor, second_1TD: Tensor) -> list[int]:
    return [row for row in range(T) if not torch.equal(first_1TD[0, row], second_1TD[0, row])]


def gradient(top: Top, labels_1T: Tensor) -> Tensor:
    """Give the output gradient for one and the same trunk output, of a loss with a fixed divisor."""
    trunk_output_1TD = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    causal_lm_loss(top(trunk_output_1TD).logits, labels_1T, float(T)).backward()
    assert trunk_output_1TD.grad is not None
    return trunk_output_1TD.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bottom_without_blocks_shows_a_token_in_its_own_row_alone(family: str) -> None:
    bottom = tiny_parts(family, bottom_blocks=0).bottom
    with torch.no_grad():
        assert changed_rows(*(bottom(ids_1T) for ids_1T in two_texts())) == [POSITION]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_in_the_bottom_shows_it_in_every_later_row(family: str) -> None:
    bottom = tiny_parts(family, bottom_blocks=1).bottom
    with torch.no_grad():
        assert changed_rows(*(bottom(ids_1T) for ids_1T in two_texts())) == list(range(POSITION, T))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_top_without_blocks_shows_a_label_in_the_row_before_it_alone(family: str) -> None:
    top = tiny_parts(family, top_blocks=0).top
    rows = changed_rows(*(gradient(top, labels_1T) for labels_1T in two_texts()))
    assert rows == [POSITION - 1]  # with its own row, which its trunk output depends on: two


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_in_the_top_shows_a_label_in_every_earlier_row(family: str) -> None:
    top = tiny_parts(family, top_blocks=1).top
    rows = changed_rows(*(gradient(top, labels_1T) for labels_1T in two_texts()))
    assert rows == list(range(POSITION))
