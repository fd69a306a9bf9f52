"""How an agent becomes part of the run."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from typing import Any

from splitfed.compress import get_codec
from splitfed.errors import JoinRefused, ProtocolError
from splitfed.federation.aggregate import MAX_TOTAL_WEIGHT
from splitfed.models import TensorIdentity
from splitfed.proto.v1 import joining_pb2, joining_pb2_grpc
from splitfed.server.base import BaseFolder
from splitfed.server.coordinator import Coordinator
from splitfed.server.services.identity import Identity
from splitfed.transport.tensors import codec_on_wire
from splitfed.transport.version import PROTOCOL_VERSION

_MOST_TENSORS = 1_000_000
_MOST_NAMES = 10_000

_log = logging.getLogger(__name__)


class JoiningService(joining_pb2_grpc.JoiningServicer):
    """How an agent becomes part of the run."""

    def __init__(self, coordinator: Coordinator, base: BaseFolder, identity: Identity, worker: Executor) -> None:
        self._coordinator = coordinator
        self._base = base
        self._identity = identity
        self._worker = worker
        self._asked: set[str] = set()

    async def Describe(self, request: joining_pb2.DescribeRequest, context: Any) -> joining_pb2.DescribeReply:
        """Tell an agent the run's configuration."""
        _check_version(request.protocol_version)
        self._identity.check(context, request.client)
        config = self._coordinator.config
        if request.client not in self._asked and len(self._asked) < _MOST_NAMES:
            self._asked.add(request.client)
            _log.info("%s asks about the run", request.client)
        return joining_pb2.DescribeReply(
            protocol_version=PROTOCOL_VERSION, run_id=config.run_id, run_config=config.shared_json()
        )

    async def ListSegments(
        self, request: joining_pb2.ListSegmentsRequest, context: Any
    ) -> joining_pb2.ListSegmentsReply:
        """List what an agent without the base model fetches."""
        self._check_run(request.run_id)
        if request.bottom_blocks + request.top_blocks >= self._base.n_blocks:
            raise JoinRefused(
                f"A bottom of {request.bottom_blocks} and a top of {request.top_blocks} blocks do not fit this run, "
                f"whose model has {self._base.n_blocks}: the trunk keeps one at least; hold fewer ([agent] "
                "bottom_blocks, top_blocks)."
            )
        return await asyncio.get_running_loop().run_in_executor(
            self._worker, lambda: self._segments(request.bottom_blocks, request.top_blocks)
        )

    async def FetchSegments(
        self, request: joining_pb2.FetchSegmentsRequest, context: Any
    ) -> AsyncIterator[joining_pb2.FileChunk]:
        """Stream one file or tensor of the base model."""
        self._check_run(request.run_id)
        what = request.WhichOneof("what")
        if what is None:
            raise ProtocolError("A fetch names neither a file nor a tensor.")
        pieces = self._base.read_file(request.file) if what == "file" else self._base.read_tensor(request.tensor)
        while (piece := await asyncio.get_running_loop().run_in_executor(self._worker, _next, pieces)) is not None:
            yield joining_pb2.FileChunk(data=piece)

    async def Join(self, request: joining_pb2.JoinRequest, context: Any) -> joining_pb2.JoinReply:
        """Take an agent in: identity, codecs, fingerprint."""
        _check_version(request.protocol_version)
        self._identity.check(context, request.client, request.run_id)
        config = self._coordinator.config
        for direction, name in config.codecs.model_dump().items():
            if codec_on_wire(get_codec(name)) not in request.codecs:
                raise JoinRefused(f"The run sends {direction} as {name!r}, which the agent does not speak; upgrade it.")
        most = MAX_TOTAL_WEIGHT // (config.federation.population or config.federation.agents)
        if not 1 <= request.weight <= most:  # a round has room for the weights of all agents together
            raise JoinRefused(
                f"The agent's weight is {request.weight}, and in this run it lies between 1 and {most}; set [privacy] "
                "aggregation_weight."
            )
        if len(request.agent_id) != 16 or len(request.tensors) > _MOST_TENSORS:
            raise ProtocolError("The agent's id has 16 bytes.")
        tensors = {
            tensor.name: TensorIdentity(tensor.dtype, tuple(tensor.shape), tensor.sha256.hex())
            for tensor in request.tensors
        }
        await asyncio.get_running_loop().run_in_executor(
            self._worker, self._base.check, request.config_sha256.hex(), tensors
        )
        await self._coordinator.join(
            request.client,
            request.agent_id,
            request.weight,
            device=self._coordinator.devices.device(
                bottom_blocks=request.bottom_blocks if request.HasField("bottom_blocks") else None,
                top_blocks=request.top_blocks if request.HasField("top_blocks") else None,
                rank=request.rank if request.HasField("rank") else None,
                personal=request.personal,
            ),
            is_proven=self._identity.is_secure,
        )
        rounds = self._coordinator.rounds
        return joining_pb2.JoinReply(agents=rounds.agents, joined=rounds.joined)

    def _segments(self, bottom_blocks: int, top_blocks: int) -> joining_pb2.ListSegmentsReply:
        identities = {name: self._base.identity(name) for name in self._base.list_tensors(bottom_blocks, top_blocks)}
        return joining_pb2.ListSegmentsReply(
            config_sha256=bytes.fromhex(self._base.config_sha256),
            tensors=[
                joining_pb2.TensorIdentity(
                    name=name, dtype=identity.dtype, shape=identity.shape, sha256=bytes.fromhex(identity.sha256)
                )
                for name, identity in identities.items()
            ],
            files=[
                joining_pb2.FileIdentity(name=name, size_bytes=size_bytes, sha256=sha256)
                for name, (size_bytes, sha256) in self._base.files().items()
            ],
        )

    def _check_run(self, run_id: str) -> None:
        if run_id != self._coordinator.config.run_id:
            raise ProtocolError(f"This server serves the run {self._coordinator.config.run_id!r}, not {run_id[:64]!r}.")


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise JoinRefused(
            f"The agent speaks version {version} of the protocol, this server {PROTOCOL_VERSION}; install the same "
            "splitfed."
        )


def _next(pieces: Iterator[bytes]) -> bytes | None:
    return next(pieces, None)
