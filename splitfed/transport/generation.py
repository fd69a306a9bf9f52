"""One sequence over gRPC: rows and answers in turn, and everything once more when the stream breaks."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
from torch import Tensor

from splitfed.errors import LinkError, ProtocolError, ServerUnreachable
from splitfed.proto.v1 import generation_pb2
from splitfed.proto.v1.generation_pb2_grpc import GenerationStub
from splitfed.training.link import LinkCodecs, Traffic
from splitfed.transport.backoff import Backoff
from splitfed.transport.counting import counting_received, counting_sent, one_after_the_other
from splitfed.transport.status import error_of_call
from splitfed.transport.tensors import Expectation, IncomingTensor, to_messages

_log = logging.getLogger(__name__)

_Messages = list[generation_pb2.GenerateRequest]


class GrpcGenerationLink:
    """The link of one sequence over a stream that may break and be opened again.

    A stream that is opened again gets every message that was sent before once more, byte for byte: the server's cache
    becomes what it was, and the noise of a row is never drawn twice.

    Args:
        stub: The generation service.
        opening: Whose sequence it is, of which round, and how long it may become.
        codecs: A codec for each direction.
        retry_for_s: Seconds without progress after which a broken stream is not opened again.
        silence_s: Seconds without an answer after which a stream counts as broken.
        traffic: Where bytes are counted.
    """

    def __init__(
        self,
        stub: GenerationStub,
        opening: generation_pb2.OpenSequence,
        codecs: LinkCodecs,
        *,
        retry_for_s: float,
        silence_s: float,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic or Traffic()
        self._stub = stub
        self._opening = opening
        self._codecs = codecs
        self._silence_s = silence_s
        self._is_closed = threading.Event()
        self._backoff = Backoff(retry_for_s, sleep=self._is_closed.wait)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation-link")
        self._sent: list[_Messages] = []
        self._outgoing: SimpleQueue[_Messages | None] | None = None
        self._call: Any = None
        self._replies: Iterator[generation_pb2.GenerateReply] = iter(())

    def __enter__(self) -> "GrpcGenerationLink":
        try:
            self._worker.submit(self._persistently, [], None).result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, smashed_1TD: Tensor) -> Future[Tensor]:
        """Send the next rows; the future holds the trunk output."""
        tensor, chunks = to_messages(smashed_1TD, self._codecs.smashed)
        messages = [generation_pb2.GenerateRequest(smashed=tensor)]
        messages += [generation_pb2.GenerateRequest(chunk=chunk) for chunk in chunks]
        expected = Expectation.exactly(self._codecs.trunk_output, smashed_1TD.shape)
        return self._worker.submit(self._persistently, messages, expected)

    def close(self) -> None:
        """End the stream. An open future raises `LinkError`."""
        self._is_closed.set()
        self._end_stream()
        self._worker.shutdown()

    def _persistently(self, messages: _Messages, expected: Expectation | None) -> Any:
        """Send messages and wait for their answer; none of either: open the stream."""
        if messages:
            self._sent.append(messages)
        while True:
            try:
                answer = self._exchange(messages, expected)
            except grpc.RpcError as error:
                failure = error_of_call(error)
            except LinkError as error:
                failure = error
            else:
                self._backoff.progress()
                return answer
            self._end_stream()
            if self._is_closed.is_set():
                raise LinkError("The link was closed.") from failure
            if not isinstance(failure, ServerUnreachable):
                raise failure
            _log.info("The stream broke (%s); trying again.", failure)
            if not self._backoff.pause():
                raise ServerUnreachable(
                    f"The server did not come back after {self._backoff.tries} tries: {failure}"
                ) from failure

    def _exchange(self, messages: _Messages, expected: Expectation | None) -> Tensor | None:
        silence = threading.Timer(self._silence_s, lambda: self._call and self._call.cancel())
        silence.daemon = True
        silence.start()
        try:
            if self._outgoing is None:
                self._open_stream(answered=len(self._sent) - bool(messages))
            else:
                self._outgoing.put(messages)
            return None if expected is None else self._take_answer(expected)
        finally:
            silence.cancel()

    def _open_stream(self, *, answered: int) -> None:
        self._opening.answered = answered
        outgoing: SimpleQueue[_Messages | None] = SimpleQueue()
        outgoing.put([generation_pb2.GenerateRequest(open=self._opening)])
        self._outgoing = outgoing
        self._call = self._stub.Generate(counting_sent(one_after_the_other(outgoing), self.traffic))
        self._replies = counting_received(self._call, self.traffic)
        reply = next(self._replies, None)
        if reply is None or reply.WhichOneof("body") != "opened":
            raise ProtocolError("The server answered a sequence's opening with something else.")
        for messages in self._sent:
            outgoing.put(messages)

    def _end_stream(self) -> None:
        if self._outgoing is not None:
            self._outgoing.put(None)
            self._outgoing = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _take_answer(self, expected: Expectation) -> Tensor:
        tensor: IncomingTensor | None = None
        while tensor is None or not tensor.is_complete:
            reply = next(self._replies, None)
            if reply is None:
                raise ServerUnreachable("The server ended the stream before the sequence was over.")
            body = reply.WhichOneof("body")
            if body != ("trunk_output" if tensor is None else "chunk"):
                raise ProtocolError(f"The server answered rows with {body or 'nothing'}, out of turn.")
            if tensor is None:
                tensor = IncomingTensor(reply.trunk_output, expected)
            else:
                tensor.add(reply.chunk)
        return tensor.decode()
