"""Measure what a request takes beside its computation: a tiny model's local steps, over the link that agents use.

A server of one client stands in for the daemon: the same trunk, the same messages, the same threads between them, and
nothing of rounds and members.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from torch import Tensor
from transformers import PreTrainedModel

from splitfed.compress import Codec
from splitfed.config import CodecSection, TrainingSection
from splitfed.config.device import DeviceProfile, LinkSection
from splitfed.models import LoraSettings, adapter_state, add_adapter, partition
from splitfed.proto.v1 import tensor_pb2, training_pb2, training_pb2_grpc
from splitfed.study.cost.costs import cost_of
from splitfed.study.cost.shape import model_shape
from splitfed.study.cost.timing import step_time
from splitfed.study.cost.workload import SplitPoint, Workload
from splitfed.study.profile_link import round_trip_s
from splitfed.training.client_step import ClientTrainer
from splitfed.training.data import Example
from splitfed.training.link import link_codecs
from splitfed.training.releases import OpenReleases
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.transport.backoff import Backoff
from splitfed.transport.channel import SERVER_OPTIONS, open_channel
from splitfed.transport.link import GrpcLink
from splitfed.transport.tensors import Expectation, IncomingTensor, to_messages

R = TypeVar("R")

_TOKENS: Final = 8
_STEPS: Final = 200
_WARM_UP: Final = 5
_ENOUGH_S: Final = 1.5
_PATIENCE_S: Final = 60.0
_CLIENT: Final = "profile"
_LORA: Final = LoraSettings()
_CODECS: Final = CodecSection()


def request_s(model: PreTrainedModel, profile: DeviceProfile) -> float:
    """Measure what a request takes at one end, in seconds, beside its computation and the way.

    Args:
        model: A tiny model of three blocks or more; it is cut up and trained.
        profile: What is known of the device: says what the computation takes.
    """
    training = TrainingSection(batch_size=1, max_tokens=_TOKENS, local_steps=_WARM_UP + _STEPS)
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    for segment in (parts.bottom, parts.trunk, parts.top):
        add_adapter(segment, _LORA, seed=0)
    trainer = TrunkTrainer(parts.trunk, training, seed=0)
    trainer.open_round(_CLIENT, 1, adapter_state(parts.trunk), {})
    client = ClientTrainer(parts.bottom, parts.top, training, OpenReleases(), client=_CLIENT, seed=0, pad_token_id=0)
    with _serving(_OneClient(trainer)) as address, closing(open_channel(address, None)) as channel:
        latency_s = round_trip_s(health_pb2_grpc.HealthStub(channel))
        measured_s = _step_s(client, training_pb2_grpc.TrainingStub(channel), training)
    workload = Workload(batch_size=1, tokens=_TOKENS, lora=_LORA, codecs=_CODECS)
    costs = cost_of(model_shape(model.config), SplitPoint(1, 1), workload)
    link = LinkSection(up_bits_per_s=1e13, down_bits_per_s=1e13, latency_s=latency_s)

    def predicted_s(each_s: float) -> float:
        device = profile.model_copy(update={"compute": profile.compute.model_copy(update={"request_s": each_s})})
        return step_time(costs, device, device, link).step_s

    at_once_s = predicted_s(0.0)
    in_a_row = predicted_s(1.0) - at_once_s  # how many ends of requests a step waits for, one after the other
    return max(measured_s - at_once_s, 0.0) / in_a_row


def _step_s(client: ClientTrainer, stub: training_pb2_grpc.TrainingStub, training: TrainingSection) -> float:
    """Give the seconds of the fastest local step."""
    opening = training_pb2.OpenRound(client=_CLIENT, round=1)
    took_s: list[float] = []
    example = Example(list(range(_TOKENS)), list(range(_TOKENS)), "")
    with GrpcLink(stub, opening, link_codecs(_CODECS), backoff=Backoff(_PATIENCE_S), silence_s=_PATIENCE_S) as link:
        for step in range(training.local_steps):
            started_s = time.perf_counter()
            client.step(link, [example], round=1, step=step)
            took_s.append(time.perf_counter() - started_s)
            if sum(took_s) > _ENOUGH_S and step > _WARM_UP:
                break
    return min(took_s[_WARM_UP:])


class _OneClient(training_pb2_grpc.TrainingServicer):
    """Serves one client's stream as a daemon does: a thread for the trunk, others that decode and encode.

    Args:
        trainer: The trunk, with the client's round open.
    """

    def __init__(self, trainer: TrunkTrainer) -> None:
        self._trainer = trainer
        self._engine = ThreadPoolExecutor(1)
        self._worker = ThreadPoolExecutor(2)
        self._codecs = link_codecs(_CODECS)

    async def Train(  # noqa: N802 - gRPC names the methods
        self, request_iterator: AsyncIterator[training_pb2.TrainRequest], context: Any
    ) -> AsyncIterator[training_pb2.TrainReply]:
        async for request in request_iterator:
            if request.HasField("open"):
                yield training_pb2.TrainReply(opened=training_pb2.Opened(session=b"profile"))
            elif request.HasField("step"):
                yield training_pb2.TrainReply(number=request.number, stepped=await self._step(request.step))
            elif request.HasField("forward"):
                output = training_pb2.TrunkOutput(trunk_output=await self._forward(request.forward))
                yield training_pb2.TrainReply(number=request.number, trunk_output=output)
            else:
                gradient = training_pb2.SmashedGradient(smashed_gradient=await self._backward(request.backward))
                yield training_pb2.TrainReply(number=request.number, smashed_gradient=gradient)

    async def _forward(self, asked: training_pb2.Forward) -> tensor_pb2.Tensor:
        smashed_BTD = await self._decoded(asked.smashed, self._codecs.smashed)
        call = TrunkForward(_CLIENT, asked.step, asked.micro_batch, smashed_BTD, wants_smashed_gradient=True)
        (output_BTD,) = await _in(self._engine, lambda: self._trainer.forward_together([call]))
        return await self._encoded(output_BTD, self._codecs.trunk_output)

    async def _backward(self, asked: training_pb2.Backward) -> tensor_pb2.Tensor:
        given_BTD = await self._decoded(asked.output_gradient, self._codecs.output_gradient)
        call = TrunkBackward(_CLIENT, asked.step, asked.micro_batch, given_BTD)
        (gradient_BTD,) = await _in(self._engine, lambda: self._trainer.backward_together([call]))
        return await self._encoded(gradient_BTD, self._codecs.smashed_gradient)

    async def _step(self, asked: training_pb2.Step) -> training_pb2.Stepped:
        applied = await _in(self._engine, lambda: self._trainer.step(_CLIENT, asked.step))
        return training_pb2.Stepped(adapter_version=applied.version, squared_norm=applied.squared_norm)

    async def _decoded(self, message: tensor_pb2.Tensor, codec: Codec) -> Tensor:
        incoming = IncomingTensor(message, Expectation.exactly(codec, message.shape))
        return await _in(self._worker, incoming.decode)

    async def _encoded(self, tensor: Any, codec: Codec) -> tensor_pb2.Tensor:
        message, _ = await _in(self._worker, lambda: to_messages(tensor, codec))
        return message

    def close(self) -> None:
        """End its threads."""
        self._engine.shutdown()
        self._worker.shutdown()


async def _in(pool: ThreadPoolExecutor, work: Callable[[], R]) -> R:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


@contextmanager
def _serving(service: _OneClient) -> Iterator[str]:
    """Serve on loopback, in a thread with an event loop; gives the address."""
    addresses: SimpleQueue[str] = SimpleQueue()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        server = aio.server(options=SERVER_OPTIONS)
        training_pb2_grpc.add_TrainingServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
        addresses.put(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        await over.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="profile-server", daemon=True)
    thread.start()
    try:
        yield addresses.get()
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
        service.close()
