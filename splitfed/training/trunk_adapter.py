"""A trunk adapter that is trained: its parameters, its optimiser, and versions that a backward can rely on."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from splitfed.config import TrainingSection
from splitfed.errors import ProtocolError
from splitfed.training.optimiser import StepOptimiser

_LARGEST_SQUARED_NORM: Final = torch.finfo(torch.float32).max
"""Beyond it AdamW's second moment overflows, and what it belongs to would never move again."""


class TrunkAdapter:
    """One copy of the trunk adapter, for one client or for several.

    A forward computes with tensors of its own version, which an optimiser step leaves alone: a backward that comes
    after the step of another client is still that of its own forward.

    Args:
        state: What the round starts from, by whole-model name.
        optimiser: The optimiser's state after the last round; empty for none.
        training: Optimiser settings.
        device: Where the trunk is.
        trained: Which of the names are trained; none: all.

    Attributes:
        version: Steps that were applied since the round's start.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        training: TrainingSection,
        *,
        device: torch.device,
        trained: frozenset[str] | None = None,
    ) -> None:
        self.version = 0
        self._parameters = {
            name: nn.Parameter(tensor.detach().clone().to(device), requires_grad=trained is None or name in trained)
            for name, tensor in state.items()
        }
        self._optimiser = StepOptimiser(self._parameters, training=training)
        self._optimiser.load(optimiser)
        self._optimiser.hold_to(self._parameters)
        self._version_tensors: dict[str, Tensor] | None = None

    def current(self) -> dict[str, Tensor]:
        """Give this version's tensors, which gradients can be taken of and which no step changes."""
        if self._version_tensors is None:
            self._version_tensors = {
                name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
                for name, parameter in self._parameters.items()
            }
        return self._version_tensors

    def apply(
        self, gradients: Mapping[str, Tensor], step_in_run: int, *, rate: float = 1.0, others: float | None = None
    ) -> float:
        """Apply gradients at the schedule's rate.

        Args:
            gradients: By whole-model name; those of no use to the loss may be missing.
            step_in_run: Local steps before this one in all rounds, from 0.
            rate: The learning rate is multiplied by this.
            others: Squared norm of the other segments' gradients of this step, where one norm is taken over all.

        Returns:
            The squared norm of the gradients, with ``others``.

        Raises:
            ProtocolError: If the gradients hold a NaN or an infinity, or are so large that the optimiser's moments
                would; the adapter is as it was then.
        """
        for name, parameter in self._parameters.items():
            parameter.grad = gradients.get(name)
        self._optimiser.pull_to_start()
        own_squared_norm = self._optimiser.squared_norm()
        if not own_squared_norm <= _LARGEST_SQUARED_NORM:
            self._optimiser.clear_gradients()
            raise ProtocolError(
                f"The trunk's gradients have the squared norm {own_squared_norm}, and were not applied; lower the "
                "learning rate."
            )
        squared_norm = own_squared_norm + (others or 0.0)
        self._optimiser.step(step_in_run, rate=rate, squared_norm=squared_norm)
        self.version += 1
        self._version_tensors = None
        return squared_norm

    def result(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy the adapter and the optimiser's state, both to the CPU."""
        adapter = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        return adapter, {name: tensor.cpu() for name, tensor in self._optimiser.state().items()}
