"""One run being served: ports, services, the clock, and a clean end."""

import asyncio
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # which its stubs lack
from torch import Tensor

from splitfed.config import ServerConfig
from splitfed.errors import AddressInUse
from splitfed.federation import Phase
from splitfed.models import export_adapter
from splitfed.proto.v1 import federation_pb2_grpc, generation_pb2_grpc, joining_pb2_grpc, training_pb2_grpc
from splitfed.server.base import BaseFolder
from splitfed.server.boundary import ErrorBoundary
from splitfed.server.coordinator import Coordinator
from splitfed.server.devices import Devices
from splitfed.server.engine import LocalEngine
from splitfed.server.generation import Generations
from splitfed.server.metrics import exposed
from splitfed.server.services import FederationService, GenerationService, Identity, JoiningService, TrainingService
from splitfed.server.store import RunState, RunStore
from splitfed.training.denoising import FitDenoiser
from splitfed.training.setup import lora_settings
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.transport.channel import SERVER_OPTIONS, server_credentials

_log = logging.getLogger(__name__)

_TICK_S = 1.0
_GRACE_S = 10.0
_LAST_WORD_S = 30.0
_HOPELESS = 3


class Daemon:
    """What lives from the first port opened to the last one closed. Made and used on one event loop.

    Args:
        config: The server's configuration.
        state: Where the run stands.
        trainer: Owner of the trunk.
        store: Where rounds are written.
        base: The base model, as agents ask about it.
        fit_denoiser: Fits what the trunk takes noise away with; None = the trunk takes what comes.
        devices: What agents may hold; None: what the run says, all the same.

    Attributes:
        coordinator: Owner of the run's state.
    """

    def __init__(
        self,
        config: ServerConfig,
        state: RunState,
        trainer: TrunkTrainer,
        store: RunStore,
        base: BaseFolder,
        *,
        fit_denoiser: FitDenoiser | None = None,
        devices: Devices | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._base = base
        self._worker = ThreadPoolExecutor(max_workers=2, thread_name_prefix="worker")
        self._engine = LocalEngine(trainer)
        self._health = health.HealthServicer()
        self.coordinator = Coordinator(
            config,
            state,
            self._engine,
            store,
            export=self._export,
            worker=self._worker,
            hidden_size=trainer.hidden_size,
            fit_denoiser=fit_denoiser,
            devices=devices,
        )
        self._generations = Generations(self.coordinator, self._engine)
        self._why_hopeless: str | None = None
        self._blocks = trainer.blocks
        self._hidden_size = trainer.hidden_size

    async def serve(self, stop: asyncio.Event) -> int:
        """Serve until the run is over, or until it is asked to stop: then work in progress ends first.

        Returns:
            The exit status: 3 if every agent left the run for good before it was over, or so many updates were refused
            that a round cannot have its quorum; otherwise 0.

        Raises:
            AddressInUse: If an address cannot be listened on.
        """
        server = aio.server(interceptors=[ErrorBoundary()], options=SERVER_OPTIONS)
        identity = Identity(self._config.run_id, is_secure=self._config.tls is not None)
        joining_pb2_grpc.add_JoiningServicer_to_server(
            JoiningService(self.coordinator, self._base, identity, self._worker), server
        )
        training_pb2_grpc.add_TrainingServicer_to_server(
            TrainingService(self.coordinator, identity, self._blocks), server
        )
        federation_pb2_grpc.add_FederationServicer_to_server(FederationService(self.coordinator, identity), server)
        generation_pb2_grpc.add_GenerationServicer_to_server(
            GenerationService(
                self.coordinator,
                self._generations,
                self._base,
                identity,
                self._worker,
                blocks=self._blocks,
                hidden_size=self._hidden_size,
            ),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            bound = [self._listen(server, address) for address in self._addresses()]
            await self.coordinator.prepare_entrance()
            await server.start()
            with exposed(self.coordinator, self._config.server.metrics_port):
                await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
                self._store.write_address(bound[0])
                _log.info("serving the run %s on %s", self._config.run_id, " and ".join(bound))
                if self.coordinator.rounds.phase is not Phase.FINISHED:
                    _log.info("waiting for agents (0 of %d here)", self._config.federation.agents)
                await self._until_over(stop)
                await self._health.enter_graceful_shutdown()
                await self.coordinator.drain()
                self._generations.drain()
        finally:
            await server.stop(_GRACE_S)
            self._engine.close()
            self._worker.shutdown()
            self._store.close()
        return self._last_word()

    async def _until_over(self, stop: asyncio.Event) -> None:
        """Wait for a signal, the run's end, or the last agent's; look at the clock meanwhile.

        A server that generates outlives the run: there only a signal ends it.
        """
        ended = asyncio.create_task(self.coordinator.wait_for_end())
        stopped = asyncio.create_task(stop.wait())
        finished_s: float | None = None
        awaited: list[str] = []
        try:
            while not ended.done() and not stopped.done():
                await asyncio.wait({ended, stopped}, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                await self.coordinator.tick()
                self._why_hopeless = self.coordinator.why_hopeless
                if self.coordinator.rounds.is_abandoned or self._why_hopeless is not None:
                    return
                if self.coordinator.rounds.phase is Phase.FINISHED and self._config.generation.enabled:
                    _log.info("the run is over; its members can generate until this server is stopped")
                    await stopped
                    return
                if self.coordinator.rounds.phase is Phase.FINISHED:
                    now_s = asyncio.get_running_loop().time()
                    if finished_s is None:
                        finished_s = now_s
                    elif not awaited and (awaited := self.coordinator.unaware):
                        _log.info(
                            "waiting up to %.0f s for %s to hear that the run is over", _LAST_WORD_S, ", ".join(awaited)
                        )
                    if now_s - finished_s > _LAST_WORD_S:
                        unaware = ", ".join(self.coordinator.unaware)
                        _log.warning("the run is over, and in %.0f s %s did not come to hear", _LAST_WORD_S, unaware)
                        return
        finally:
            ended.cancel()
            stopped.cancel()

    def _last_word(self) -> int:
        """Say how it ended; gives the exit status."""
        rounds = self.coordinator.rounds
        if rounds.phase is Phase.FINISHED:
            _log.info("the run is over; its adapter is in %s", self._store.final_adapter)
            return 0
        if rounds.is_abandoned:
            _log.error(
                "every agent left the run for good after round %d of %d; --resume goes on from there with those that "
                "come back",
                rounds.committed,
                rounds.rounds,
            )
            return _HOPELESS
        if self._why_hopeless is not None:
            _log.error("%s", self._why_hopeless)
            return _HOPELESS
        _log.info("stopped after round %d of %d; --resume goes on from there", rounds.committed, rounds.rounds)
        return 0

    def _addresses(self) -> list[str]:
        wanted = [self._config.server.address, self._config.server.fed_address]
        return list(dict.fromkeys(address for address in wanted if address is not None))

    def _listen(self, server: aio.Server, address: str) -> str:
        """Listen on an address; gives it with the port that it got."""
        try:
            if self._config.tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(self._config.tls))
        except RuntimeError as error:
            raise AddressInUse(
                f"The server cannot listen on {address}: the port is in use or not this machine's; free it, "
                "or change [server] address."
            ) from error
        return f"{address.rpartition(':')[0]}:{port}"

    def _export(self, round: int, state: Mapping[str, Tensor]) -> None:
        folder = self._store.adapter_folder(round)
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        export_adapter(
            draft,
            state,
            lora_settings(self._config.lora),
            base_folder=self._base.folder,
            base_name=self._config.model.base,
        )
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        self._store.write_base(self._base.hashes)
