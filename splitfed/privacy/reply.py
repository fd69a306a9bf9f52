"""What a server answers is made harmless before it meets the device's own text."""

from typing import Final

import torch
from torch import Tensor

LARGEST_REPLY: Final = 1e9
"""Largest L2 norm of a sequence's reply. What is genuine is some orders of magnitude below; the square of anything up
to this is far from float32's largest number."""


def bounded_reply(reply_BTD: Tensor) -> Tensor:
    """Scale a trunk output or a smashed gradient down where it is larger than any genuine one.

    A number near the end of the range overflows on its way through the device for some texts and not for others: where
    a row carries loss, or what its tokens are. The device refuses what is not finite, and its refusal would tell.
    Scaling looks at what the server sent and at nothing else, so it costs no privacy.

    Shape legend: B sequences, T tokens, D hidden.

    Args:
        reply_BTD: What the server answered, shape [B, T, D], floating point.

    Returns:
        The reply, shape [B, T, D], in the dtype of the input.

    Guarantees:
        * A sequence of norm up to 1e9 is given back to the bit; a larger one keeps its direction and has norm 1e9,
          up to rounding.
        * A sequence that holds an infinity holds a NaN afterwards, whatever the text: there is nothing to scale it to.
    """
    norms_B11 = torch.linalg.vector_norm(reply_BTD, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return reply_BTD * (LARGEST_REPLY / norms_B11.clamp(min=LARGEST_REPLY)).to(reply_BTD.dtype)
