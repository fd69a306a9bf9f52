"""Text from the split model, over a stream for each sequence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from splitfed.compress import get_codec
from splitfed.config import ServerConfig
from splitfed.errors import JoinRefused, ProtocolError, RoundLost, ServerUnreachable
from splitfed.models import TensorIdentity
from splitfed.proto.v1 import federation_pb2, generation_pb2, generation_pb2_grpc
from splitfed.server.base import BaseFolder
from splitfed.server.devices import Devices
from splitfed.server.generation import Generations, OpenSequence
from splitfed.server.round_figures import RoundFigures
from splitfed.server.services.identity import Identity
from splitfed.server.sessions import LARGEST_VALUE
from splitfed.training.link import link_codecs
from splitfed.transport.adapters import adapter_messages
from splitfed.transport.counting import framed_bytes
from splitfed.transport.tensors import Expectation, IncomingTensor, to_messages

_MOST_TENSORS = 1_000_000

R = TypeVar("R")

_Requests = AsyncIterator[generation_pb2.GenerateRequest]


class Members(Protocol):
    """What the service asks of the run."""

    @property
    def config(self) -> ServerConfig:
        """The server's configuration."""

    @property
    def devices(self) -> Devices:
        """What agents may hold."""

    @property
    def figures(self) -> RoundFigures:
        """What is counted."""

    def check_member(self, client: str, agent_id: bytes) -> None:
        """Check that a call comes from the agent that joined under this name."""


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Text from the split model.

    Args:
        run: The run.
        generations: Its sequences.
        base: The base model, which agents' is compared with.
        identity: Who calls.
        worker: Where tensors are decoded and encoded.
        blocks: Blocks of the trunk where an agent is cut as the run is.
        hidden_size: Size of a hidden vector.
    """

    def __init__(
        self,
        run: Members,
        generations: Generations,
        base: BaseFolder,
        identity: Identity,
        worker: Executor,
        *,
        blocks: range,
        hidden_size: int,
    ) -> None:
        self._run = run
        self._generations = generations
        self._base = base
        self._identity = identity
        self._worker = worker
        self._blocks = blocks
        self._hidden_size = hidden_size
        self._codecs = link_codecs(run.config.codecs)
        self._adapter_codec = get_codec(run.config.codecs.adapter)

    async def FetchLastRound(
        self, request: generation_pb2.FetchLastRoundRequest, context: Any
    ) -> AsyncIterator[federation_pb2.AdapterChunk]:
        """Stream the adapters of bottom and top after the last whole round."""
        self._check(context, request)
        device = self._run.devices.device(
            bottom_blocks=request.bottom_blocks, top_blocks=request.top_blocks, rank=request.rank
        )
        if len(request.tensors) > _MOST_TENSORS:
            raise ProtocolError(f"{len(request.tensors)} tensors are more than a base model has.")
        tensors = {
            tensor.name: TensorIdentity(tensor.dtype, tuple(tensor.shape), tensor.sha256.hex())
            for tensor in request.tensors
        }
        await self._off_loop(lambda: self._base.check(request.config_sha256.hex(), tensors))
        whole = self._generations.last_round(request.client)
        state = await self._off_loop(lambda: whole.ends_of(device, self._run.config.lora.rank))
        header = federation_pb2.AdapterHeader(run_id=request.run_id, client=request.client, round=whole.number)
        for message in adapter_messages(header, state, self._adapter_codec):
            self._run.figures.wire_bytes[request.client, "down"] += framed_bytes(message)
            yield message

    async def Generate(self, request_iterator: _Requests, context: Any) -> AsyncIterator[generation_pb2.GenerateReply]:
        """Serve one sequence: rows in, trunk output out, until the agent has enough."""
        requests = aiter(request_iterator)
        first = await self._within_patience(anext(requests, None))
        if first is None or first.WhichOneof("body") != "open":
            raise ProtocolError("A stream starts with the sequence that it is for.")
        opening = first.open
        sequence = self._open(opening, context)
        try:
            yield generation_pb2.GenerateReply(opened=generation_pb2.SequenceOpened())
            answered = 0
            while (smashed_1TD := await self._receive(requests, sequence)) is not None:
                output_1TD = await self._generations.forward(sequence, smashed_1TD)
                answered += 1
                if answered <= opening.answered:
                    continue
                for reply in await self._off_loop(partial(self._replies, output_1TD)):
                    self._run.figures.wire_bytes[sequence.client, "down"] += framed_bytes(reply)
                    yield reply
        finally:
            self._generations.close(sequence)

    def _open(self, opening: generation_pb2.OpenSequence, context: Any) -> OpenSequence:
        self._check(context, opening)
        blocks = range(opening.first_block, opening.end_block)
        if blocks != self._blocks and not self._is_a_cut(blocks):
            raise ProtocolError(
                f"The agent asks for blocks {opening.first_block} to {opening.end_block}; this run has no such trunk."
            )
        return self._generations.open(opening.client, opening.round, blocks=blocks, max_tokens=opening.max_tokens)

    def _is_a_cut(self, blocks: range) -> bool:
        """Say whether an agent of this run may be cut so that these blocks are its trunk."""
        try:
            device = self._run.devices.device(
                bottom_blocks=blocks.start, top_blocks=max(self._base.n_blocks - blocks.stop, 0)
            )
        except JoinRefused:
            return False
        return device.blocks == blocks

    async def _receive(self, requests: _Requests, sequence: OpenSequence) -> Tensor | None:
        """Gather the next rows; None at the stream's end."""
        incoming: IncomingTensor | None = None
        while incoming is None or not incoming.is_complete:
            request = await self._within_patience(anext(requests, None), sequence)
            if request is None:
                return None
            self._run.figures.wire_bytes[sequence.client, "up"] += framed_bytes(request)
            body = request.WhichOneof("body")
            if body != ("smashed" if incoming is None else "chunk"):
                raise ProtocolError(f"A sequence's stream holds {body or 'nothing'} where rows were due.")
            if incoming is None:
                if not sequence.left:
                    raise ProtocolError(f"A sequence of {sequence.max_tokens} rows was declared, and one more came.")
                shape, most = (1, None, self._hidden_size), (1, sequence.left, self._hidden_size)
                incoming = IncomingTensor(request.smashed, Expectation(self._codecs.smashed, shape, most))
            else:
                incoming.add(request.chunk)
        smashed_1TD = await self._off_loop(incoming.decode)
        if not bool((smashed_1TD.abs() <= LARGEST_VALUE).all()):
            raise ProtocolError(
                f"A row holds a value that is not finite, or beyond {LARGEST_VALUE:.0f}; nothing was done with it."
            )
        return smashed_1TD

    async def _within_patience(self, coming: Any, sequence: OpenSequence | None = None) -> Any:
        """Wait for a message, but neither too long nor for a sequence that has made way for another."""
        patience_s = self._generations.config.idle_timeout_s
        reading = asyncio.ensure_future(coming)
        waits = {reading} if sequence is None else {reading, asyncio.ensure_future(sequence.over.wait())}
        try:
            done, _ = await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                if not wait.done():
                    wait.cancel()
        if sequence is not None and sequence.over.is_set():
            self._generations.check_draining()
            raise RoundLost(f"{sequence.client!r} has begun another sequence.")
        if reading not in done:
            raise ServerUnreachable(f"No row came for {patience_s:.0f} s; what came before may be sent again.")
        return reading.result()

    def _replies(self, output_1TD: Tensor) -> list[generation_pb2.GenerateReply]:
        try:
            tensor, chunks = to_messages(output_1TD, self._codecs.trunk_output)
        except ValueError as error:
            raise ProtocolError(f"The trunk's result cannot be sent: {error}.") from error
        replies = [generation_pb2.GenerateReply(trunk_output=tensor)]
        return replies + [generation_pb2.GenerateReply(chunk=chunk) for chunk in chunks]

    def _check(self, context: Any, request: Any) -> None:
        """Check who calls, and that this server generates for it."""
        self._identity.check(context, request.client, request.run_id)
        self._generations.check_enabled()
        try:
            self._run.check_member(request.client, request.agent_id)
        except RoundLost as error:
            raise JoinRefused(
                f"{request.client!r} is not a member of the run {request.run_id!r}; only an agent that has taken part "
                "in it can generate with it."
            ) from error

    async def _off_loop(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)
