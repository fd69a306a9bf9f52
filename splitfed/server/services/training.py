"""The split itself, over a stream for each agent and round."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from splitfed.errors import ProtocolError, RoundLost, ServerUnreachable, SplitFedError
from splitfed.proto.v1 import training_pb2, training_pb2_grpc
from splitfed.server.coordinator import Coordinator
from splitfed.server.outlast import outlasting
from splitfed.server.services.identity import Identity
from splitfed.server.sessions import Operation, TrainSession
from splitfed.transport.counting import framed_bytes


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
                since_s = time.perf_counter()
                replies = await outlasting(session.answer(operation))
                self._coordinator.figures.count_seconds(session.client, time.perf_counter() - since_s)
                for reply in replies:
                    self._coordinator.figures.count_bytes(session.client, down=framed_bytes(reply))
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
        self._coordinator.check_joined(opening.client, opening.agent_id)
        blocks = self._coordinator.devices[opening.client].blocks or self._blocks
        if (opening.first_block, opening.end_block) != (blocks.start, blocks.stop):
            raise ProtocolError(
                f"The agent asks for blocks {opening.first_block} to {opening.end_block}; with what it holds its trunk "
                f"is {blocks.start} to {blocks.stop}."
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
                self._coordinator.figures.count_bytes(session.client, up=framed_bytes(request))
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
