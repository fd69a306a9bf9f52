"""Adapters to messages and back: a header, then tensor after tensor by its whole-model name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from torch import Tensor

from splitfed.compress import Codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import federation_pb2, tensor_pb2
from splitfed.transport.tensors import Expectation, IncomingTensor, to_messages

RESIDUAL: Final = "residual/"
"""What the name of a frozen adapter's factor begins with, where a round starts from one besides the trained one."""


def adapter_messages(
    header: federation_pb2.AdapterHeader, state: Mapping[str, Tensor], codec: Codec
) -> Iterator[federation_pb2.AdapterChunk]:
    """Give the messages that carry an adapter.

    Args:
        header: Whose adapter it is; the number of tensors is filled in here.
        state: LoRA factors by whole-model name.
        codec: Codec of adapters in this run.
    """
    header.tensors = len(state)
    yield federation_pb2.AdapterChunk(header=header)
    for name in sorted(state):
        first, rest = to_messages(state[name], codec)
        yield federation_pb2.AdapterChunk(tensor=tensor_pb2.NamedTensor(name=name, tensor=first))
        for chunk in rest:
            yield federation_pb2.AdapterChunk(chunk=chunk)


class IncomingAdapter:
    """An adapter that arrives message by message.

    Args:
        shapes: Shape of each factor that must come, by whole-model name.
        codec: Codec of adapters in this run.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], codec: Codec) -> None:
        self._shapes = shapes
        self._codec = codec
        self._tensors: dict[str, IncomingTensor] = {}
        self._open: IncomingTensor | None = None

    def add(self, message: federation_pb2.AdapterChunk) -> None:
        """Take the next message after the header.

        Raises:
            ProtocolError: If it is not a factor of this adapter, comes twice, or comes out of order.
        """
        body = message.WhichOneof("body")
        if body == "chunk" and self._open is not None and not self._open.is_complete:
            self._open.add(message.chunk)
            return
        if body != "tensor" or (self._open is not None and not self._open.is_complete):
            raise ProtocolError(f"An adapter's stream holds {body or 'nothing'} where another message was due.")
        name = message.tensor.name
        if name not in self._shapes or name in self._tensors:
            reason = "twice" if name in self._tensors else "although this run does not train it"
            raise ProtocolError(f"The factor {name[:200]!r} came {reason}.")
        self._open = IncomingTensor(message.tensor.tensor, Expectation.exactly(self._codec, self._shapes[name]))
        self._tensors[name] = self._open

    def state(self) -> dict[str, Tensor]:
        """Decode the complete adapter, float32, by whole-model name.

        Raises:
            ProtocolError: If a factor is missing or cut short.
        """
        missing = sorted(set(self._shapes) - set(self._tensors))
        if missing:
            raise ProtocolError(f"{len(missing)} factors of the adapter did not come, {missing[0]!r} among them.")
        return {name: tensor.decode().float() for name, tensor in self._tensors.items()}
