"""Taking smashed data nearer to what it was before its noise: post-processing, which costs no privacy.

Nor does it buy any: whoever holds the released data can do the same, so what a denoiser recovers was not hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from splitfed.privacy.clip import clip

_WEIGHTS_AT_ONCE: Final = 2**22  # 16 MiB of float32


class Denoiser(Protocol):
    """Estimates clean hidden vectors from noisy ones.

    Guarantees:
        * Keeps shape and dtype, and is differentiable with respect to its input.
        * A row of the result depends on that row of the input alone: the trunk stays causal, and no record has a part
          in what becomes of another.
    """

    def __call__(self, y_BTD: Tensor) -> Tensor:
        """Estimate clean hidden vectors, shape [B, T, D]; the first row of a sequence is its first token's."""


@dataclass(frozen=True, eq=False)
class Table:
    """The rows that a bottom without blocks can send: one for each token, and where it stands.

    Shape legend: T tokens, D hidden, V vocabulary.

    Attributes:
        rows_VD: The bottom's output for each token, before the clip and without learned positions, shape [V, D].
        log_prior_V: Logarithm of each token's probability, shape [V], up to a constant.
        positions_TD: Learned positions that the bottom adds, shape [T, D]; none: it adds none.
        clipping_norm: What each row is clipped to before its noise; none: it is not.

    Raises:
        ValueError: If the shapes do not fit.
    """

    rows_VD: Tensor
    log_prior_V: Tensor
    positions_TD: Tensor | None = None
    clipping_norm: float | None = None

    def __post_init__(self) -> None:
        shape = list(self.rows_VD.shape)
        if len(shape) != 2 or list(self.log_prior_V.shape) != shape[:1]:
            raise ValueError(f"Rows [V, D] go with a prior [V], not {shape} with {list(self.log_prior_V.shape)}.")
        if self.positions_TD is not None and list(self.positions_TD.shape[1:]) != shape[1:]:
            raise ValueError(f"Positions [T, {shape[1]}] go with these rows, not {list(self.positions_TD.shape)}.")

    def denoiser(self, *, std: float | None = None, eta: float | None = None) -> "TableDenoiser":
        """Make a denoiser for some noise: Gaussian of this standard deviation, or radial of this rate."""
        return TableDenoiser(self, std=std, eta=eta)


