"""Metric privacy on hidden vectors: the closer two of them are, the harder it is to tell which one was sent."""

import math
from typing import Final, Literal

import torch
from torch import Tensor

from splitfed.errors import PrivacyError
from splitfed.privacy.noise import MAX_RATE, MIN_RATE, NoiseStream

TOKEN: Final = "token"
"""Who is protected: one token's row. Sound for smashed data only where a row depends on its own token alone."""
METRIC: Final = "metric"
"""Against what change: one row becomes another, and the guarantee weakens with the distance between the two."""


class MetricMechanism:
    """Adds noise of the density ∝ exp(-eta · ‖z‖₂) to every row; nothing is clipped.

    The guarantee is eta · d_χ-privacy with the Euclidean distance for d_χ. It is no (epsilon, delta), and there is none
    that it could be converted into: eta has the unit 1 ÷ distance, and rows can be any distance apart. The unit is the
    token, so the bottom must have no block: an attention block lets a token change every later row.

    Shape legend: B sequences, T tokens, D hidden.

    Args:
        eta: Loss of privacy for each unit of distance, in 1e-25 to 1e25; the noise's mean norm is D / eta.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If eta is outside its range.

    Guarantees:
        * For two rows x and x′ and any set S of outputs: P(release(x) in S) ≤ exp(eta · ‖x - x′‖₂) ·
          P(release(x′) in S), up to float32 rounding.
        * The losses of the rows of a sequence add up: two sequences differ by at most eta · Σ ‖x_t - x′_t‖₂.
        * Every row gets noise of its own, rows of padding and of zeros included.
        * Gradients pass through; the noise has none.

        ==================== ==================================
        norm of a row        release
        ==================== ==================================
        zero                 noise alone
        any finite           the row + noise
        infinite, NaN        refused, nothing is drawn
        ==================== ==================================

    Source: Chatzikokolakis, Andrés, Bordenabe & Palamidessi, Broadening the scope of differential privacy using metrics
    (2013), for d_χ-privacy; Feyisetan, Balle, Drake & Diethe, Privacy- and utility-preserving textual analysis via
    calibrated multivariate perturbations (2020), for the mechanism on embeddings.
    """

    unit: Final = TOKEN
    relation: Final = METRIC
    noise_multiplier: Literal[0] = 0
    """In the Gaussian sense: no sensitivity is bounded, so no multiple of one is added."""

    def __init__(self, eta: float, stream: NoiseStream | None = None) -> None:
        if not MIN_RATE <= eta <= MAX_RATE:
            raise ValueError(f"The eta of metric privacy must be from {MIN_RATE} to {MAX_RATE}, not {eta}.")
        self.eta = eta
        self._stream = NoiseStream() if stream is None else stream

    @property
    def statement(self) -> str:
        """What is guaranteed, in a sentence."""
        return (
            f"{self.eta:g} · distance for each token: two rows that are a distance d apart give any output with "
            f"probabilities within a factor of exp({self.eta:g} · d) of each other; this is no epsilon."
        )

    def loss(self, distance: float) -> float:
        """Bound the privacy loss between two rows.

        Args:
            distance: Their Euclidean distance, or for two sequences the sum over their rows; 0 or more.

        Returns:
            eta · distance, in nats: a logarithm of a ratio of probabilities.

        Raises:
            ValueError: If the distance is negative or NaN.
        """
        if not distance >= 0:
            raise ValueError(f"A distance is 0 or more, not {distance}.")
        return self.eta * distance

    def rdp(self, order: float) -> float:
        """Bound the Rényi divergence between any two inputs: there is no bound."""
        return math.inf

    def units(self, tokens: int) -> float:
        """Give T: what a sequence of T rows loses is the sum over its tokens."""
        return float(tokens)

    def release(self, x_BTD: Tensor) -> Tensor:
        """Add noise.

        Args:
            x_BTD: Smashed data of a bottom without blocks, shape [B, T, D], floating point.

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
        if not torch.isfinite(x_BTD).all():
            raise PrivacyError(
                "A hidden vector of this token holds a NaN or an infinite value; it was not sent. "
                "Lower the learning rate, or load the adapter of an earlier round."
            )
        return x_BTD + self._stream.radial(x_BTD.shape, self.eta).to(x_BTD.device)
