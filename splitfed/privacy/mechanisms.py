"""What stands between a hidden vector and the wire: one object that owns clip, noise and sensitivity together."""

import math
from typing import Final, Literal, Protocol

from torch import Tensor

from splitfed.privacy.clip import Per, clip
from splitfed.privacy.noise import NoiseStream

MIN_CLIPPING_NORM: Final = 1e-20
MAX_CLIPPING_NORM: Final = 1e20

UNIT: Final = "sequence"
"""Who is protected: with an attention block in the bottom, one token changes every later row of its sequence."""
RELATION: Final = "replace-one"
"""Against what change: one sequence becomes any other of the same padded length."""


class Mechanism(Protocol):
    """Turns hidden vectors into what may leave.

    Guarantees:
        * ``release`` keeps the shape, and is differentiable with respect to its input.
    """

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise ÷ sensitivity; 0 = nothing is guaranteed."""

    def release(self, x_BTD: Tensor) -> Tensor:
        """Give the form of hidden vectors that may leave, shape [B, T, D]."""


class GaussianSequenceMechanism:
    """Clips hidden vectors and adds Gaussian noise to every row, so that no sequence can be told from another.

    The unit of privacy is the sequence, the neighbouring relation replace-one. Each of the B sequences of a call is a
    release of its own.

    Shape legend: B sequences, T tokens, D hidden.

    Args:
        clipping_norm: Largest L2 norm of a unit of the clip, C, in 1e-20 to 1e20.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0.
        per: What is clipped to C: each token's vector, or the sequence's vectors together.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If the clipping norm or the noise multiplier is outside its range.

    Guarantees:
        * Two sequences of T rows, clipped, are at most ``sensitivity(T)`` apart: 2·C·√T per token, 2·C per sequence.
        * The noise has standard deviation ``noise_multiplier * sensitivity(T)``, is drawn in float32, and is added to
          every element, rows of padding and of zeros included.
        * For one sequence, a release is the Gaussian mechanism with noise multiplier z: (α, α / (2·z²))-RDP for every
          α > 1, under replace-one, and under add/remove of a sequence of zeros all the more.
        * Gradients flow through the clip; the noise has none.

        ==================== ==================================
        norm of the input    release
        ==================== ==================================
        zero                 noise alone
        up to C              the input + noise
        above C              the input scaled to C + noise
        infinite, NaN        refused, nothing is drawn
        ==================== ==================================

    Source: Mironov, Rényi differential privacy (2017), Corollary 3, for the RDP of the Gaussian mechanism.
    """

    unit: Final = UNIT
    relation: Final = RELATION

    def __init__(
        self, clipping_norm: float, noise_multiplier: float, per: Per = "token", stream: NoiseStream | None = None
    ) -> None:
        if not MIN_CLIPPING_NORM <= clipping_norm <= MAX_CLIPPING_NORM:
            raise ValueError(
                f"The clipping norm must be from {MIN_CLIPPING_NORM} to {MAX_CLIPPING_NORM}, not {clipping_norm}."
            )
        if not 0 < noise_multiplier < math.inf:
            raise ValueError(
                f"The noise multiplier must be above 0 and finite, not {noise_multiplier}; "
                "use NoMechanism to send without noise."
            )
        if per not in ("token", "sequence"):
            raise ValueError(f"A clip is per 'token' or per 'sequence', not per {per!r}.")
        self.clipping_norm = clipping_norm
        self.noise_multiplier = noise_multiplier
        self.per: Per = per
        self._stream = NoiseStream() if stream is None else stream

    def sensitivity(self, tokens: int) -> float:
        """Bound how far apart two clipped sequences can be, under replace-one.

        Args:
            tokens: Rows that are sent for a sequence, T, padding included.

        Returns:
            An L2 norm: 2·C·√T for a clip per token, 2·C for a clip per sequence.

        Raises:
            ValueError: If there is no row.
        """
        if tokens < 1:
            raise ValueError(f"A sequence has at least one row, not {tokens}.")
        return 2 * self.clipping_norm * (math.sqrt(tokens) if self.per == "token" else 1.0)

    def release(self, x_BTD: Tensor) -> Tensor:
        """Clip and add noise.

        Args:
            x_BTD: Smashed data or output gradient, shape [B, T, D], floating point; T is the same for every record.

        Returns:
            What may leave, shape [B, T, D], float32 (float64 for a float64 input); on the input's device.

        Raises:
            PrivacyError: If the input holds a NaN or an infinity.
            ValueError: If the input is not a floating-point tensor of three dimensions with at least one element.
        """
        if x_BTD.dim() != 3 or not x_BTD.is_floating_point() or x_BTD.numel() == 0:
            raise ValueError(
                f"A release takes hidden vectors [B, T, D], not {x_BTD.dtype} of shape {tuple(x_BTD.shape)}."
            )
        clipped_BTD = clip(x_BTD, self.clipping_norm, per=self.per)
        std = self.noise_multiplier * self.sensitivity(x_BTD.shape[1])
        return clipped_BTD.add_(self._stream.gaussian(x_BTD.shape, std).to(x_BTD.device))


class NoMechanism:
    """Lets hidden vectors leave as they are. Nothing is guaranteed."""

    noise_multiplier: Literal[0] = 0

    def release(self, x_BTD: Tensor) -> Tensor:
        """Return the input."""
        return x_BTD
