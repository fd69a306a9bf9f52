"""An engine without a model: notes what it is asked, answers with numbers that say what that was."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from splitfed.errors import ProtocolError
from splitfed.privacy.denoise import Denoiser
from splitfed.training.together import at_once
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import Applied, TrunkTrainer


@dataclass
class RecordingEngine:
    """Every forward doubles, every backward negates, every step counts.

    Attributes:
        calls: What was asked, in order.
        steps: Local steps applied, by slot.
        states: What each slot was opened with: client, round, adapter and optimiser.
        shared: What each shared adapter was opened with.
        wants: Whether the last forward of a slot wants its smashed gradient.
        refuses: Refuse the next call.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    states: dict[str, tuple[str, int, dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    shared: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    wants: dict[str, bool] = field(default_factory=dict)
    refuses: bool = False

    async def open_shared(
        self,
        name: str,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        trained: frozenset[str] | None = None,
    ) -> None:
        self._note("open_shared", name)
        self.shared[name] = (dict(adapter), dict(optimiser))

    async def shared_snapshot(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        adapter, _ = self.shared[name]
        return {key: tensor + 1 for key, tensor in adapter.items()}, {"moment": torch.tensor([1.0])}

    async def open_round(
        self,
        slot: str,
        client: str,
        round: int,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        shared: str | None = None,
        joint: bool = False,
        trained: frozenset[str] | None = None,
        blocks: range | None = None,
    ) -> None:
        self._note("open_round", client, round)
        self.states[slot] = (client, round, dict(adapter), dict(optimiser))
        self.steps[slot] = 0

    async def denoise_with(self, denoiser: Denoiser) -> None:
        self._note("denoise_with", denoiser)

    def submit(self, work: Callable[[Any], Any]) -> Future[Any]:
        return at_once(cast(TrunkTrainer, self))(work)

    def forward_together(self, calls: Sequence[TrunkForward]) -> list[Tensor]:
        for call in calls:
            self._note("forward", call.step, call.micro_batch, call.trains)
            self.wants[call.slot] = call.wants_smashed_gradient
        return [call.smashed_BTD * 2 for call in calls]

    def backward_together(self, calls: Sequence[TrunkBackward]) -> list[Tensor | None]:
        for call in calls:
            self._note("backward", call.step, call.micro_batch)
        return [-call.output_gradient_BTD if self.wants[call.slot] else None for call in calls]

    def step(
        self, slot: str, step: int, *, rate: Callable[[int], float] | None = None, others: float | None = None
    ) -> Applied:
        self._note("apply", step)
        self.steps[slot] = self.steps.get(slot, 0) + 1
        return Applied(self.steps[slot], 4.0 + (others or 0.0))

    def step_together(self, slots: Sequence[str], step: int, *, others: float | None = None) -> Applied:
        self._note("apply together", *slots, step)
        for slot in slots:
            self.steps[slot] = self.steps.get(slot, 0) + 1
        return Applied(self.steps[slots[0]], 4.0 + (others or 0.0))

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
