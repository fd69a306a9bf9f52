"""Bytes between agent and server, as messages have them: payloads by the codecs' own sizes, headers, framing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from splitfed.compress import Codec, get_codec
from splitfed.proto.v1 import federation_pb2, tensor_pb2, training_pb2
from splitfed.study.cost.shape import DTYPES, ModelShape
from splitfed.study.cost.workload import Workload
from splitfed.training.link import LinkCodecs, link_codecs
from splitfed.transport.counting import framed_bytes
from splitfed.transport.tensors import CHUNK_BYTES

_AGENT_ID_BYTES = 16


@dataclass(frozen=True)
class Crossing:
    """One tensor or message of a micro-batch on its way.

    Attributes:
        payload_bytes: What the codec makes of the tensor; what a link in process counts.
        wire_bytes: The same with headers and framing; what a link over gRPC counts.
    """

    payload_bytes: int
    wire_bytes: int


@dataclass(frozen=True)
class LinkCost:
    """What crosses the wire.

    Attributes:
        smashed: Smashed data of a micro-batch, up.
        trunk_output: Trunk output of a micro-batch, down.
        output_gradient: Output gradient of a micro-batch, up.
        smashed_gradient: Smashed gradient of a micro-batch, down; an empty answer where the bottom trains nothing.
        step_up: The request that ends a step.
        step_down: Its answer.
        micro_batches: Micro-batches of a step.
        step_tokens: Rows of a step, in one direction and for one tensor.
        adapter_up_bytes: The update at a round's end, framing included.
        adapter_down_bytes: What a round starts from, framing included.
    """

    smashed: Crossing
    trunk_output: Crossing
    output_gradient: Crossing
    smashed_gradient: Crossing
    step_up: Crossing
    step_down: Crossing
    micro_batches: int
    step_tokens: int
    adapter_up_bytes: int
    adapter_down_bytes: int

    @property
    def up_payload_bytes(self) -> int:
        """Payload of a step, agent to server."""
        return self.micro_batches * (self.smashed.payload_bytes + self.output_gradient.payload_bytes)

    @property
    def down_payload_bytes(self) -> int:
        """Payload of a step, server to agent."""
        return self.micro_batches * (self.trunk_output.payload_bytes + self.smashed_gradient.payload_bytes)

    @property
    def up_bytes(self) -> int:
        """Bytes of a step, agent to server, headers and framing included."""
        return (
            self.micro_batches * (self.smashed.wire_bytes + self.output_gradient.wire_bytes) + self.step_up.wire_bytes
        )

    @property
    def down_bytes(self) -> int:
        """Bytes of a step, server to agent, headers and framing included."""
        crossing_bytes = self.trunk_output.wire_bytes + self.smashed_gradient.wire_bytes
        return self.micro_batches * crossing_bytes + self.step_down.wire_bytes

    @property
    def up_bytes_per_token(self) -> float:
        """Bytes up for each row of a step."""
        return self.up_bytes / self.step_tokens

    @property
    def down_bytes_per_token(self) -> float:
        """Bytes down for each row of a step."""
        return self.down_bytes / self.step_tokens


def link_cost(
    shape: ModelShape,
    workload: Workload,
    *,
    bottom_trains: bool,
    adapter_up: Mapping[str, Sequence[int]],
    adapter_down: Mapping[str, Sequence[int]],
) -> LinkCost:
    """Add up what crosses the wire; nothing is encoded for it.

    Args:
        shape: The model.
        workload: The step.
        bottom_trains: The smashed gradient is asked for.
        adapter_up: Shapes of the update's tensors, by whole-model key.
        adapter_down: Shapes of what a round starts from.

    Guarantees:
        * Payloads are to the byte what a link in process counts.
        * With headers and framing they are what a link over gRPC counts, save the digits of running numbers.
    """
    size = workload.sequences, workload.tokens, shape.hidden_size
    codecs: LinkCodecs = link_codecs(workload.codecs)
    raw = DTYPES[shape.dtype]
    released = torch.float32 if workload.is_noisy else raw  # noise is added in float32
    number = workload.local_steps * (2 * workload.micro_batches + 1) // 2  # half-way through a round
    step = workload.local_steps // 2
    micro_batch = workload.micro_batches // 2

    def request(codec: Codec, body: str) -> Crossing:
        first, rest = _tensor(size, released, codec)
        if body == "forward":
            forward = training_pb2.Forward(
                kind=training_pb2.KIND_TRAIN,
                step=step,
                micro_batch=micro_batch,
                smashed=first,
                wants_smashed_gradient=bottom_trains,
            )
            message = training_pb2.TrainRequest(number=number, received_below=number, forward=forward)
        else:
            backward = training_pb2.Backward(step=step, micro_batch=micro_batch, output_gradient=first)
            message = training_pb2.TrainRequest(number=number, received_below=number, backward=backward)
        wire_bytes = _framed(message) + sum(_request_chunk(number, length) for length in rest)
        return Crossing(codec.encoded_bytes(size, released), wire_bytes)

    def reply(codec: Codec, body: str) -> Crossing:
        first, rest = _tensor(size, raw, codec)
        if body == "trunk_output":
            answer = training_pb2.TrunkOutput(trunk_output=first)
            message = training_pb2.TrainReply(number=number, trunk_output=answer)
        else:
            gradient = training_pb2.SmashedGradient(smashed_gradient=first)
            message = training_pb2.TrainReply(number=number, smashed_gradient=gradient)
        wire_bytes = _framed(message) + sum(_reply_chunk(number, length) for length in rest)
        return Crossing(codec.encoded_bytes(size, raw), wire_bytes)

    nothing = training_pb2.TrainReply(number=number, smashed_gradient=training_pb2.SmashedGradient())
    stepped = training_pb2.Stepped(adapter_version=step, squared_norm=1.0)
    end = training_pb2.TrainRequest(number=number, received_below=number, step=training_pb2.Step(step=step))
    return LinkCost(
        smashed=request(codecs.smashed, "forward"),
        trunk_output=reply(codecs.trunk_output, "trunk_output"),
        output_gradient=request(codecs.output_gradient, "backward"),
        smashed_gradient=reply(codecs.smashed_gradient, "gradient") if bottom_trains else Crossing(0, _framed(nothing)),
        step_up=Crossing(0, _framed(end)),
        step_down=Crossing(0, _framed(training_pb2.TrainReply(number=number, stepped=stepped))),
        micro_batches=workload.micro_batches,
        step_tokens=workload.batch_size * workload.tokens,
        adapter_up_bytes=_adapter(adapter_up, workload),
        adapter_down_bytes=_adapter(adapter_down, workload),
    )


def _adapter(shapes: Mapping[str, Sequence[int]], workload: Workload) -> int:
    codec = get_codec(workload.codecs.adapter)
    header = federation_pb2.AdapterHeader(
        run_id="run", client="agent", agent_id=bytes(_AGENT_ID_BYTES), round=1, tensors=len(shapes), tokens=1
    )
    total = _framed(federation_pb2.AdapterChunk(header=header))
    for name, size in shapes.items():
        first, rest = _tensor(size, torch.float32, codec)
        named = federation_pb2.AdapterChunk(tensor=tensor_pb2.NamedTensor(name=name, tensor=first))
        total += _framed(named, *(federation_pb2.AdapterChunk(chunk=bytes(length)) for length in rest))
    return total


def _tensor(size: Sequence[int], dtype: torch.dtype, codec: Codec) -> tuple[tensor_pb2.Tensor, list[int]]:
    """Give the first message of such a tensor, and the lengths of the chunks after it."""
    payload_bytes = codec.encoded_bytes(size, dtype)
    first = tensor_pb2.Tensor(
        shape=size,
        dtype=tensor_pb2.DTYPE_FLOAT32,
        codec=tensor_pb2.CODEC_INT8,
        payload_bytes=payload_bytes,
        data=bytes(min(payload_bytes, CHUNK_BYTES)),
    )
    rest = [min(CHUNK_BYTES, payload_bytes - at) for at in range(CHUNK_BYTES, payload_bytes, CHUNK_BYTES)]
    return first, rest


@cache
def _request_chunk(number: int, length: int) -> int:
    return _framed(training_pb2.TrainRequest(number=number, chunk=bytes(length)))


@cache
def _reply_chunk(number: int, length: int) -> int:
    return _framed(training_pb2.TrainReply(number=number, chunk=bytes(length)))


def _framed(*messages: training_pb2.TrainRequest | training_pb2.TrainReply | federation_pb2.AdapterChunk) -> int:
    return sum(framed_bytes(message) for message in messages)
