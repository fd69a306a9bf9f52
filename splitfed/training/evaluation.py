"""Loss of a split model on held-out examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfed.models import Segment, adapter_state, load_adapter_state
from splitfed.privacy import bounded_reply
from splitfed.training.client_step import (
    Loss,
    causal_lm_loss,
    count_label_tokens,
    refusing_what_is_not_finite,
)
from splitfed.training.data import Example, collate
from splitfed.training.link import Kind, Link, Place
from splitfed.training.releases import Releases


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out examples, in nats: the mean per token, or a sum over tokens where that is said.

    Attributes:
        own: With the adapters that the client has.
        merged: With another adapter in the top, where one was tried.
    """

    own: float
    merged: float | None = None


@torch.no_grad()
def evaluate(
    link: Link,
    bottom: Segment,
    top: Segment,
    releases: Releases,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_tokens: int,
    pad_token_id: int,
    round: int,
    loss: Loss = causal_lm_loss,
    other_top: Mapping[str, Tensor] | None = None,
) -> HeldOutLoss:
    """Measure the mean loss per token, in nats, over a link. Smashed data leaves, and is charged like training.

    Args:
        link: The client's link in this round.
        bottom: The bottom.
        top: The top.
        releases: The gate that smashed data passes.
        examples: Held-out examples, at least one.
        batch_size: Sequences that cross at once.
        max_tokens: The run's length, to which rows are padded with noise on.
        pad_token_id: Token that fills the rows up.
        round: The round, from 1.
        loss: The loss of logits and labels.
        other_top: Another adapter for the top, by whole-model name, which is tried on the same trunk outputs; the top
            ends with its own.

    Returns:
        Means over all tokens that carry loss; 0 if none does.

    Raises:
        NonFiniteLoss: If the smashed data is NaN or infinite; it has not been sent then.
        LinkError: If the round is lost.
        BudgetExhausted: If a release would cross the agent's budget.
    """
    bottom.eval()
    top.eval()
    length = max_tokens if releases.is_noisy else None
    total, other_total, tokens = 0.0, 0.0, 0
    for index, start in enumerate(range(0, len(examples), batch_size)):
        batch = collate(examples[start : start + batch_size], pad_token_id=pad_token_id, length=length)
        place = Place(0, index, Kind.EVALUATE)
        smashed_BTD = releases.smashed(bottom(batch.input_ids_BT), records=batch.records, round=round, place=place)
        with refusing_what_is_not_finite("smashed data", round, place):
            output = link.forward(place, smashed_BTD)
        with link.traffic.waiting():
            answer_BTD = output.result()
        found = under_both(top, other_top, bounded_reply(answer_BTD), batch.labels_BT, loss)
        total += found.own
        other_total += found.merged or 0.0
        tokens += count_label_tokens(batch.labels_BT)
    counted = max(tokens, 1)
    return HeldOutLoss(total / counted, None if other_top is None else other_total / counted)


def under_both(
    top: Segment, other_top: Mapping[str, Tensor] | None, output_BTD: Tensor, labels_BT: Tensor, loss: Loss
) -> HeldOutLoss:
    """Measure trunk outputs under a top with its own adapter, and with another one if there is one.

    Args:
        top: The top; it ends with its own adapter.
        other_top: Another adapter for it, by whole-model name.
        output_BTD: Trunk outputs.
        labels_BT: What is to be predicted.
        loss: The loss of logits and labels.

    Returns:
        Sums over tokens.
    """
    own = loss(top(output_BTD).logits, labels_BT, 1.0).item()
    if other_top is None:
        return HeldOutLoss(own)
    own_top = adapter_state(top)
    load_adapter_state(top, other_top)
    try:
        return HeldOutLoss(own, loss(top(output_BTD).logits, labels_BT, 1.0).item())
    finally:
        load_adapter_state(top, own_top)
