"""The one owner of the accelerator: trunk work in one thread, asked for from the event loop."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from splitfed.errors import ProtocolError
from splitfed.privacy.denoise import Denoiser
from splitfed.training.trunk_step import TrunkTrainer


class Engine(Protocol):
    """Whatever runs the trunk: one process today, replicas or shards behind the same calls later."""

    async def open_shared(
        self,
        name: str,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        trained: frozenset[str] | None = None,
    ) -> None:
        """Put an adapter that slots are to share at a round's start."""

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
        """Fill a slot with a client at the start of a round; with a shared adapter, the given one is left aside."""

    async def denoise_with(self, denoiser: Denoiser) -> None:
        """Take noise away at the trunk's entrance, in the rounds that are opened from now on."""

    def submit(self, work: Callable[[TrunkTrainer], Any]) -> Future[Any]:
        """Run something on the trunk once everything that was asked before is done."""

    async def snapshot(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a slot's trunk adapter and optimiser state."""

    async def shared_snapshot(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a shared trunk adapter and its optimiser state."""

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

    async def open_shared(
        self,
        name: str,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        trained: frozenset[str] | None = None,
    ) -> None:
        """Put an adapter that slots are to share at a round's start."""
        await self._do(lambda trainer: trainer.open_shared(name, adapter, optimiser, trained=trained))

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
        """Fill a slot with a client at the start of a round."""
        await self._do(
            lambda trainer: trainer.open_round(
                slot,
                round,
                adapter,
                optimiser,
                client=client,
                shared=shared,
                joint=joint,
                trained=trained,
                blocks=blocks,
            )
        )

    async def denoise_with(self, denoiser: Denoiser) -> None:
        """Take noise away at the trunk's entrance, in the rounds that are opened from now on."""
        await self._do(lambda trainer: setattr(trainer, "denoiser", denoiser))

    def submit(self, work: Callable[[TrunkTrainer], Any]) -> Future[Any]:
        """Run in the worker; what the model itself cannot digest is the sender's fault, not ours."""

        def run() -> Any:
            try:
                return work(self._trainer)
            except (IndexError, ValueError) as error:
                raise ProtocolError(f"The trunk could not work with what was sent: {error}") from error

        return self._worker.submit(run)

    async def snapshot(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a slot's trunk adapter and optimiser state."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = await self._do(lambda trainer: trainer.result(slot))
        return found

    async def shared_snapshot(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a shared trunk adapter and its optimiser state."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = await self._do(lambda trainer: trainer.shared_result(name))
        return found

    async def steps_done(self, slot: str) -> int:
        """Count the local steps applied in a slot."""
        return int(await self._do(lambda trainer: trainer.steps_done(slot)))

    async def empty(self, slot: str) -> None:
        """Forget what is in a slot."""
        await self._do(lambda trainer: trainer.close(slot))

    def close(self) -> None:
        """End the work in progress, take no more."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def _do(self, work: Callable[[TrunkTrainer], Any]) -> Any:
        return await asyncio.wrap_future(self.submit(work))
