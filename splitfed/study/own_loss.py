"""How well an adapter does on one participant's text."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from splitfed.models import Partition, load_adapter_state
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import Example, collate

_AT_ONCE: Final = 16


@torch.no_grad()
def own_loss(
    parts: Partition, adapter: Mapping[str, Tensor], examples: Sequence[Example], *, pad_token_id: int = 0
) -> float:
    """Measure the mean loss per token, in nats.

    Args:
        parts: The segments, with an adapter of the same rank; they have the given one afterwards.
        adapter: The whole model's adapter, by whole-model name.
        examples: What to measure on.
        pad_token_id: Token that fills rows up.

    Raises:
        ValueError: If no token carries loss.
    """
    for segment in parts:
        load_adapter_state(segment, adapter)
        segment.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(examples), _AT_ONCE):
        batch = collate(examples[start : start + _AT_ONCE], pad_token_id=pad_token_id)
        logits_BTV = parts.top(parts.trunk(parts.bottom(batch.input_ids_BT))).logits
        total += causal_lm_loss(logits_BTV, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    if not tokens:
        raise ValueError("No token of the examples carries loss; give some with 2 tokens or more.")
    return total / tokens
