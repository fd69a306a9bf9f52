"""The one owner of the accelerator: trunk work in one thread, asked for from the event loop."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from torch import Tensor

from splitfed.errors import ProtocolError
from splitfed.privacy.denoise import Denoiser
from splitfed.training.trunk_step import Applied, TrunkTrainer

R = TypeVar("R")


class Engine(Protocol):
    """Whatever runs the trunk: one process today, replicas or shards behind the same calls later."""

    async def open_round(
        self, slot: str, client: str, round: int, adapter: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]
    ) -> None:
        """Fill a slot with a client at the start of a round."""

    async def denoise_with(self, denoiser: Denoiser) -> None:
        """Take noise away at the trunk's entrance, in the rounds that are opened from now on."""

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
        """Run the trunk forward, shape [B, T, D] in and out."""

    async def backward(self, slot: str, step: int, micro_batch: int, output_gradient_BTD: Tensor) -> Tensor | None:
        """Run the trunk backward; returns the smashed gradient, shape [B, T, D], if the forward asked for it."""

    async def apply(self, slot: str, step: int, *, squared_norm: float | None = None) -> Applied:
        """Apply a local step's gradients, clipped by one norm with the agent's where that one is given."""

    async def snapshot(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a slot's trunk adapter and optimiser state."""

    async def steps_done(self, slot: str) -> int:
        """Count the local steps applied in a slot."""

    async def empty(self, slot: str) -> None:
        """Forget what is in a slot, after the work that was asked of it before."""

    def close(self) -> None:
        """End the work in progress, take no more."""


class LocalEngine:
    """The engine in this process: calls wait in line for one thread.

    Args:
        trainer: Owner of the trunk; nothing else may call it.
    """

    def __init__(self, trainer: TrunkTrainer) -> None:
        self._trainer = trainer
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def open_round(
        self, slot: str, client: str, round: int, adapter: Mapping[str, Tensor], optimiser: Mapping[str, Tensor]
    ) -> None:
        """Fill a slot with a client at the start of a round."""
        await self._do(lambda: self._trainer.open_round(slot, round, adapter, optimiser, client=client))

    async def denoise_with(self, denoiser: Denoiser) -> None:
        """Take noise away at the trunk's entrance, in the rounds that are opened from now on."""
        await self._do(lambda: setattr(self._trainer, "denoiser", denoiser))

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
        """Run the trunk forward."""
        return await self._do(
            lambda: self._trainer.forward(
                slot,
                step,
                micro_batch,
                smashed_BTD,
                attention_mask_BT=attention_mask_BT,
                position_ids_BT=position_ids_BT,
                trains=trains,
                wants_smashed_gradient=wants_smashed_gradient,
            )
        )

    async def backward(self, slot: str, step: int, micro_batch: int, output_gradient_BTD: Tensor) -> Tensor | None:
        """Run the trunk backward."""
        return await self._do(lambda: self._trainer.backward(slot, step, micro_batch, output_gradient_BTD))

    async def apply(self, slot: str, step: int, *, squared_norm: float | None = None) -> Applied:
        """Apply a local step's gradients."""
        return await self._do(lambda: self._trainer.step(slot, step, others=squared_norm))

    async def snapshot(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a slot's trunk adapter and optimiser state."""
        return await self._do(lambda: self._trainer.result(slot))

    async def steps_done(self, slot: str) -> int:
        """Count the local steps applied in a slot."""
        return await self._do(lambda: self._trainer.steps_done(slot))

    async def empty(self, slot: str) -> None:
        """Forget what is in a slot."""
        await self._do(lambda: self._trainer.close(slot))

    def close(self) -> None:
        """End the work in progress, take no more."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def _do(self, work: Callable[[], R]) -> R:
        """Run in the worker; what the model itself cannot digest is the sender's fault, not ours."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        except (IndexError, ValueError) as error:
            raise ProtocolError(f"The trunk could not work with what was sent: {error}") from error
