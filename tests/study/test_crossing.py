"""What crosses the cut, and what a codec makes of it."""

import pytest
import torch

from splitfed.compress import CODECS, get_codec
from splitfed.models import partition
from splitfed.study.crossing import coded, crossing_tensors, distance
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import collate
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import B, D, T, examples, tiny_parts


def test_the_four_tensors_are_those_of_the_whole_model() -> None:
    model, batch = tiny_model("llama"), collate(examples(*[T] * B), pad_token_id=0)
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    crossing = crossing_tensors(parts, batch)
    assert list(crossing) == ["smashed", "trunk_output", "output_gradient", "smashed_gradient"]
    assert all(tensor.shape == (B, T, D) for tensor in crossing.values())
    hidden = model(batch.input_ids_BT, output_hidden_states=True).hidden_states
    torch.testing.assert_close(crossing["smashed"], hidden[1])
    embedded_BTD = hidden[1].detach().requires_grad_()
    logits_BTV = parts.top(parts.trunk(embedded_BTD)).logits
    causal_lm_loss(logits_BTV, batch.labels_BT, float(B * T)).backward()
    torch.testing.assert_close(crossing["smashed_gradient"], embedded_BTD.grad)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_the_payload_and_errors_those_of_the_codec(codec: str) -> None:
    rows_BTD = crossing_tensors(tiny_parts(), collate(examples(*[T] * B), pad_token_id=0))["smashed"]
    found = coded(rows_BTD, codec)
    assert found.payload_bytes == len(get_codec(codec).encode(rows_BTD))
    assert found.bytes_per_element == found.payload_bytes / rows_BTD.numel()
    assert (found.relative_error == 0) == (codec == "none")
    assert found.relative_error < 0.02


def test_a_codec_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no codec 'zip'"):
        coded(torch.ones(1, 2, 64), "zip")


def test_a_distance_is_relative_to_what_was_sent() -> None:
    assert distance(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(4 / 5)
