"""One client's round on the server: each request once and in order, whatever is sent again, and nothing hostile."""

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.compress import get_codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import training_pb2
from splitfed.server.sessions import Limits, Operation, TrainSession
from splitfed.training.link import LinkCodecs
from splitfed.training.together import OwnCalls
from splitfed.transport.tensors import CHUNK_BYTES, Expectation, IncomingTensor, to_messages
from tests.server.recording_engine import RecordingEngine

D = 8
LIMITS = Limits(sequences=4, tokens=16, hidden_size=D, answers=5)
NONE = get_codec("none")
OPEN = LinkCodecs(NONE, NONE, NONE, NONE)


@dataclass
class Round:
    """A session, what its engine was asked, and how often it made progress."""

    session: TrainSession
    engine: RecordingEngine
    progress: list[None]

    async def ask(self, request: training_pb2.TrainRequest) -> list[training_pb2.TrainReply]:
        return await self.session.answer(Operation(request, self.session.codecs, self.session.limits))


def open_round(worker: ThreadPoolExecutor, codecs: LinkCodecs = OPEN, limits: Limits = LIMITS) -> Round:
    engine, progress = RecordingEngine(), []
    session = TrainSession(
        "a", 1, OwnCalls(engine.submit), codecs, limits, worker, on_progress=lambda: progress.append(None)
    )
    return Round(session, engine, progress)


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as worker:
        yield worker


@pytest.fixture
def round(worker: ThreadPoolExecutor) -> Round:
    return open_round(worker)


def hidden(sequences: int = 2, tokens: int = 3, size: int = D) -> Tensor:
    return torch.arange(float(sequences * tokens * size)).view(sequences, tokens, size)


def forward(number: int, x_BTD: Tensor | None = None, **fields: Any) -> training_pb2.TrainRequest:
    message, _ = to_messages(hidden() if x_BTD is None else x_BTD, NONE)
    body = {"kind": training_pb2.KIND_TRAIN, "micro_batch": number, "smashed": message, **fields}
    return training_pb2.TrainRequest(number=number, forward=training_pb2.Forward(**body))


def backward(number: int, x_BTD: Tensor | None = None, **fields: Any) -> training_pb2.TrainRequest:
    message, _ = to_messages(hidden() if x_BTD is None else x_BTD, NONE)
    return training_pb2.TrainRequest(number=number, backward=training_pb2.Backward(output_gradient=message, **fields))


def step(number: int, received_below: int = 0) -> training_pb2.TrainRequest:
    return training_pb2.TrainRequest(number=number, received_below=received_below, step=training_pb2.Step(step=number))


def decoded(message: Any, shape: tuple[int, ...] = (2, 3, D)) -> Tensor:
    return IncomingTensor(message, Expectation.exactly(NONE, shape)).decode()


async def test_requests_are_applied_in_their_order_and_answered_under_their_number(round: Round) -> None:
    (output,) = await round.ask(forward(0, wants_smashed_gradient=True))
    (gradient,) = await round.ask(backward(1))
    (stepped,) = await round.ask(training_pb2.TrainRequest(number=2, step=training_pb2.Step(step=0)))
    assert [output.number, gradient.number, stepped.number] == [0, 1, 2]
    assert torch.equal(decoded(output.trunk_output.trunk_output), hidden() * 2)
    assert torch.equal(decoded(gradient.smashed_gradient.smashed_gradient), -hidden())
    assert stepped.stepped.adapter_version == 1
    assert round.engine.calls == [("forward", 0, 0, True), ("backward", 0, 0), ("apply", 0)]
    assert len(round.progress) == 3


async def test_a_gradient_that_nobody_wants_is_not_sent(round: Round) -> None:
    await round.ask(forward(0))
    (reply,) = await round.ask(backward(1))
    assert reply.WhichOneof("body") == "smashed_gradient"
    assert not reply.smashed_gradient.HasField("smashed_gradient")


async def test_an_evaluation_does_not_train(round: Round) -> None:
    await round.ask(forward(0, kind=training_pb2.KIND_EVALUATE))
    assert round.engine.calls == [("forward", 0, 0, False)]


