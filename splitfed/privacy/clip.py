"""Scaling vectors down so that none is longer than a stated norm: what makes a sensitivity finite."""

from typing import Final, Literal

import torch
from torch import Tensor

from splitfed.errors import PrivacyError

Per = Literal["token", "sequence"]
"""What one clip covers: each token's hidden vector, or a sequence's vectors together."""

_SLACK: Final = 1 - 2.0**-22  # room for rounding: the scale, and the product of each element, err by 2⁻²⁴ at most
_LEAST_FLOAT32_SCALE: Final = 2.0**-60  # beyond it float32 would underflow here, or overflow on the way back
_REDUCED: Final[dict[str, tuple[int, ...]]] = {"token": (-1,), "sequence": (-2, -1)}


def clip(x_BTD: Tensor, clipping_norm: float, *, per: Per) -> Tensor:
    """Scale hidden vectors down to a norm, leaving the shorter ones as they are.

    Differentiable; the gradient of a vector that is not scaled passes through. Shape legend: B sequences, T tokens, D
    hidden.

    Args:
        x_BTD: Hidden vectors, shape [B, T, D], floating point.
        clipping_norm: The largest L2 norm, C, in 1e-20 to 1e20.
        per: What one norm is taken over.

    Returns:
        The clipped vectors, shape [B, T, D], float32 (float64 for a float64 input).

    Raises:
        PrivacyError: If a norm is NaN or infinite: there is nothing to scale such a vector to.

    Guarantees:
        * The L2 norm of every result is at most C, with nothing added for rounding: vectors are scaled to
          C · (1 − 2⁻²²) by norms taken in float64.
        * A vector of norm up to C · (1 − 2⁻²²), zero included, is given back to the bit, in every dtype.
        * The gradient is finite wherever the input is, at norm zero too.

        ============== =============================================
        norm           result
        ============== =============================================
        zero           zero
        up to C        the input, or 2⁻²² shorter in the last 2⁻²²
        above C        same direction, norm C · (1 − 2⁻²²)
        infinite, NaN  refused
        ============== =============================================
    """
    target = clipping_norm * _SLACK
    norm = torch.linalg.vector_norm(x_BTD, dim=_REDUCED[per], keepdim=True, dtype=torch.float64)
    if not torch.isfinite(norm).all():
        raise PrivacyError(
            f"A hidden vector of this {per} holds a NaN or an infinite value; it was not sent. "
            "Lower the learning rate, or load the adapter of an earlier round."
        )
    scale: Tensor = target / norm.clamp(min=target)
    result_dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    if scale.min() < _LEAST_FLOAT32_SCALE:
        return (x_BTD.double() * scale).to(result_dtype)
    return x_BTD * scale.to(result_dtype)
