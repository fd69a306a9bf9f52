"""A denoiser for smashed data that attention has mixed: what a token's row usually is, and how it varies about that."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.denoise import check_noise, check_positions, check_rows, expect

_SWEEPS: Final = 4  # between means and offsets, each fitted to what the other leaves
_RIDGE: Final = 1e-3  # of the mean square of a feature: a direction that no token has shown stays near zero


@dataclass(frozen=True, eq=False)
class Mixture:
    """What is known of clean smashed data: for each token a Gaussian with its own mean, and the covariance of all.

    Shape legend: T tokens, D hidden, V vocabulary.

    Attributes:
        means_VD: Mean of each token's rows, shape [V, D].
        log_prior_V: Logarithm of each token's probability, shape [V], up to a constant.
        covariance_DD: Covariance of rows about their token's mean, shape [D, D].
        offsets_TD: What a row's place adds to its mean, shape [T, D]; none: nothing, positions are not learned.
    """

    means_VD: Tensor
    log_prior_V: Tensor
    covariance_DD: Tensor
    offsets_TD: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """Give the tensors by name."""
        tensors = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "Mixture":
        """Take the tensors back.

        Raises:
            ValueError: If a tensor is missing, or there is one too many.
        """
        names = {part.name for part in fields(cls)}
        if not names - {"offsets_TD"} <= state.keys() <= names:
            raise ValueError(f"A mixture is made of {sorted(names)}, not of {sorted(state)}.")
        return cls(**state)

    def denoiser(self, *, std: float) -> "MixtureDenoiser":
        """Make a denoiser for Gaussian noise of this standard deviation."""
        return MixtureDenoiser(self, std=std)


class MixtureDenoiser:
    """Expects what a row was before its noise, for a bottom with blocks.

    A token's rows lie about a mean of its own. The posterior mean under the mixture of Gaussians is the expected mean
    plus a Wiener filter of the rest; with one token in the vocabulary it is the Wiener filter itself.

    Shape legend: B sequences, T tokens, D hidden, V vocabulary.

    Args:
        mixture: What is known of clean smashed data.
        std: Standard deviation of the Gaussian noise on each element.

    Raises:
        ValueError: If the standard deviation is not above 0 and finite.

    Guarantees:
        * The result is E[x | y] for x of the mixture and y = x + noise, up to float32 rounding.
        * Noise that goes to 0 gives the input back, where the covariance has full rank.
        * Beside its input, its output and the mixture it needs a bounded amount of memory, in the backward too.
        * As `Denoiser`.

    Source: Bishop, Pattern recognition and machine learning (2006), sections 2.3.3 and 9.2, for a Gaussian's posterior
    and a mixture's weights.
    """

    def __init__(self, mixture: Mixture, *, std: float) -> None:
        check_noise(std)
        covariance_DD = mixture.covariance_DD.double()
        total_DD = covariance_DD + std**2 * torch.eye(len(covariance_DD)).to(covariance_DD)
        precision_DD = torch.cholesky_inverse(torch.linalg.cholesky(total_DD))
        self._means_VD = mixture.means_VD.float()
        self._precision_DD = precision_DD.float()
        self._filter_DD = (precision_DD @ covariance_DD).float()
        self._offsets_TD = None if mixture.offsets_TD is None else mixture.offsets_TD.float()
        distance_V = ((self._means_VD @ self._precision_DD) * self._means_VD).sum(dim=1)
        self._log_weight_V = mixture.log_prior_V.float() - distance_V / 2

    def __call__(self, y_BTD: Tensor) -> Tensor:
        """Expect clean rows.

        Args:
            y_BTD: Noisy rows, shape [B, T, D], floating point.

        Returns:
            Their posterior means, shape [B, T, D].

        Raises:
            ValueError: If the hidden size differs, or there are more rows than offsets.
        """
        check_rows(y_BTD, self._means_VD.shape[1])
        offsets: Tensor | float = 0.0
        if self._offsets_TD is not None:
            check_positions(y_BTD, len(self._offsets_TD))
            offsets = self._offsets_TD[: y_BTD.shape[1]]
        rest_BTD = y_BTD.float() - offsets
        mean_BTD = expect(rest_BTD, self._means_VD, self._log_weigh)
        return (mean_BTD + (rest_BTD - mean_BTD) @ self._filter_DD + offsets).to(y_BTD.dtype)

    def _log_weigh(self, y_ND: Tensor) -> Tensor:
        return torch.addmm(self._log_weight_V, y_ND @ self._precision_DD, self._means_VD.T)


def fit_mixture(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    embeddings_VE: Tensor,
    *,
    log_prior_V: Tensor,
    has_positions: bool = False,
    pseudo_counts: float = 2.0,
) -> Mixture:
    """Fit a mixture to clean smashed data of known tokens, a batch at a time.

    A token's mean is drawn towards an affine function of its embedding, as if that had been seen ``pseudo_counts``
    times; so a token that is rare in the data, or missing, has a mean as well. The covariance is that of each row about
    the mean that the other rows give, so that few rows of a token do not look like little variation.

    Args:
        batches: Called twice, for the means and for the covariance. Gives tokens, shape [B, T], and the smashed data as
            it is clipped before its noise, shape [B, T, D]. Public: the result tells of it.
        embeddings_VE: Each token's embedding, shape [V, E].
        log_prior_V: Logarithm of each token's probability, shape [V], up to a constant.
        has_positions: The model has learned positions, so a row's place shifts it.
        pseudo_counts: Weight of the affine function, above 0.

    Returns:
        The mixture, in float32.

    Raises:
        ValueError: If shapes do not fit, there is no batch, or ``pseudo_counts`` is not above 0.
    """
    if log_prior_V.shape != embeddings_VE.shape[:1]:
        raise ValueError(f"Embeddings {list(embeddings_VE.shape)} do not fit a prior {list(log_prior_V.shape)}.")
    if not pseudo_counts > 0:
        raise ValueError(f"pseudo_counts must be above 0, not {pseudo_counts}.")
    embeddings_VE = embeddings_VE.float()
    counts_VT, sums_VD, sums_TD = _add_up(batches(), len(embeddings_VE), has_positions=has_positions)
    counts_V1 = counts_VT.sum(dim=1, keepdim=True)
    means_VD, offsets_TD = torch.zeros_like(sums_VD), torch.zeros_like(sums_TD)
    for _ in range(_SWEEPS if has_positions else 1):
        rest_VD = sums_VD - counts_VT @ offsets_TD
        means_VD = rest_VD + pseudo_counts * _affine(embeddings_VE, counts_V1, rest_VD)
        means_VD /= counts_V1 + pseudo_counts
        if has_positions:
            offsets_TD = (sums_TD - counts_VT.T @ means_VD) / counts_VT.sum(dim=0)[:, None]
    without_itself_V1 = (counts_V1 + pseudo_counts) / (counts_V1 - 1 + pseudo_counts)
    scatter_DD = means_VD.new_zeros(means_VD.shape[1], means_VD.shape[1])
    for input_ids_BT, x_BTD in batches():
        rest_BTD = (x_BTD.float() - offsets_TD - means_VD[input_ids_BT]) * without_itself_V1[input_ids_BT]
        rest_ND = rest_BTD.flatten(0, 1)
        scatter_DD.addmm_(rest_ND.T, rest_ND)
    covariance_DD = scatter_DD / counts_V1.sum()
    return Mixture(means_VD, log_prior_V.float(), covariance_DD, offsets_TD if has_positions else None)


def _add_up(
    batches: Iterable[tuple[Tensor, Tensor]], vocabulary: int, *, has_positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Count rows by token and place, and add them up by token and by place: shapes [V, T], [V, D] and [T, D].

    Without positions all places are one.
    """
    totals: tuple[Tensor, Tensor, Tensor] | None = None
    for input_ids_BT, x_BTD in batches:
        if x_BTD.shape[:2] != input_ids_BT.shape:
            raise ValueError(f"Rows {list(x_BTD.shape)} do not fit tokens {list(input_ids_BT.shape)}.")
        rows_BTD = x_BTD.float() if has_positions else x_BTD.float().flatten(0, 1)[:, None]
        ids_BT = input_ids_BT if has_positions else input_ids_BT.flatten()[:, None]
        _, T, D = rows_BTD.shape
        if totals is None:
            totals = rows_BTD.new_zeros(vocabulary, T), rows_BTD.new_zeros(vocabulary, D), rows_BTD.new_zeros(T, D)
        counts_VT, sums_VD, sums_TD = totals
        cells_BT = ids_BT * T + torch.arange(T, device=ids_BT.device)
        counts_VT += torch.bincount(cells_BT.flatten(), minlength=counts_VT.numel()).view_as(counts_VT)
        sums_VD.index_add_(0, ids_BT.flatten(), rows_BTD.flatten(0, 1))
        sums_TD += rows_BTD.sum(dim=0)
    if totals is None:
        raise ValueError("A mixture needs data to be fitted to; give a batch or more.")
    return totals


def _affine(embeddings_VE: Tensor, counts_V1: Tensor, sums_VD: Tensor) -> Tensor:
    """Fit rows by an affine function of their token's embedding, by least squares; give its value for each token."""
    features_VF = torch.cat([embeddings_VE, torch.ones_like(counts_V1)], dim=1)
    gram_FF = ((features_VF * counts_V1).T @ features_VF).double()
    ridge = _RIDGE * gram_FF.diagonal().mean() * torch.eye(len(gram_FF)).to(gram_FF)
    weights_FD = torch.linalg.solve(gram_FF + ridge, (features_VF.T @ sums_VD).double())
    return features_VF @ weights_FD.float()
