"""FLoRA: the clients' factors are stacked, which loses nothing, and go into a second adapter that is never trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from splitfed.federation.aggregate.low_rank import A, B, layers, truncated
from splitfed.federation.aggregate.products import ProductAggregator


class Flora(ProductAggregator):
    """Adds the weighted mean of the clients' products to the residual, and lets the trained factors start afresh.

    In a round a model is base weights + residual + trained factors, the residual frozen and the same for all. The
    round's adapter has the A that it began with and B = 0, so with the run's initial adapter as the first round's base
    every round starts from it. The residual is kept at one rank: its best approximation is taken, and what that leaves
    out is lost (``truncated_norm`` in the notes, its Frobenius norm over all layers, without the adapter's scale).

    Args:
        rank: Rank of the residual, 1 or more.
        norm_bound: As in ``Aggregator``.
        refuse_norm: As in ``Aggregator``.

    Guarantees:
        * Residual + product of the factors after a round is the best of the residual's rank for the residual before it
          + the weighted mean of the products, and that sum itself where its rank is no larger; up to rounding.
        * A layer that nobody trained keeps its factors and its residual.

    Source: Wang et al. 2024, FLoRA: Federated fine-tuning large language models with heterogeneous low-rank
    adaptations. There the sum goes into the base weights and the initial A is drawn anew each round.
    """

    def __init__(self, rank: int, *, norm_bound: float | None = None, refuse_norm: float | None = None) -> None:
        super().__init__(norm_bound=norm_bound, refuse_norm=refuse_norm)
        if rank < 1:
            raise ValueError(f"A residual of rank {rank} holds nothing; choose 1 or more.")
        self._rank = rank
        self._residual: dict[str, Tensor] = {}

    def residual(self) -> dict[str, Tensor]:
        """Give the frozen adapter after the last result: A [F, I] and B [O, F] by the trained adapter's keys, float32.

        It is empty before the first round, which is to be read as zero; the scale is the trained adapter's.
        """
        return dict(self._residual)

    def state(self) -> dict[str, Tensor]:
        """Give the residual."""
        return self.residual()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            ValueError: If it is no adapter of the residual's rank.
        """
        for layer in layers(state):
            if len(state[layer + A]) != self._rank:
                raise ValueError(
                    f"The residual of {layer!r} has rank {len(state[layer + A])}, not flora_rank = {self._rank}."
                )
        self._residual = dict(state)

    def _open(self) -> None:
        super()._open()
        for layer in self._layers:
            a_RI, b_OR = self._base[layer + A], self._base[layer + B]
            self._residual.setdefault(layer + A, torch.zeros(self._rank, a_RI.shape[1]))
            self._residual.setdefault(layer + B, torch.zeros(b_OR.shape[0], self._rank))

    def _combine(self, layer: str, left_OK: Tensor, right_KI: Tensor) -> tuple[Tensor, Tensor, float]:
        a_FI, b_OF = self._residual[layer + A], self._residual[layer + B]
        left_OK = torch.cat([b_OF.double(), left_OK], dim=1)
        right_KI = torch.cat([a_FI.double(), right_KI])
        b_OF, a_FI, left_out = truncated(left_OK, right_KI, self._rank, spare_A=torch.zeros_like(a_FI))
        self._residual[layer + A], self._residual[layer + B] = a_FI, b_OF
        return self._base[layer + A], torch.zeros_like(self._base[layer + B]), left_out


def merged(adapter: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write an adapter and its residual as one adapter, exactly.

    Args:
        adapter: The trained factors, A [R, I] and B [O, R], by whole-model key.
        residual: The frozen ones, A [F, I] and B [O, F]; layers that it does not have stay as they are.

    Returns:
        A [R + F, I] and B [O, R + F], for the same scale.

    Raises:
        ValueError: If one of the two does not consist of pairs of factors.
    """
    result = dict(adapter)
    layers(adapter)
    for layer in layers(residual):
        result[layer + A] = torch.cat([adapter[layer + A], residual[layer + A]])
        result[layer + B] = torch.cat([adapter[layer + B], residual[layer + B]], dim=1)
    return result
