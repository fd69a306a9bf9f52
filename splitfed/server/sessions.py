"""One client's round on the server: requests applied once and in order, answers kept until the agent has them."""

import asyncio
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor

from splitfed.compress import Codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import tensor_pb2, training_pb2
from splitfed.training.link import LinkCodecs
from splitfed.training.together import TrunkCalls
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.transport.tensors import (
    Expectation,
    IncomingTensor,
    to_messages,
    unpack_mask,
    unpack_positions,
)

_SESSION_BYTES = 16

LARGEST_VALUE: Final = 2.0**40
"""No hidden vector, and no gradient of one, is anywhere near; in float32 its squares and their sums still are finite,
so that no client's values become infinities in a pass that others share."""

R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Attributes:
        sequences: Most sequences in a micro-batch.
        tokens: Most tokens in a sequence.
        hidden_size: Size of a hidden vector.
        answers: Most answers that are kept for an agent that has not confirmed them.
    """

    sequences: int
    tokens: int
    hidden_size: int
    answers: int


class Operation:
    """A request as it arrives: its first message, then the chunks of its tensor.

    Args:
        request: The first message.
        codecs: A codec for each direction.
        limits: What it may hold.

    Raises:
        ProtocolError: If it is no operation, or its tensor is not what the run allows.
    """

    def __init__(self, request: training_pb2.TrainRequest, codecs: LinkCodecs, limits: Limits) -> None:
        self.number = request.number
        self.received_below = request.received_below
        self.body = request.WhichOneof("body")
        self.request = request
        self._incoming: IncomingTensor | None = None
        shape = (None, None, limits.hidden_size)
        most = (limits.sequences, limits.tokens, limits.hidden_size)
        if self.body == "forward":
            if request.forward.kind not in (training_pb2.KIND_TRAIN, training_pb2.KIND_EVALUATE):
                raise ProtocolError(f"This server does not serve forwards of kind {request.forward.kind}.")
            self._incoming = IncomingTensor(request.forward.smashed, Expectation(codecs.smashed, shape, most))
        elif self.body == "backward":
            expected = Expectation(codecs.output_gradient, shape, most)
            self._incoming = IncomingTensor(request.backward.output_gradient, expected)
        elif self.body != "step":
            raise ProtocolError(f"A request holds {self.body or 'nothing'} where an operation was due.")

    @property
    def is_complete(self) -> bool:
        """All chunks are here."""
        return self._incoming is None or self._incoming.is_complete

    def add(self, request: training_pb2.TrainRequest) -> None:
        """Take the next chunk.

        Raises:
            ProtocolError: If the message is not the chunk that is due.
        """
        if request.WhichOneof("body") != "chunk" or request.number != self.number or self._incoming is None:
            raise ProtocolError(f"Request {self.number} was interrupted by request {request.number}.")
        self._incoming.add(request.chunk)

    def tensor(self) -> Tensor:
        """Decode the request's tensor, shape [B, T, D].

        Raises:
            ProtocolError: If its payload is damaged, or holds a NaN, an infinity or what is beyond all bounds.
        """
        assert self._incoming is not None
        tensor = self._incoming.decode()
        if not torch.isfinite(tensor).all():
            raise ProtocolError(f"Request {self.number} holds a NaN or an infinity; nothing was done with it.")
        if (tensor.abs() > LARGEST_VALUE).any():
            raise ProtocolError(
                f"Request {self.number} holds a value beyond {LARGEST_VALUE:.0f}; lower the learning rate."
            )
        return tensor


def new_token() -> bytes:
    """Draw what a session is known by."""
    return secrets.token_bytes(_SESSION_BYTES)


class TrainSession:
    """The state that a stream leaves behind when it breaks.

    Args:
        client: Whose round it is.
        round: The round, from 1.
        calls: What runs the trunk.
        codecs: A codec for each direction.
        limits: What a request may hold.
        worker: Where tensors are decoded and encoded, off the event loop.
        on_progress: Called after each operation.
        slot: The engine's slot; none: one of this session alone, so that what an older one still asks goes nowhere.
        token: What the session is known by; none: drawn.
    """

    def __init__(
        self,
        client: str,
        round: int,
        calls: TrunkCalls,
        codecs: LinkCodecs,
        limits: Limits,
        worker: Executor,
        on_progress: Callable[[], None],
        *,
        slot: str | None = None,
        token: bytes | None = None,
    ) -> None:
        self.client = client
        self.round = round
        self.token = token or new_token()
        self.slot = slot or self.token.hex()
        self.codecs = codecs
        self.limits = limits
        self.next_number = 0
        self._calls = calls
        self._worker = worker
        self._on_progress = on_progress
        self._answers: OrderedDict[int, list[training_pb2.TrainReply]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def answer(self, operation: Operation) -> list[training_pb2.TrainReply]:
        """Apply an operation once; a number that was applied before gets its answer again.

        Raises:
            ProtocolError: If the number is ahead of its turn, its answer was already confirmed, or the operation does
                not fit the round.
        """
        async with self._lock:
            while self._answers and next(iter(self._answers)) < operation.received_below:
                self._answers.popitem(last=False)
            if operation.number < self.next_number:
                if operation.number not in self._answers:
                    raise ProtocolError(f"Request {operation.number} was answered, and the answer confirmed, before.")
                return self._answers[operation.number]
            if operation.number > self.next_number:
                raise ProtocolError(f"Request {operation.number} came; the next one is {self.next_number}.")
            if len(self._answers) >= self.limits.answers:
                raise ProtocolError(f"{len(self._answers)} answers wait to be confirmed; confirm some first.")
            reply, chunks = await self._apply(operation)
            reply.number = operation.number
            messages = [reply, *(training_pb2.TrainReply(number=operation.number, chunk=chunk) for chunk in chunks)]
            self._answers[operation.number] = messages
            self.next_number += 1
            self._on_progress()
            return messages

    def _trunk(self) -> TrunkCalls:
        """Give what runs the trunk, right before something is asked of it."""
        return self._calls

    async def _apply(self, operation: Operation) -> tuple[training_pb2.TrainReply, list[bytes]]:
        if operation.body == "forward":
            return await self._forward(operation)
        if operation.body == "backward":
            return await self._backward(operation)
        return await self._step(operation.request.step), []

    async def _forward(self, operation: Operation) -> tuple[training_pb2.TrainReply, list[bytes]]:
        forward = operation.request.forward
        smashed_BTD = await self._off_loop(operation.tensor)
        sequences, tokens, _ = smashed_BTD.shape
        if forward.step_tokens > self.limits.sequences * self.limits.tokens:
            raise ProtocolError(f"A step of {forward.step_tokens} tokens is more than this run's steps have.")
        call = TrunkForward(
            self.slot,
            forward.step,
            forward.micro_batch,
            smashed_BTD,
            attention_mask_BT=unpack_mask(forward.attention_mask, sequences, tokens),
            position_ids_BT=unpack_positions(forward.position_ids, sequences, tokens, self.limits.tokens),
            trains=forward.kind == training_pb2.KIND_TRAIN,
            wants_smashed_gradient=forward.wants_smashed_gradient,
        )
        output_BTD = await asyncio.wrap_future(self._trunk().forward(call, tokens=forward.step_tokens))
        tensor, chunks = await self._encode(output_BTD, self.codecs.trunk_output)
        return training_pb2.TrainReply(trunk_output=training_pb2.TrunkOutput(trunk_output=tensor)), chunks

    async def _backward(self, operation: Operation) -> tuple[training_pb2.TrainReply, list[bytes]]:
        backward = operation.request.backward
        output_gradient_BTD = await self._off_loop(operation.tensor)
        call = TrunkBackward(self.slot, backward.step, backward.micro_batch, output_gradient_BTD)
        gradient_BTD = await asyncio.wrap_future(self._trunk().backward(call))
        if gradient_BTD is None:
            return training_pb2.TrainReply(smashed_gradient=training_pb2.SmashedGradient()), []
        tensor, chunks = await self._encode(gradient_BTD, self.codecs.smashed_gradient)
        return training_pb2.TrainReply(smashed_gradient=training_pb2.SmashedGradient(smashed_gradient=tensor)), chunks

    async def _step(self, request: training_pb2.Step) -> training_pb2.TrainReply:
        squared_norm = request.squared_norm if request.HasField("squared_norm") else None
        if squared_norm is not None and not 0 <= squared_norm < math.inf:
            raise ProtocolError(f"The gradients of {self.client!r} have the squared norm {squared_norm}.")
        applied = await asyncio.wrap_future(self._trunk().step(self.slot, request.step, squared_norm=squared_norm))
        return training_pb2.TrainReply(
            stepped=training_pb2.Stepped(adapter_version=applied.version, squared_norm=applied.squared_norm)
        )

    async def _encode(self, tensor: Tensor, codec: Codec) -> tuple[tensor_pb2.Tensor, list[bytes]]:
        try:
            return await self._off_loop(lambda: to_messages(tensor, codec))
        except ValueError as error:
            raise ProtocolError(f"The trunk's result cannot be sent: {error}; lower the learning rate.") from error

    async def _off_loop(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)
