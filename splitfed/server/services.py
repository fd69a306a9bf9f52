"""The services, thin: read the message, ask the coordinator, write the answer."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from typing import Any

from splitfed.compress import get_codec
from splitfed.errors import JoinRefused, ProtocolError, RoundLost, ServerUnreachable, SplitFedError
from splitfed.federation import Phase
from splitfed.models import TensorIdentity
from splitfed.proto.v1 import (
    federation_pb2,
    federation_pb2_grpc,
    joining_pb2,
    joining_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from splitfed.server.base import BaseFolder
from splitfed.server.coordinator import Contribution, Coordinator
from splitfed.server.sessions import Operation, TrainSession
from splitfed.transport.adapters import IncomingAdapter, adapter_messages
from splitfed.transport.link import FRAMING_BYTES
from splitfed.transport.tensors import codec_on_wire
from splitfed.transport.version import PROTOCOL_VERSION

_MOST_NAME_CHARACTERS = 64
_MOST_TENSORS = 1_000_000


class Identity:
    """Who calls: under mutual TLS a name is its certificate's, otherwise what the caller says.

    Args:
        run_id: The run of this server.
        is_secure: Calls come over mutual TLS.
    """

    def __init__(self, run_id: str, *, is_secure: bool) -> None:
        self._run_id = run_id
        self._is_secure = is_secure

    def check(self, context: Any, client: str, run_id: str | None = None) -> None:
        """Check the name of a caller, and that it means this run.

        Raises:
            JoinRefused: If the name is not the certificate's.
            ProtocolError: If it is not a name, or the run is another one.
        """
        if not 0 < len(client) <= _MOST_NAME_CHARACTERS or not client.isprintable():
            raise ProtocolError("The agent's name is empty or too long; use 1 to 64 letters, digits, dots or dashes.")
        if run_id is not None and run_id != self._run_id:
            raise ProtocolError(f"This server serves the run {self._run_id!r}, not {run_id[:64]!r}.")
        if self._is_secure:
            names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
            if client not in names:
                raise JoinRefused(
                    f"The certificate is for {names[0] if names else 'nobody'!r}, not for {client!r}; use the agent's "
                    "own."
                )


class JoiningService(joining_pb2_grpc.JoiningServicer):
    """How an agent becomes part of the run."""

    def __init__(self, coordinator: Coordinator, base: BaseFolder, identity: Identity, worker: Executor) -> None:
        self._coordinator = coordinator
        self._base = base
        self._identity = identity
        self._worker = worker

    async def Describe(self, request: joining_pb2.DescribeRequest, context: Any) -> joining_pb2.DescribeReply:
        """Tell an agent the run's configuration."""
        _check_version(request.protocol_version)
        self._identity.check(context, request.client)
        config = self._coordinator.config
        return joining_pb2.DescribeReply(
            protocol_version=PROTOCOL_VERSION, run_id=config.run_id, run_config=config.shared_json()
        )

    async def ListSegments(
        self, request: joining_pb2.ListSegmentsRequest, context: Any
    ) -> joining_pb2.ListSegmentsReply:
        """List what an agent without the base model fetches."""
        self._check_run(request.run_id)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._segments)

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
        if not 1 <= request.weight < 2**31:
            raise JoinRefused(f"An agent's weight is {request.weight}; it lies between 1 and {2**31 - 1}.")
        if len(request.agent_id) != 16 or len(request.tensors) > _MOST_TENSORS:
            raise ProtocolError("The agent's id has 16 bytes.")
        tensors = {
            tensor.name: TensorIdentity(tensor.dtype, tuple(tensor.shape), tensor.sha256.hex())
            for tensor in request.tensors
        }
        await asyncio.get_running_loop().run_in_executor(
            self._worker, self._base.check, request.config_sha256.hex(), tensors
        )
        await self._coordinator.join(request.client, request.agent_id, request.weight)
        rounds = self._coordinator.rounds
        return joining_pb2.JoinReply(agents=rounds.agents, joined=rounds.joined)

    def _segments(self) -> joining_pb2.ListSegmentsReply:
        identities = {name: self._base.identity(name) for name in self._base.agent_tensors}
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


