"""Optimisers on the server, which take the change from a round's base to its mean for a gradient."""

from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor

Optimiser = Literal["fedavgm", "fedadam", "fedyogi"]
LEARNING_RATES: Final[dict[Optimiser, float]] = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}


class ServerOptimiser:
    """FedAvgM, FedAdam or FedYogi.

    With Δ = mean - base, elementwise, and m from 0, v from τ²:

        ========= ===================== ==================================== =====================
        optimiser m                     v                                    step
        ========= ===================== ==================================== =====================
        fedavgm   β₁ m + Δ                                                   η m
        fedadam   β₁ m + (1 - β₁) Δ     β₂ v + (1 - β₂) Δ²                   η m / (√v + τ)
        fedyogi   β₁ m + (1 - β₁) Δ     v - (1 - β₂) Δ² sign(v - Δ²)         η m / (√v + τ)
        ========= ===================== ==================================== =====================

    A tensor that nobody trained in a round keeps its value and its moments. Moments are float64.

    Args:
        optimiser: Which one.
        learning_rate: η; None = 1 for FedAvgM, with which momentum = 0 gives the mean itself, and 0.01 for the others.
        momentum: β₁, in [0, 1).
        beta2: β₂, in [0, 1).
        tau: τ, above 0.

    Source: Reddi et al. 2021, Adaptive federated optimization, Algorithm 2 (FedAdam, FedYogi; v starts at τ², the least
    that it allows); Hsu, Qi & Brown 2019, Measuring the effects of non-identical data distribution for federated visual
    classification (FedAvgM).
    """

    def __init__(
        self,
        optimiser: Optimiser,
        *,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        self._optimiser: Optimiser = optimiser
        self._learning_rate = LEARNING_RATES[optimiser] if learning_rate is None else learning_rate
        self._momentum = momentum
        self._beta2 = beta2
        self._tau = tau
        self._moments: dict[str, Tensor] = {}

    def step(self, base: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Step from the base towards the mean.

        Args:
            base: What the round started from, by name.
            mean: What its updates come to, for some of the names, in the same shapes.

        Returns:
            The tensors of ``mean`` after the step, float32.
        """
        stepped = {}
        for name, tensor in mean.items():
            start = base[name].double()
            stepped[name] = (start + self._learning_rate * self._direction(name, tensor.double() - start)).float()
        return stepped

    def state(self) -> dict[str, Tensor]:
        """Give the moments: ``first/<name>`` and ``second/<name>``, float64."""
        return dict(self._moments)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            ValueError: If a name is not a moment's.
        """
        kinds = ("first/",) if self._optimiser == "fedavgm" else ("first/", "second/")
        for name in state:
            if not name.startswith(kinds):
                raise ValueError(f"{name!r} is no moment of {self._optimiser}; load the state of the same optimiser.")
        self._moments = dict(state)

    def _direction(self, name: str, change: Tensor) -> Tensor:
        first = self._moments.get(f"first/{name}", torch.zeros_like(change))
        share = 1.0 if self._optimiser == "fedavgm" else 1 - self._momentum
        first = self._moments[f"first/{name}"] = self._momentum * first + share * change
        if self._optimiser == "fedavgm":
            return first
        square = change.square()
        second = self._moments.get(f"second/{name}", torch.full_like(change, self._tau**2))
        if self._optimiser == "fedadam":
            second = self._beta2 * second + (1 - self._beta2) * square
        else:
            second = second - (1 - self._beta2) * square * torch.sign(second - square)
        self._moments[f"second/{name}"] = second
        return first / (second.sqrt() + self._tau)
