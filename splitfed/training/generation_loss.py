"""The loss of a sequence over the link that text is generated with: its rows go forward only, and labels stay here.

Shapes: T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from splitfed.errors import NonFiniteLoss
from splitfed.models import Bottom, Top
from splitfed.privacy import bounded_reply
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example, collate
from splitfed.training.evaluation import HeldOutLoss, under_both
from splitfed.training.generation import GenerationLink


@torch.no_grad()
def sequence_loss(
    link: GenerationLink,
    bottom: Bottom,
    top: Top,
    example: Example,
    *,
    max_tokens: int,
    release: Callable[[Tensor], Tensor] | None = None,
    filler: int = 0,
    other_top: Mapping[str, Tensor] | None = None,
) -> HeldOutLoss:
    """Measure the loss of one sequence over a link.

    Args:
        link: The sequence's link.
        bottom: The bottom, with the adapter of the round that the link is of.
        top: The top, likewise.
        example: The sequence, of 2 to ``max_tokens`` tokens.
        max_tokens: The length that was declared, T.
        release: Gives the form in which rows leave, noise and all; None = they leave as they are.
        filler: Token id that stands after the sequence's end where rows still leave.
        other_top: Another adapter for the top, by whole-model name, which is tried on the same trunk output; the top
            ends with its own.

    Returns:
        Sums over tokens, in nats.

    Raises:
        NonFiniteLoss: If the model's numbers are not finite.
        LinkError: If the sequence is lost.

    Guarantees:
        * It is the loss of the unsplit model, up to float32 rounding.
        * The last token's row does not leave: nothing is predicted from it.
        * With ``release`` exactly T − 1 rows leave, in one piece, whatever the sequence's length.
    """
    bottom.eval()
    top.eval()
    batch = collate([example], pad_token_id=filler, length=None if release is None else max_tokens)
    smashed_1TD = bottom(batch.input_ids_BT[:, :-1])
    if release is None and not torch.isfinite(smashed_1TD).all():
        raise NonFiniteLoss("The bottom's output is not finite, so it was not sent; train the adapter again.")
    answer = link.forward(smashed_1TD if release is None else release(smashed_1TD))
    found = under_both(top, other_top, bounded_reply(answer.result()), batch.labels_BT, _loss_of_all_but_the_last)
    if not all(math.isfinite(loss) for loss in (found.own, found.merged or 0.0)):
        raise NonFiniteLoss("The model's loss is not finite, so it says nothing; train the adapter again.")
    return found


def _loss_of_all_but_the_last(logits_BSV: Tensor, labels_BT: Tensor, normaliser: float) -> Tensor:
    """Give the loss where the last token of T has no logits: S = T - 1."""
    return causal_lm_loss(pad(logits_BSV.float(), (0, 0, 0, 1)), labels_BT, normaliser)
