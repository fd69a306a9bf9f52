"""Tensors to messages and back: chunked on the way out, checked before a byte is allocated on the way in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitfed.compress import Codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import tensor_pb2

CHUNK_BYTES = 1 << 20
"""Most payload in one message."""

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's limit on a message, in both directions."""

_DTYPE_TO_WIRE = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
}
_DTYPE_FROM_WIRE = {wire: dtype for dtype, wire in _DTYPE_TO_WIRE.items()}
_CODEC_TO_WIRE = {
    "none": tensor_pb2.CODEC_NONE,
    "bf16": tensor_pb2.CODEC_BF16,
    "fp16": tensor_pb2.CODEC_FP16,
    "int8": tensor_pb2.CODEC_INT8,
}


@dataclass(frozen=True)
class Expectation:
    """What a tensor from the other side must be.

    Attributes:
        codec: The codec that was agreed for its direction.
        shape: Its shape; None stands for any size from 1 up to the limit beside it.
        limits: Largest size per dimension, where the shape does not fix it.
    """

    codec: Codec
    shape: tuple[int | None, ...]
    limits: tuple[int, ...]

    @classmethod
    def exactly(cls, codec: Codec, shape: Sequence[int]) -> "Expectation":
        """Expect one shape."""
        return cls(codec, tuple(shape), tuple(shape))


def codec_on_wire(codec: Codec) -> tensor_pb2.Codec:
    """Give a codec's number on the wire."""
    return _CODEC_TO_WIRE[codec.name]


def codecs_on_wire() -> list[tensor_pb2.Codec]:
    """List the numbers of all codecs that this version speaks."""
    return list(_CODEC_TO_WIRE.values())


def to_messages(tensor: Tensor, codec: Codec) -> tuple[tensor_pb2.Tensor, list[bytes]]:
    """Encode a tensor for the wire.

    Args:
        tensor: Any shape, floating point.
        codec: Codec of its direction.

    Returns:
        The message with the header and the first chunk, and the chunks that follow it.

    Raises:
        ValueError: If the codec refuses the tensor, such as int8 a NaN.
    """
    payload = memoryview(codec.encode(tensor.detach().cpu().contiguous())).cast("B")
    message = tensor_pb2.Tensor(
        shape=tensor.shape,
        dtype=_DTYPE_TO_WIRE[tensor.dtype],
        codec=codec_on_wire(codec),
        payload_bytes=len(payload),
        data=bytes(payload[:CHUNK_BYTES]),
    )
    return message, [bytes(payload[at : at + CHUNK_BYTES]) for at in range(CHUNK_BYTES, len(payload), CHUNK_BYTES)]


class IncomingTensor:
    """A tensor that arrives in chunks.

    Args:
        message: The message with the header and the first chunk.
        expected: What it must be.

    Raises:
        ProtocolError: If the header is not what is expected. Nothing has been allocated then.
    """

    def __init__(self, message: tensor_pb2.Tensor, expected: Expectation) -> None:
        self._codec = expected.codec
        self._shape, self._dtype = _check_header(message, expected)
        self._buffer: bytearray | bytes
        if len(message.data) == message.payload_bytes:
            self._buffer = message.data
            self._missing = 0
        else:
            self._buffer = bytearray(message.payload_bytes)
            self._missing = message.payload_bytes
            self.add(message.data)

    @property
    def is_complete(self) -> bool:
        """All bytes are here."""
        return self._missing == 0

    def add(self, chunk: bytes) -> None:
        """Take the next chunk.

        Raises:
            ProtocolError: If it is empty, larger than a chunk may be, or longer than what is missing.
        """
        if not 0 < len(chunk) <= min(CHUNK_BYTES, self._missing):
            raise ProtocolError(
                f"A chunk of {len(chunk)} bytes came where 1 to {min(CHUNK_BYTES, self._missing)} were expected."
            )
        assert isinstance(self._buffer, bytearray)
        start = len(self._buffer) - self._missing
        self._buffer[start : start + len(chunk)] = chunk
        self._missing -= len(chunk)

    def decode(self) -> Tensor:
        """Decode the complete tensor.

        Raises:
            ProtocolError: If it is not complete, or its payload is damaged.
        """
        if not self.is_complete:
            raise ProtocolError(f"A tensor ended {self._missing} bytes early.")
        try:
            return self._codec.decode(self._buffer, self._shape, self._dtype)
        except ValueError as error:
            raise ProtocolError(f"A tensor of shape {list(self._shape)} could not be decoded: {error}") from error


def pack_mask(mask_BT: Tensor | None) -> bytes:
    """Pack an attention mask into bits, row-major; nothing for no mask."""
    if mask_BT is None:
        return b""
    return np.packbits(mask_BT.cpu().numpy().astype(bool)).tobytes()


def unpack_mask(packed: bytes, sequences: int, tokens: int) -> Tensor | None:
    """Unpack an attention mask, shape [B, T], int64 zeros and ones.

    Raises:
        ProtocolError: If its length does not fit.
    """
    if not packed:
        return None
    if len(packed) != (sequences * tokens + 7) // 8:
        raise ProtocolError(f"An attention mask of {len(packed)} bytes came for {sequences} × {tokens} positions.")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=sequences * tokens)
    return torch.from_numpy(bits.astype(np.int64)).view(sequences, tokens)


def unpack_positions(positions: Sequence[int], sequences: int, tokens: int, limit: int) -> Tensor | None:
    """Unpack position ids, shape [B, T].

    Raises:
        ProtocolError: If their number does not fit, or one reaches the limit.
    """
    if not positions:
        return None
    if len(positions) != sequences * tokens or max(positions) >= limit:
        raise ProtocolError(
            f"{len(positions)} position ids up to {max(positions)} came for {sequences} × {tokens} positions below "
            f"{limit}."
        )
    return torch.tensor(list(positions), dtype=torch.int64).view(sequences, tokens)


def _check_header(message: tensor_pb2.Tensor, expected: Expectation) -> tuple[tuple[int, ...], torch.dtype]:
    if message.codec != codec_on_wire(expected.codec):
        raise ProtocolError(f"A tensor came with codec {message.codec}; the run agreed on {expected.codec.name!r}.")
    if message.dtype not in _DTYPE_FROM_WIRE:
        raise ProtocolError(f"A tensor came with the unknown dtype {message.dtype}.")
    dtype = _DTYPE_FROM_WIRE[message.dtype]
    shape = tuple(message.shape)
    fits = len(shape) == len(expected.shape) and all(
        size == fixed if fixed is not None else 1 <= size <= limit
        for size, fixed, limit in zip(shape, expected.shape, expected.limits, strict=True)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in expected.shape]
        raise ProtocolError(
            f"A tensor came with shape {list(shape)[:8]}; expected {wanted}, at most {list(expected.limits)}."
        )
    payload_bytes = expected.codec.encoded_bytes(shape, dtype) if math.prod(shape) else 0
    if message.payload_bytes != payload_bytes or len(message.data) > payload_bytes or len(message.data) > CHUNK_BYTES:
        raise ProtocolError(
            f"A tensor of shape {list(shape)} came with {message.payload_bytes} bytes, {len(message.data)} of them in "
            f"its first message; {payload_bytes} were expected, at most {CHUNK_BYTES} in a message."
        )
    return shape, dtype
