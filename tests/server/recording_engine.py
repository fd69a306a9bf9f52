"""An engine without a model: notes what it is asked, answers with numbers that say what that was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import ProtocolError
from splitfed.privacy.denoise import Denoiser
from splitfed.training.trunk_step import Applied


@dataclass
class RecordingEngine:
    """Every forward doubles, every backward negates, every step counts.

    Attributes:
        calls: What was asked, in order.
        steps: Local steps applied, by slot.
        states: What each slot was opened with: client, round, adapter and optimiser.
        wants: Whether the last forward of a slot wants its smashed gradient.
        refuses: Refuse the next call.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    states: dict[str, tuple[str, int, dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    wants: dict[str, bool] = field(default_factory=dict)
    refuses: bool = False

    async def open_round(
        self, slot: str, client: str, round: int, adapter: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]
    ) -> None:
        self._note("open_round", client, round)
        self.states[slot] = (client, round, dict(adapter), dict(optimiser))
        self.steps[slot] = 0

    async def denoise_with(self, denoiser: Denoiser) -> None:
        self._note("denoise_with", denoiser)

    async def forward(
        self,
        slot: str,
        step: int,
        micro_batch: int,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None,
        position_ids_BT: Tensor | None,
        trains: bool,
        wants_smashed_gradient: bool,
    ) -> Tensor:
        self._note("forward", step, micro_batch, trains)
        self.wants[slot] = wants_smashed_gradient
        return smashed_BTD * 2

    async def backward(self, slot: str, step: int, micro_batch: int, output_gradient_BTD: Tensor) -> Tensor | None:
        self._note("backward", step, micro_batch)
        return -output_gradient_BTD if self.wants[slot] else None

    async def apply(self, slot: str, step: int, *, squared_norm: float | None = None) -> Applied:
        self._note("apply", step)
        self.steps[slot] = self.steps.get(slot, 0) + 1
        return Applied(self.steps[slot], 4.0 + (squared_norm or 0.0))

    async def snapshot(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _, round, adapter, _ = self.states[slot]
        return {name: tensor + 1 for name, tensor in adapter.items()}, {"moment": torch.tensor([float(round)])}

    async def steps_done(self, slot: str) -> int:
        return self.steps.get(slot, 0)

    async def empty(self, slot: str) -> None:
        self.states.pop(slot, None)

    def close(self) -> None:
        pass

    def _note(self, *call: Any) -> None:
        if self.refuses:
            self.refuses = False
            raise ProtocolError("The engine refuses.")
        self.calls.append(call)