async def test_a_number_that_comes_again_gets_its_answer_and_is_not_applied_twice(round: Round) -> None:
    first = [await round.ask(request) for request in (forward(0), backward(1), step(2))]
    calls, progress = list(round.engine.calls), len(round.progress)
    again = [await round.ask(request) for request in (forward(0), backward(1), step(2))]
    assert again == first
    assert round.engine.calls == calls
    assert len(round.progress) == progress
    assert round.session.next_number == 3


async def test_a_number_that_two_streams_send_at_once_is_applied_once(round: Round) -> None:
    first, second = await asyncio.gather(round.ask(forward(0)), round.ask(forward(0)))
    assert first == second
    assert len(round.engine.calls) == 1


@pytest.mark.parametrize("number", [1, 2, 2**64 - 1])
async def test_a_number_ahead_of_its_turn_is_refused(round: Round, number: int) -> None:
    with pytest.raises(ProtocolError, match=f"Request {number} came; the next one is 0"):
        await round.ask(forward(number, micro_batch=0))
    assert round.engine.calls == []
    assert round.session.next_number == 0


async def test_what_the_engine_refused_was_not_applied_and_may_come_again(round: Round) -> None:
    round.engine.refuses = True
    with pytest.raises(ProtocolError, match="engine refuses"):
        await round.ask(step(0))
    assert round.session.next_number == 0
    (reply,) = await round.ask(step(0))
    assert reply.stepped.adapter_version == 1


async def test_a_confirmed_answer_is_forgotten(round: Round) -> None:
    for number in range(3):
        await round.ask(step(number))
    await round.ask(step(3, received_below=2))
    for number in (0, 1):
        with pytest.raises(ProtocolError, match=f"Request {number} was answered, and the answer confirmed"):
            await round.ask(step(number))
    assert (await round.ask(step(2)))[0].stepped.adapter_version == 3
    assert round.engine.calls == [("apply", number) for number in range(4)]


async def test_a_confirmation_of_answers_to_come_forgets_those_that_are_there(round: Round) -> None:
    await round.ask(step(0))
    await round.ask(step(1, received_below=1000))
    with pytest.raises(ProtocolError, match="Request 0 was answered"):
        await round.ask(step(0))
    assert (await round.ask(step(1)))[0].number == 1


async def test_more_answers_than_are_kept_must_be_confirmed_first(round: Round) -> None:
    for number in range(LIMITS.answers):
        await round.ask(step(number))
    with pytest.raises(ProtocolError, match="5 answers wait to be confirmed"):
        await round.ask(step(5))
    assert len(round.engine.calls) == LIMITS.answers
    assert (await round.ask(step(5, received_below=1)))[0].number == 5


async def test_a_large_answer_comes_in_chunks_under_its_number(worker: ThreadPoolExecutor) -> None:
    limits = Limits(sequences=3, tokens=1 << 10, hidden_size=1 << 8, answers=5)
    round = open_round(worker, limits=limits)
    message, chunks = to_messages(torch.ones(3, 1 << 10, 1 << 8), NONE)
    request = training_pb2.TrainRequest(
        number=0, forward=training_pb2.Forward(kind=training_pb2.KIND_TRAIN, smashed=message)
    )
    operation = Operation(request, OPEN, limits)
    for chunk in chunks:
        assert not operation.is_complete
        operation.add(training_pb2.TrainRequest(number=0, chunk=chunk))
    assert operation.is_complete
    first, *rest = await round.session.answer(operation)
    assert [reply.number for reply in (first, *rest)] == [0, 0, 0]
    assert [len(reply.chunk) for reply in rest] == [CHUNK_BYTES, CHUNK_BYTES]
    output = IncomingTensor(first.trunk_output.trunk_output, Expectation.exactly(NONE, (3, 1 << 10, 1 << 8)))
    for reply in rest:
        output.add(reply.chunk)
    assert torch.equal(output.decode(), torch.full((3, 1 << 10, 1 << 8), 2.0))


async def test_a_result_that_cannot_be_encoded_ends_the_round_with_a_reason(worker: ThreadPoolExecutor) -> None:
    round = open_round(worker, codecs=LinkCodecs(NONE, get_codec("fp16"), NONE, NONE))
    with pytest.raises(ProtocolError, match=r"trunk's result cannot be sent.*lower the learning rate"):
        await round.ask(forward(0, torch.full((1, 1, D), 1e6)))