class TrainingService(training_pb2_grpc.TrainingServicer):
    """The split itself."""

    def __init__(self, coordinator: Coordinator, identity: Identity, blocks: range) -> None:
        self._coordinator = coordinator
        self._identity = identity
        self._blocks = blocks

    async def Train(
        self, request_iterator: AsyncIterator[training_pb2.TrainRequest], context: Any
    ) -> AsyncIterator[training_pb2.TrainReply]:
        """Serve one client's stream of one round; a bounded window is read ahead of what is being computed."""
        session = await self._open(request_iterator, context)
        yield training_pb2.TrainReply(
            opened=training_pb2.Opened(session=session.token, next_number=session.next_number)
        )
        window: asyncio.Queue[Operation | SplitFedError | None] = asyncio.Queue(
            self._coordinator.config.training.max_in_flight
        )
        reader = asyncio.create_task(self._read(request_iterator, session, window))
        try:
            while (operation := await window.get()) is not None:
                if isinstance(operation, SplitFedError):
                    raise operation
                # The operation ends even if the stream does: its answer is then there for the next stream.
                for reply in await asyncio.shield(session.answer(operation)):
                    self._coordinator.count_bytes(session.client, down=reply.ByteSize() + FRAMING_BYTES)
                    yield reply
                if self._coordinator.is_draining:
                    raise ServerUnreachable("The server is shutting down; come back when it is up again.")
                if not self._coordinator.is_current(session):
                    raise RoundLost(f"The round of {session.client!r} was started again on another stream.")
        finally:
            reader.cancel()

    async def _open(self, requests: AsyncIterator[training_pb2.TrainRequest], context: Any) -> TrainSession:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("body") != "open":
            raise ProtocolError("A stream starts with the round that it is for.")
        opening = first.open
        self._identity.check(context, opening.client, opening.run_id)
        self._coordinator.check_member(opening.client, opening.agent_id)
        if (opening.first_block, opening.end_block) != (self._blocks.start, self._blocks.stop):
            raise ProtocolError(
                f"The agent asks for blocks {opening.first_block} to {opening.end_block}; this run's trunk is "
                f"{self._blocks.start} to {self._blocks.stop}."
            )
        return await self._coordinator.open_session(opening.client, opening.round, opening.session)

    async def _read(
        self,
        requests: AsyncIterator[training_pb2.TrainRequest],
        session: TrainSession,
        window: "asyncio.Queue[Operation | SplitFedError | None]",
    ) -> None:
        """Gather messages into operations; a full window stops the reading, and gRPC then stops the sender."""
        operation: Operation | None = None
        try:
            async for request in requests:
                self._coordinator.count_bytes(session.client, up=request.ByteSize() + FRAMING_BYTES)
                if operation is None:
                    operation = Operation(request, session.codecs, session.limits)
                else:
                    operation.add(request)
                if operation.is_complete:
                    await window.put(operation)
                    operation = None
        except SplitFedError as error:
            await window.put(error)
        else:
            await window.put(None)


class FederationService(federation_pb2_grpc.FederationServicer):
    """Rounds, and the adapters of bottom and top."""

    def __init__(self, coordinator: Coordinator, identity: Identity) -> None:
        self._coordinator = coordinator
        self._identity = identity
        self._codec = get_codec(coordinator.config.codecs.adapter)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in coordinator.ends.items()}

    async def Watch(
        self, request: federation_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[federation_pb2.RoundEvent]:
        """Stream the run's events to a member."""
        self._check(context, request)
        rounds = self._coordinator.rounds
        async for phase, round, is_submitted in self._coordinator.watch(request.client):
            if phase is Phase.FINISHED:
                yield federation_pb2.RoundEvent(run_finished=federation_pb2.RunFinished(rounds=rounds.rounds))
            elif self._coordinator.is_draining:
                yield federation_pb2.RoundEvent(draining=federation_pb2.Draining())
            elif phase is Phase.WAITING:
                waiting = federation_pb2.Waiting(agents=rounds.agents, joined=rounds.joined)
                yield federation_pb2.RoundEvent(waiting=waiting)
            else:
                yield federation_pb2.RoundEvent(
                    round_opened=federation_pb2.RoundOpened(
                        round=round, rounds=rounds.rounds, is_submitted=is_submitted
                    )
                )

    async def FetchAdapter(
        self, request: federation_pb2.FetchAdapterRequest, context: Any
    ) -> AsyncIterator[federation_pb2.AdapterChunk]:
        """Stream the adapters that a round starts from."""
        self._check(context, request)
        if request.round != self._coordinator.rounds.current:
            raise RoundLost(f"Round {request.round} is over; the run is at round {self._coordinator.rounds.current}.")
        self._coordinator.note_progress(request.client)
        header = federation_pb2.AdapterHeader(run_id=request.run_id, client=request.client, round=request.round)
        for message in adapter_messages(header, self._coordinator.ends, self._codec):
            self._coordinator.count_bytes(request.client, down=message.ByteSize() + FRAMING_BYTES)
            yield message

    async def SubmitAdapter(
        self, request_iterator: AsyncIterator[federation_pb2.AdapterChunk], context: Any
    ) -> federation_pb2.SubmitReply:
        """Take a client's update."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "header":
            raise ProtocolError("An update starts with its header.")
        header = first.header
        self._check(context, header)
        incoming = IncomingAdapter(self._shapes, self._codec)
        received_bytes = first.ByteSize() + FRAMING_BYTES
        async for message in request_iterator:
            received_bytes += message.ByteSize() + FRAMING_BYTES
            incoming.add(message)
            self._coordinator.note_progress(header.client)
        self._coordinator.count_bytes(header.client, up=received_bytes)
        contribution = Contribution(
            tokens=header.tokens,
            training_loss=_finite(header.training_loss) if header.HasField("training_loss") else None,
            held_out_loss=_finite(header.held_out_loss) if header.HasField("held_out_loss") else None,
        )
        is_new = await self._coordinator.submit(header.client, header.round, incoming.state(), contribution)
        return federation_pb2.SubmitReply(is_new=is_new)

    def _check(self, context: Any, request: Any) -> None:
        self._identity.check(context, request.client, request.run_id)
        self._coordinator.check_member(request.client, request.agent_id)


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise JoinRefused(
            f"The agent speaks version {version} of the protocol, this server {PROTOCOL_VERSION}; install the same "
            "splitfed."
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _next(pieces: Iterator[bytes]) -> bytes | None:
    return next(pieces, None)