class TableDenoiser:
    """Expects what a row was before its noise, among the rows that it can have been: for a bottom without blocks.

    The posterior mean is exact: each row of the table is weighed by how likely its token is, and how likely the noise
    that would be left. Shape legend: B sequences, T tokens, D hidden, V vocabulary.

    Args:
        table: The rows.
        std: Standard deviation of Gaussian noise on each element; or
        eta: Rate of radial noise.

    Raises:
        ValueError: If not one of ``std`` and ``eta`` is given, above 0 and finite.

    Guarantees:
        * The result is E[x | y] for x = clip(rows[v] + positions[t]) with v drawn from the prior and y = x + noise, up
          to float32 rounding.
        * Noise that goes to 0 gives the nearest row; noise that grows without bound gives the prior's mean.
        * Beside its input, its output and the table it needs a bounded amount of memory, in the backward too.
        * As `Denoiser`.

    Source: Bishop, Pattern recognition and machine learning (2006), section 1.5.5: no other estimate has a smaller
    expected squared error.
    """

    def __init__(self, table: Table, *, std: float | None = None, eta: float | None = None) -> None:
        if (std is None) == (eta is None):
            raise ValueError("Give one of std, for Gaussian noise, and eta, for radial noise.")
        check_noise(std if eta is None else eta)
        self._std, self._eta = std, eta
        self._log_prior_V = table.log_prior_V.float()
        self._clipping_norm = table.clipping_norm
        self._positions_TD = None if table.positions_TD is None else table.positions_TD.float()
        self._rows_VD = table.rows_VD.float()
        if self._positions_TD is None:
            self._rows_VD = self._clip(self._rows_VD)

    def __call__(self, y_BTD: Tensor) -> Tensor:
        """Expect clean rows.

        Args:
            y_BTD: Noisy rows, shape [B, T, D], floating point.

        Returns:
            Their posterior means, shape [B, T, D].

        Raises:
            ValueError: If the hidden size differs, or there are more rows than positions.
        """
        check_rows(y_BTD, self._rows_VD.shape[1])
        if self._positions_TD is None:
            return self._expect(y_BTD, self._rows_VD)
        check_positions(y_BTD, len(self._positions_TD))
        expected = [
            self._expect(y_BD, self._clip(self._rows_VD + position_D))
            for y_BD, position_D in zip(y_BTD.unbind(1), self._positions_TD, strict=False)
        ]
        return torch.stack(expected, dim=1)

    def _clip(self, rows_VD: Tensor) -> Tensor:
        if self._clipping_norm is None:
            return rows_VD
        return clip(rows_VD[None], self._clipping_norm, per="token")[0]

    def _expect(self, y: Tensor, rows_VD: Tensor) -> Tensor:
        log_prior_V, eta = self._log_prior_V, self._eta
        if self._std is None:
            assert eta is not None
            return expect(y, rows_VD, lambda y_ND: log_prior_V - eta * torch.cdist(y_ND, rows_VD))
        signal = self._std**-2
        offset_V = log_prior_V - signal / 2 * rows_VD.pow(2).sum(dim=1)
        return expect(y, rows_VD, lambda y_ND: torch.addmm(offset_V, y_ND, rows_VD.T, alpha=signal))


def expect(y: Tensor, rows_VD: Tensor, log_weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Average rows by their posterior probabilities, a few inputs at a time.

    Args:
        y: Noisy rows, shape [..., D].
        rows_VD: What is averaged, shape [V, D], float32.
        log_weigh: From inputs, shape [N, D] in float32, to logarithms of probabilities up to a constant, shape [N, V].

    Returns:
        Expected rows, shape [..., D], of the input's dtype.
    """

    def expect_piece(y_ND: Tensor) -> Tensor:
        return torch.softmax(log_weigh(y_ND), dim=-1) @ rows_VD

    pieces = y.reshape(-1, y.shape[-1]).float().split(max(_WEIGHTS_AT_ONCE // len(rows_VD), 1))
    if torch.is_grad_enabled() and y.requires_grad:  # the weights are computed again in the backward, not kept
        expected = [checkpoint(expect_piece, y_ND, use_reentrant=False, preserve_rng_state=False) for y_ND in pieces]
    else:
        expected = [expect_piece(y_ND) for y_ND in pieces]
    return torch.cat(expected).view(y.shape).to(y.dtype)


def check_rows(y_BTD: Tensor, hidden_size: int) -> None:
    """Refuse what is not a batch of hidden vectors of one size.

    Raises:
        ValueError: If it is not.
    """
    if y_BTD.dim() != 3 or not y_BTD.is_floating_point() or y_BTD.shape[2] != hidden_size:
        raise ValueError(
            f"This denoiser takes hidden vectors [B, T, {hidden_size}], not {y_BTD.dtype} of shape {list(y_BTD.shape)}."
        )


def check_positions(y_BTD: Tensor, positions: int) -> None:
    """Refuse more rows than there are learned positions for.

    Raises:
        ValueError: If there are more.
    """
    if y_BTD.shape[1] > positions:
        raise ValueError(f"This denoiser was made for {positions} rows a sequence, not {y_BTD.shape[1]}.")


def check_noise(noise: float | None) -> None:
    """Refuse noise that is none.

    Raises:
        ValueError: If it is not above 0 and finite.
    """
    if noise is None or not 0 < noise < math.inf:
        raise ValueError(f"The noise to take away must be above 0 and finite, not {noise}; use no denoiser without it.")
