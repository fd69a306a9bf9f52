"""Noise for a sequence that leaves row after row, each row made of what came back for those before it."""

import math
from typing import Final

import torch
from torch import Tensor

from splitfed.errors import PrivacyError
from splitfed.privacy.clip import clip
from splitfed.privacy.mechanisms import RELATION, Unit, check_clipping_norm, check_noise_multiplier
from splitfed.privacy.noise import NoiseStream


class RowByRowMechanism:
    """Noise under which no sequence can be told from another, where its rows leave some at a time.

    One object is one release of one sequence. Its length is declared beforehand, and the noise is that of so many rows
    from the first one on. The unit of privacy is the sequence, the neighbouring relation replace-one.

    Shape legend: B sequences, T tokens, D hidden.

    Args:
        clipping_norm: Largest L2 norm of each token's vector, C, in 1e-20 to 1e20.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0.
        tokens: Most rows of the sequence, T, 1 or more.
        stream: Where the noise comes from; left out = a stream of its own.

    Attributes:
        was_finite: Every vector so far was finite.

    Raises:
        ValueError: If an argument is outside its range.

    Guarantees:
        * Each row is clipped to C by itself, and gets noise of standard deviation z·2·C·√T on every element, whatever
          the number of rows that come at once.
        * No more than T rows leave.
        * All rows together are a Gaussian mechanism with noise multiplier z, for whatever is answered to earlier rows
          and however later ones depend on it: given what has left, a row of the one sequence is at most 2·C from that
          of the other, and the squared signals of T such rows add up to 1/z².
        * A row that is not finite leaves as noise alone, so that nothing stops for a reason in the text.

    Source: Dong, Roth & Su, Gaussian differential privacy (2022), section 3: Gaussian mechanisms compose by the sum of
    their squared signals, later ones chosen by the results of earlier ones.
    """

    unit: Final[Unit] = "sequence"
    relation: Final = RELATION

    def __init__(
        self, clipping_norm: float, noise_multiplier: float, *, tokens: int, stream: NoiseStream | None = None
    ) -> None:
        check_clipping_norm(clipping_norm)
        check_noise_multiplier(noise_multiplier)
        if tokens < 1:
            raise ValueError(f"A sequence has at least one row, not {tokens}.")
        self.clipping_norm = clipping_norm
        self.noise_multiplier = noise_multiplier
        self.tokens = tokens
        self.was_finite = True
        self._left = tokens
        self._stream = NoiseStream() if stream is None else stream

    @property
    def sensitivity(self) -> float:
        """How far apart the clipped rows of two sequences of T rows can be: 2·C·√T."""
        return 2 * self.clipping_norm * math.sqrt(self.tokens)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each element of each row."""
        return self.noise_multiplier * self.sensitivity

    def release(self, rows_1TD: Tensor) -> Tensor:
        """Clip the next rows and add noise.

        Args:
            rows_1TD: Smashed data, shape [1, T, D], floating point; T may differ from call to call.

        Returns:
            What may leave, shape [1, T, D], float32 (float64 for a float64 input); on the input's device.

        Raises:
            PrivacyError: If more rows would leave than were declared.
            ValueError: If the input is not one sequence of hidden vectors.
        """
        if rows_1TD.dim() != 3 or len(rows_1TD) != 1 or not rows_1TD.is_floating_point() or rows_1TD.numel() == 0:
            raise ValueError(f"A release takes hidden vectors [1, T, D], not {rows_1TD.dtype} {tuple(rows_1TD.shape)}.")
        if rows_1TD.shape[1] > self._left:
            raise PrivacyError(
                f"The noise is that of a sequence of {self.tokens} rows, and one more would leave; declare more."
            )
        self._left -= rows_1TD.shape[1]
        is_finite_1T1 = torch.isfinite(rows_1TD).all(dim=-1, keepdim=True)
        self.was_finite = self.was_finite and bool(is_finite_1T1.all())
        clipped_1TD = clip(rows_1TD.where(is_finite_1T1, 0), self.clipping_norm, per="token")
        return clipped_1TD.add_(self._stream.gaussian(rows_1TD.shape, self.noise_std).to(rows_1TD.device))
