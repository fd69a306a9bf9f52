"""The link over gRPC: numbered requests on one stream, several at once, sent again when the stream breaks."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import grpc
from torch import Tensor

from splitfed.errors import LinkError, ProtocolError, RoundLost, ServerUnreachable, SplitFedError
from splitfed.proto.v1 import training_pb2
from splitfed.proto.v1.training_pb2_grpc import TrainingStub
from splitfed.training.link import Kind, LinkCodecs, Place, Traffic
from splitfed.transport.backoff import Backoff
from splitfed.transport.counting import counting_received, counting_sent, one_after_the_other
from splitfed.transport.status import error_of_call
from splitfed.transport.tensors import Expectation, IncomingTensor, pack_mask, to_messages

KIND_TO_WIRE = {
    Kind.TRAIN: training_pb2.KIND_TRAIN,
    Kind.EVALUATE: training_pb2.KIND_EVALUATE,
    Kind.GENERATE: training_pb2.KIND_GENERATE,
}

MeanGradient = Callable[[int, Mapping[str, Tensor], int], dict[str, Tensor]]

_log = logging.getLogger(__name__)


@dataclass
class _Request:
    """A request that waits for its answer, kept as it was sent, noise and all."""

    messages: list[training_pb2.TrainRequest]
    future: Future[Any]
    answer: str
    expected: Expectation | None


class GrpcLink:
    """One client's side of one round, over a stream that may break and be opened again.

    A broken stream is opened anew and every unanswered request is sent again, byte for byte: the server answers what it
    has applied before, and the noise of a release is never drawn twice.

    Args:
        stub: The training service.
        opening: Who opens which round of which run.
        codecs: A codec for each direction.
        backoff: When to try again, and when to give up.
        silence_s: Seconds without any answer after which an open request counts as lost.
        is_joint: Local steps are joint: the server needs to know what each agent counts for.
        mean_gradient: Given a step, gradients of bottom and top and their tokens, gives the cohort's mean; none: bottom
            and top are not merged at every step.
        traffic: Where bytes are counted.
    """

    def __init__(
        self,
        stub: TrainingStub,
        opening: training_pb2.OpenRound,
        codecs: LinkCodecs,
        *,
        backoff: Backoff,
        silence_s: float,
        is_joint: bool = False,
        mean_gradient: MeanGradient | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic or Traffic()
        self._stub = stub
        self._opening = opening
        self._codecs = codecs
        self._backoff = backoff
        self._silence_s = silence_s
        self._is_joint = is_joint
        self._mean_gradient = mean_gradient
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="link-mean")
        self._lock = threading.Lock()
        self._pending: OrderedDict[int, _Request] = OrderedDict()
        self._next_number = 0
        self._outgoing: SimpleQueue[list[training_pb2.TrainRequest] | None] | None = None
        self._call: Any = None
        self._failure: SplitFedError | None = None
        self._is_closed = threading.Event()
        self._is_silent = False
        self._last_answer_s = time.monotonic()
        self._threads = [
            threading.Thread(target=self._run, name="link", daemon=True),
            threading.Thread(target=self._watch_for_silence, name="link-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "GrpcLink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(
        self,
        place: Place,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        wants_smashed_gradient: bool = False,
        step_tokens: int = 0,
    ) -> Future[Tensor]:
        """Send smashed data; the future holds the trunk output."""
        tensor, chunks = to_messages(smashed_BTD, self._codecs.smashed)
        forward = training_pb2.Forward(
            kind=KIND_TO_WIRE[place.kind],
            step=place.step,
            micro_batch=place.micro_batch,
            smashed=tensor,
            attention_mask=pack_mask(attention_mask_BT),
            position_ids=[] if position_ids_BT is None else position_ids_BT.flatten().tolist(),
            wants_smashed_gradient=wants_smashed_gradient,
            step_tokens=step_tokens if self._is_joint else 0,
        )
        expected = Expectation.exactly(self._codecs.trunk_output, smashed_BTD.shape)
        return self._send(training_pb2.TrainRequest(forward=forward), chunks, "trunk_output", expected)

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        """Send the output gradient; the future holds the smashed gradient if the forward asked for it."""
        tensor, chunks = to_messages(output_gradient_BTD, self._codecs.output_gradient)
        backward = training_pb2.Backward(step=place.step, micro_batch=place.micro_batch, output_gradient=tensor)
        expected = Expectation.exactly(self._codecs.smashed_gradient, output_gradient_BTD.shape)
        return self._send(training_pb2.TrainRequest(backward=backward), chunks, "smashed_gradient", expected)

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        """Ask for the gradients of a local step to be applied; the future holds their squared norm."""
        request = training_pb2.TrainRequest(step=training_pb2.Step(step=step, squared_norm=squared_norm))
        return self._send(request, [], "stepped", None)

    def mean_gradient(self, step: int, gradients: Mapping[str, Tensor], *, tokens: int) -> Future[dict[str, Tensor]]:
        """Send gradients of bottom and top beside the stream; the future holds the cohort's mean."""
        if self._mean_gradient is None:
            raise ProtocolError("This run does not merge bottom and top at every step.")
        return self._beside.submit(self._mean_gradient, step, gradients, tokens)

    def close(self) -> None:
        """End the stream. Open futures raise `LinkError`."""
        self._is_closed.set()
        self._beside.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._outgoing is not None:
                self._outgoing.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        if self._call is not None:
            self._call.cancel()
        self._fail(LinkError("The link was closed."))

    def _send(
        self, request: training_pb2.TrainRequest, chunks: list[bytes], answer: str, expected: Expectation | None
    ) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            request.number = self._next_number
            self._next_number += 1
            messages = [request, *(training_pb2.TrainRequest(number=request.number, chunk=chunk) for chunk in chunks)]
            if not self._pending:
                self._last_answer_s = time.monotonic()
            self._pending[request.number] = _Request(messages, future, answer, expected)
            request.received_below = next(iter(self._pending))
            if self._outgoing is not None:
                self._outgoing.put(messages)
        return future

    def _run(self) -> None:
        """Keep a stream open until the link is closed or the round is lost."""
        while not self._is_closed.is_set():
            try:
                self._follow_stream()
                failure: SplitFedError = ServerUnreachable("The server ended the stream before the round was over.")
            except grpc.RpcError as error:
                failure = error_of_call(error)
            except SplitFedError as error:
                failure = error
            finally:
                with self._lock:
                    self._outgoing = None
                    was_silent, self._is_silent = self._is_silent, False
            if self._is_closed.is_set():
                return
            if not isinstance(failure, ServerUnreachable):
                self._fail(failure)
                return
            if was_silent:
                failure = ServerUnreachable(f"no answer for {self._silence_s:.0f} s")
            _log.info("The stream broke (%s); trying again.", str(failure).rstrip("."))
            if not self._backoff.pause():
                self._fail(
                    ServerUnreachable(f"The server did not come back after {self._backoff.tries} tries: {failure}")
                )
                return

    def _follow_stream(self) -> None:
        outgoing: SimpleQueue[list[training_pb2.TrainRequest] | None] = SimpleQueue()
        outgoing.put([training_pb2.TrainRequest(open=self._opening)])
        self._call = self._stub.Train(counting_sent(one_after_the_other(outgoing), self.traffic))
        try:
            replies = counting_received(self._call, self.traffic)
            self._take_opening(next(replies, None))
            with self._lock:
                for request in self._pending.values():
                    request.messages[0].received_below = next(iter(self._pending))
                    outgoing.put(request.messages)
                self._outgoing = outgoing
                self._last_answer_s = time.monotonic()
            if self._is_closed.is_set():
                outgoing.put(None)
            for reply in replies:
                self._take_answer(reply, replies)
        finally:
            outgoing.put(None)

    def _take_opening(self, reply: training_pb2.TrainReply | None) -> None:
        if reply is None or reply.WhichOneof("body") != "opened" or not reply.opened.session:
            raise ProtocolError("The server answered a stream's opening with something else.")
        if self._opening.session and reply.opened.session != self._opening.session:
            raise RoundLost("The server no longer knows this round's beginning.")
        self._opening.session = reply.opened.session

    def _take_answer(self, reply: training_pb2.TrainReply, replies: Iterator[training_pb2.TrainReply]) -> None:
        number, body = reply.number, reply.WhichOneof("body")
        request = self._pending.get(number)
        if request is None or body != request.answer or number != next(iter(self._pending)):
            raise ProtocolError(f"The server answered request {number} with {body or 'nothing'}, out of turn.")
        value: Tensor | float | None = None
        if body == "stepped":
            value = reply.stepped.squared_norm
        elif body == "trunk_output":
            value = _collect(reply.trunk_output.trunk_output, request.expected, replies)
        elif body == "smashed_gradient" and reply.smashed_gradient.HasField("smashed_gradient"):
            value = _collect(reply.smashed_gradient.smashed_gradient, request.expected, replies)
        with self._lock:
            del self._pending[number]
            self._last_answer_s = time.monotonic()
        self._backoff.progress()
        request.future.set_result(value)

    def _watch_for_silence(self) -> None:
        while not self._is_closed.wait(min(self._silence_s / 4, 5.0)):
            with self._lock:
                is_silent = bool(self._pending) and time.monotonic() - self._last_answer_s > self._silence_s
                if is_silent:
                    self._last_answer_s = time.monotonic()
                    self._is_silent = self._call is not None
            if is_silent and self._call is not None:
                self._call.cancel()

    def _fail(self, failure: SplitFedError) -> None:
        with self._lock:
            self._failure = self._failure or failure
            pending = list(self._pending.values())
            self._pending.clear()
        for request in pending:
            request.future.set_exception(failure)


def _collect(message: Any, expected: Expectation | None, replies: Iterator[training_pb2.TrainReply]) -> Tensor:
    assert expected is not None
    tensor = IncomingTensor(message, expected)
    while not tensor.is_complete:
        reply = next(replies, None)
        if reply is None:
            raise ServerUnreachable("The server ended the stream inside a tensor.")
        if reply.WhichOneof("body") != "chunk":
            raise ProtocolError("A tensor's chunks were interrupted by another answer.")
        tensor.add(reply.chunk)
    return tensor.decode()
