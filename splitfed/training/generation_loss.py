"""The loss of a sequence over the link that text is generated with: its rows go forward only, and labels stay here.

Shapes: T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from splitfed.errors import NonFiniteLoss
from splitfed.models import Bottom, Top
from splitfed.privacy import bounded_reply
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example, collate
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
) -> float:
    """Measure the loss of one sequence over a link.

    Args:
        link: The sequence's link.
        bottom: The bottom, with the adapter of the round that the link is of.
        top: The top, likewise.
        example: The sequence, of 2 to ``max_tokens`` tokens.
        max_tokens: The length that was declared, T.
        release: Gives the form in which rows leave, noise and all; None = they leave as they are.
        filler: Token id that stands after the sequence's end where rows still leave.

    Returns:
        The sum over tokens, in nats.

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
    logits_1TV = top(bounded_reply(answer.result())).logits.float()
    loss = causal_lm_loss(pad(logits_1TV, (0, 0, 0, 1)), batch.labels_BT, 1.0).item()
    if not math.isfinite(loss):
        raise NonFiniteLoss("The model's loss is not finite, so it says nothing; train the adapter again.")
    return loss
