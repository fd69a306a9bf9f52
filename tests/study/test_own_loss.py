"""How well an adapter does on one participant's text."""

import pytest
import torch

from splitfed.models import adapter_state
from splitfed.study.own_loss import own_loss
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import collate
from tests.training.split_client import T, example, examples, tiny_parts


def test_it_is_the_mean_over_tokens_with_the_given_adapter() -> None:
    parts, texts = tiny_parts(seed=1), examples(T, T - 3, 4)
    adapter = {name: tensor for part in parts for name, tensor in adapter_state(part).items()}
    batch = collate(texts, pad_token_id=0)
    with torch.no_grad():
        logits_BTV = parts.top(parts.trunk(parts.bottom(batch.input_ids_BT))).logits
    tokens = sum(len(text.input_ids) - 1 for text in texts)
    expected = causal_lm_loss(logits_BTV, batch.labels_BT, float(tokens)).item()
    other = tiny_parts(seed=2)  # the same base, another adapter
    assert own_loss(other, adapter, texts) == pytest.approx(expected, rel=1e-5)


def test_many_examples_in_several_batches_weigh_alike() -> None:
    parts, texts = tiny_parts(), examples(*[T] * 20)
    adapter = {name: tensor for part in parts for name, tensor in adapter_state(part).items()}
    each = [own_loss(parts, adapter, [text]) for text in texts]
    assert own_loss(parts, adapter, texts) == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_nothing_to_measure_on_is_refused() -> None:
    parts = tiny_parts()
    adapter = {name: tensor for part in parts for name, tensor in adapter_state(part).items()}
    with pytest.raises(ValueError, match="No token of the examples carries loss"):
        own_loss(parts, adapter, [example("r", 4, prompt=4)])