@pytest.mark.parametrize("ask", [forward, backward])
async def test_a_value_beyond_all_bounds_is_refused_before_the_trunk_sees_it(round: Round, ask: Any) -> None:
    beyond = torch.full((1, 1, D), torch.finfo(torch.float32).max)
    with pytest.raises(ProtocolError, match=r"beyond 1099511627776; lower the learning rate"):
        await round.ask(ask(0, beyond))
    assert round.engine.calls == []
    await round.ask(forward(0, torch.full((1, 1, D), 2.0**40)))


def test_two_sessions_of_a_client_share_neither_token_nor_slot(worker: ThreadPoolExecutor) -> None:
    first, second = open_round(worker).session, open_round(worker).session
    assert len(first.token) == 16
    assert first.token != second.token
    assert first.slot != second.slot


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, D + 1),
        (2, 3, D - 1),
        (LIMITS.sequences + 1, 3, D),
        (2, LIMITS.tokens + 1, D),
        (0, 3, D),
        (2, 0, D),
        (2**32 - 1, 2**32 - 1, D),
        (),
        (D,),
        (2, D),
        (1, 2, 3, D),
    ],
)
@pytest.mark.parametrize("request_of", [forward, backward])
def test_a_tensor_that_the_run_does_not_allow_is_refused(request_of: Any, shape: tuple[int, ...]) -> None:
    request = request_of(0)
    tensor = request.forward.smashed if request_of is forward else request.backward.output_gradient
    tensor.shape[:] = shape
    tensor.payload_bytes = min(4 * math.prod(shape), 2**64 - 1)
    tensor.data = b""
    with pytest.raises(ProtocolError, match="came with shape"):
        Operation(request, OPEN, LIMITS)


@pytest.mark.parametrize("kind", [training_pb2.KIND_UNSPECIFIED, training_pb2.KIND_GENERATE, 99])
def test_a_forward_of_a_kind_that_is_not_served_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"kind {kind}"):
        Operation(forward(0, kind=kind), OPEN, LIMITS)


def test_a_forward_without_its_tensor_is_refused() -> None:
    request = training_pb2.TrainRequest(forward=training_pb2.Forward(kind=training_pb2.KIND_TRAIN))
    with pytest.raises(ProtocolError, match="codec"):
        Operation(request, OPEN, LIMITS)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (training_pb2.TrainRequest(chunk=b"x"), "chunk"),
        (training_pb2.TrainRequest(open=training_pb2.OpenRound()), "open"),
        (training_pb2.TrainRequest(), "nothing"),
    ],
)
def test_what_is_no_operation_is_refused(request_: training_pb2.TrainRequest, word: str) -> None:
    with pytest.raises(ProtocolError, match=f"holds {word} where an operation was due"):
        Operation(request_, OPEN, LIMITS)


@pytest.mark.parametrize(
    "intruder",
    [step(0), training_pb2.TrainRequest(number=1, chunk=b"x"), training_pb2.TrainRequest(number=0)],
)
def test_an_operation_that_is_interrupted_is_refused(intruder: training_pb2.TrainRequest) -> None:
    limits = Limits(sequences=3, tokens=1 << 10, hidden_size=1 << 8, answers=5)
    operation = Operation(forward(0, torch.zeros(3, 1 << 10, 1 << 8)), OPEN, limits)
    with pytest.raises(ProtocolError, match="Request 0 was interrupted"):
        operation.add(intruder)


def test_a_chunk_after_a_step_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Request 0 was interrupted"):
        Operation(step(0), OPEN, LIMITS).add(training_pb2.TrainRequest(number=0, chunk=b"x"))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"attention_mask": b"x" * 2}, "attention mask of 2 bytes"),
        ({"position_ids": [0, 1, 2]}, "3 position ids"),
        ({"position_ids": [0, 1, 2, 0, 1, 16]}, "below 16"),
    ],
)
async def test_a_mask_or_positions_that_do_not_fit_are_refused(round: Round, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ProtocolError, match=word):
        await round.ask(forward(0, **fields))
    assert round.engine.calls == []
