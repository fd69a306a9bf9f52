"""What stands between a hidden vector and the wire: one object that owns clip, noise, sensitivity and its RDP curve."""

import math
from typing import Final, Literal, Protocol

from torch import Tensor

from splitfed.privacy.accounting import REPLACE_ONE, ZERO_OUT
from splitfed.privacy.clip import Per, clip
from splitfed.privacy.noise import NoiseStream

MIN_CLIPPING_NORM: Final = 1e-20
MAX_CLIPPING_NORM: Final = 1e20

Unit = Literal["sequence", "token", "client"]
"""Who is protected; whatever protects a client protects each of its sequences, and each of their tokens."""

UNIT: Final = "sequence"
"""The unit in which channels are added up. A token's row alone is no unit once an attention block has seen it."""
RELATION: Final = REPLACE_ONE
"""Against what change: one unit becomes any other in its place; a sequence keeps its padded length."""
RELATIONS: Final = (REPLACE_ONE, ZERO_OUT)
"""The other: a unit's clipped contribution becomes zero, its rows noise alone, which is half as far a change."""


class Mechanism(Protocol):
    """Turns hidden vectors into what may leave.

    Guarantees:
        * ``release`` keeps the shape, and is differentiable with respect to its input.
    """

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of Gaussian noise ÷ sensitivity; 0 = no epsilon is guaranteed."""

    @property
    def unit(self) -> Unit:
        """Who is protected."""

    def release(self, x_BTD: Tensor) -> Tensor:
        """Give the form of hidden vectors that may leave, shape [B, T, D]."""

    def units(self, tokens: int) -> float:
        """Give the squared signal of a sequence of T rows ÷ that of one unit: channels add up by sequences."""


class GaussianMechanism:
    """Clips hidden vectors and adds Gaussian noise to every row: what the two units have in common.

    Each of the B sequences of a call is a release of its own. Shape legend: B sequences, T tokens, D hidden.

    Args:
        clipping_norm: Largest L2 norm of what is clipped, C, in 1e-20 to 1e20.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0.
        per: What is clipped to C: each token's vector, or the sequence's vectors together.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If the clipping norm or the noise multiplier is outside its range.
    """

    unit: Unit
    relation: Final = RELATION

    def __init__(
        self, clipping_norm: float, noise_multiplier: float, per: Per = "token", stream: NoiseStream | None = None
    ) -> None:
        check_clipping_norm(clipping_norm)
        check_noise_multiplier(noise_multiplier)
        if per not in ("token", "sequence"):
            raise ValueError(f"A clip is per 'token' or per 'sequence', not per {per!r}.")
        self.clipping_norm = clipping_norm
        self.noise_multiplier = noise_multiplier
        self.per: Per = per
        self._stream = NoiseStream() if stream is None else stream

    def sensitivity(self, tokens: int) -> float:
        """Bound how far apart the clipped rows of two neighbours can be.

        Args:
            tokens: Rows that are sent for a sequence, T, padding included.

        Returns:
            An L2 norm.

        Raises:
            ValueError: If there is no row.
        """
        raise NotImplementedError

    def rdp(self, order: float) -> float:
        """Bound the Rényi divergence of one release between neighbours.

        Args:
            order: α, above 1.

        Returns:
            α / (2·z²).
        """
        return order / (2 * self.noise_multiplier**2)

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
        return clipped_BTD.add_(self._stream.gaussian(x_BTD.shape, self.noise_std(x_BTD.shape[1])).to(x_BTD.device))

    def noise_std(self, tokens: int) -> float:
        """Give the standard deviation of the noise on each element of a sequence of T rows."""
        return self.noise_multiplier * self.sensitivity(tokens)


class GaussianSequenceMechanism(GaussianMechanism):
    """Noise under which no sequence can be told from another.

    The unit of privacy is the sequence, the neighbouring relation replace-one.

    Guarantees:
        * Two sequences of T rows, clipped, are at most ``sensitivity(T)`` apart: 2·C·√T per token, 2·C per sequence.
        * The noise has standard deviation ``noise_multiplier * sensitivity(T)``, is drawn in float32, and is added to
          every element, rows of padding and of zeros included.
        * For one sequence, a release is the Gaussian mechanism with noise multiplier z: (α, α / (2·z²))-RDP for every
          α > 1, under replace-one, and four times less if the sequence becomes zeros instead of another.
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

    unit: Unit = "sequence"

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

    def units(self, tokens: int) -> float:
        """Give 1: the unit is the sequence."""
        return 1.0


class GaussianTokenMechanism(GaussianMechanism):
    """Noise under which no token of a sequence can be told from another; a sequence gets T times less.

    Sound only where a token touches a stated number of rows: one row of smashed data with ``bottom_blocks = 0``; two
    rows of the output gradient, its own and that of the token before, whose label it is, with ``top_blocks = 0`` and a
    loss that is a sum over a fixed divisor. It cannot see the split point: whoever makes it has to.

    Args:
        clipping_norm: Largest L2 norm of a row, C, in 1e-20 to 1e20.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0.
        rows: Rows that one token touches.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If an argument is outside its range.

    Guarantees:
        * Two sequences that differ in one token are, clipped, at most ``sensitivity(T)`` = 2·C·√rows apart.
        * For one token, a release is the Gaussian mechanism with noise multiplier z, under replace-one.
        * For a sequence of T rows it is the one with z·√(rows / T).
        * Otherwise as ``GaussianSequenceMechanism``, edge cases included.
    """

    unit: Unit = "token"

    def __init__(
        self, clipping_norm: float, noise_multiplier: float, *, rows: int = 1, stream: NoiseStream | None = None
    ) -> None:
        super().__init__(clipping_norm, noise_multiplier, "token", stream)
        if rows not in (1, 2):
            raise ValueError(f"A token touches 1 row of smashed data or 2 of the output gradient, not {rows}.")
        self.rows = rows

    def sensitivity(self, tokens: int) -> float:
        """Bound how far apart two clipped sequences can be that differ in one token: 2·C·√rows.

        Args:
            tokens: Rows that are sent for a sequence, T, padding included.

        Raises:
            ValueError: If there is no row.
        """
        if tokens < 1:
            raise ValueError(f"A sequence has at least one row, not {tokens}.")
        return 2 * self.clipping_norm * math.sqrt(min(self.rows, tokens))

    def units(self, tokens: int) -> float:
        """Give T / rows."""
        return max(tokens / self.rows, 1.0)


class NoMechanism:
    """Lets hidden vectors leave as they are. Nothing is guaranteed."""

    noise_multiplier: float = 0.0
    unit: Unit = "sequence"

    def release(self, x_BTD: Tensor) -> Tensor:
        """Return the input."""
        return x_BTD

    def units(self, tokens: int) -> float:
        """Give 1."""
        return 1.0


def check_clipping_norm(clipping_norm: float) -> None:
    """Refuse a clipping norm that float32 cannot scale to.

    Raises:
        ValueError: If it is outside 1e-20 to 1e20.
    """
    if not MIN_CLIPPING_NORM <= clipping_norm <= MAX_CLIPPING_NORM:
        raise ValueError(
            f"The clipping norm must be from {MIN_CLIPPING_NORM} to {MAX_CLIPPING_NORM}, not {clipping_norm}."
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Refuse a noise multiplier that is no noise.

    Raises:
        ValueError: If it is not above 0 and finite.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(
            f"The noise multiplier must be above 0 and finite, not {noise_multiplier}; "
            "use NoMechanism to send without noise."
        )
