"""Aggregation factor by factor: the mean or a robust rule, over the factors that the round trains.

With both factors trained, the mean of the factors is not the mean of the updates: for two clients of equal weight

    mean(B) mean(A) = mean(B A) - ¼ (B₁ - B₂)(A₁ - A₂),

so what is lost grows with how far the clients moved apart in both factors. Where one factor is the same for all, the
second term is zero: see ``freezing``. Where that is too little to train, ``flexlora`` and ``flora`` average products.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from splitfed.config.aggregation import LoraRule
from splitfed.federation.aggregate.aggregator import Aggregate, Aggregator, Update
from splitfed.federation.aggregate.fixed_point import FixedPointMean
from splitfed.federation.aggregate.freezing import BOTH, trained_factors
from splitfed.federation.aggregate.server_optimiser import ServerOptimiser

State = Mapping[str, Tensor]
RobustRule = Callable[[Mapping[str, State], State], tuple[dict[str, Tensor], list[str]]]
"""From updates by client, in the order of names, and the round's base, to what they come to and who is in it."""


class FactorAggregator(Aggregator):
    """Averages the adapter's tensors one by one.

    Args:
        lora: Which factors are trained.
        robust: What is taken in place of the weighted mean; None = the mean, which keeps 16 bytes an element of the
            adapter. A robust rule keeps every update of the round: 4 bytes an element and client.
        optimiser: How the server steps towards the mean; None = it takes the mean.
        norm_bound: As in ``Aggregator``.
        refuse_norm: As in ``Aggregator``.

    Guarantees:
        * The mean is the one of ``FixedPointMean``. Clients that agree leave the adapter as they have it, to the bit;
          with the mean, elements below 2⁻²¹ to its resolution.
        * A factor that is frozen in the round keeps its value to the bit: an update that changed it is refused.
    """

    def __init__(
        self,
        lora: LoraRule = "factors",
        robust: RobustRule | None = None,
        optimiser: ServerOptimiser | None = None,
        *,
        norm_bound: float | None = None,
        refuse_norm: float | None = None,
    ) -> None:
        super().__init__(norm_bound=norm_bound, refuse_norm=refuse_norm)
        self._lora: LoraRule = lora
        self._robust = robust
        self._optimiser = optimiser
        self._mean = FixedPointMean()
        self._kept: dict[str, State] = {}

    def state(self) -> dict[str, Tensor]:
        """Give the server optimiser's moments, as they are after the last result."""
        return super().state() if self._optimiser is None else self._optimiser.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            ValueError: If it is not of this rule.
        """
        if self._optimiser is None:
            super().load(state)
        else:
            self._optimiser.load(state)

    def _open(self) -> None:
        self._mean, self._kept = FixedPointMean(), {}
        frozen = tuple(f".lora_{factor}.weight" for factor in BOTH - trained_factors(self._lora, self._round))
        self._frozen = {key for key in self._base if key.endswith(frozen)}

    def _take(self, client: str, update: Update) -> None:
        for key in sorted(self._frozen & update.state.keys()):
            if not torch.equal(update.state[key], self._base[key]):
                raise ValueError(
                    f'{key!r} changed, and it is frozen in round {self._round} (lora = "{self._lora}"); train the '
                    "other factor only."
                )
        trained = {key: tensor for key, tensor in update.state.items() if key not in self._frozen}
        if self._robust is None or not trained:
            self._mean.add(trained, update.weight)
        else:
            self._kept[client] = {key: tensor.clone() for key, tensor in trained.items()}

    def _close(self) -> Aggregate:
        if self._robust is None:
            mean, clients = self._mean.result(), sorted(self._clients)
        else:
            mean, clients = self._robust(dict(sorted(self._kept.items())), self._base)
        if self._optimiser is not None:
            mean = self._optimiser.step(self._base, mean)
        squares = (float((mean[key].double() - self._base[key].double()).square().sum()) for key in sorted(mean))
        return Aggregate({**self._base, **mean}, clients, {"step_norm": math.sqrt(sum(squares))})
