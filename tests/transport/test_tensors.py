"""Tensors on the wire: what goes in comes out, and what is not expected is refused before it is allocated."""

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfed.compress import get_codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import tensor_pb2
from splitfed.transport.tensors import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Expectation,
    IncomingTensor,
    pack_mask,
    to_messages,
    unpack_mask,
    unpack_positions,
)

NONE = get_codec("none")
ANY = Expectation(NONE, (None, None, 8), (4, 16, 8))


def receive(message: tensor_pb2.Tensor, chunks: list[bytes], expected: Expectation) -> torch.Tensor:
    tensor = IncomingTensor(message, expected)
    for chunk in chunks:
        tensor.add(chunk)
    return tensor.decode()


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 8), (8, 300, 256)])
def test_a_tensor_crosses_as_its_codec_has_it(codec: str, shape: tuple[int, ...]) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    message, chunks = to_messages(sent, get_codec(codec))
    assert max(len(message.data), *map(len, chunks), 0) <= CHUNK_BYTES
    assert message.ByteSize() < MAX_MESSAGE_BYTES
    received = receive(message, chunks, Expectation.exactly(get_codec(codec), shape))
    own = get_codec(codec)
    assert torch.equal(received, own.decode(own.encode(sent), shape, sent.dtype))


def test_a_large_tensor_is_cut_into_chunks() -> None:
    message, chunks = to_messages(torch.zeros(3, 1 << 10, 1 << 8), NONE)
    assert len(message.data) == CHUNK_BYTES
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 3]},
        {"shape": [2, 3, 9]},
        {"shape": [5, 3, 8]},
        {"shape": [0, 3, 8]},
        {"shape": [2**32 - 1, 2**32 - 1, 8]},
        {"shape": [1] * 1000},
        {"dtype": tensor_pb2.DTYPE_UNSPECIFIED},
        {"codec": tensor_pb2.CODEC_INT8},
        {"codec": tensor_pb2.CODEC_UNSPECIFIED},
        {"payload_bytes": 2**63},
        {"payload_bytes": 0},
        {"data": b"x" * 1000},
    ],
)
def test_a_header_that_is_not_expected_is_refused(change: dict[str, object]) -> None:
    message, _ = to_messages(torch.zeros(2, 3, 8), NONE)
    if "shape" in change:
        del message.shape[:]
        message.shape.extend(change["shape"])  # type: ignore[arg-type]
    else:
        for name, value in change.items():
            setattr(message, name, value)
    with pytest.raises(ProtocolError):
        IncomingTensor(message, ANY)


def test_an_unknown_dtype_number_is_refused() -> None:
    message, _ = to_messages(torch.zeros(2, 3, 8), NONE)
    hostile = tensor_pb2.Tensor.FromString(message.SerializeToString().replace(b"\x10\x01", b"\x10\x63", 1))
    with pytest.raises(ProtocolError, match="dtype 99"):
        IncomingTensor(hostile, ANY)


def test_a_tensor_that_ends_early_is_refused() -> None:
    message, chunks = to_messages(torch.zeros(3, 1 << 10, 1 << 8), NONE)
    expected = Expectation.exactly(NONE, (3, 1 << 10, 1 << 8))
    with pytest.raises(ProtocolError, match="bytes early"):
        receive(message, chunks[:1], expected)


@pytest.mark.parametrize("chunk", [b"", b"x" * (CHUNK_BYTES + 1)])
def test_a_chunk_of_a_wrong_length_is_refused(chunk: bytes) -> None:
    message, _ = to_messages(torch.zeros(3, 1 << 10, 1 << 8), NONE)
    tensor = IncomingTensor(message, Expectation.exactly(NONE, (3, 1 << 10, 1 << 8)))
    with pytest.raises(ProtocolError, match="chunk"):
        tensor.add(chunk)


def test_a_chunk_past_the_end_is_refused() -> None:
    message, _ = to_messages(torch.zeros(2, 3, 8), NONE)
    tensor = IncomingTensor(message, ANY)
    with pytest.raises(ProtocolError, match="chunk"):
        tensor.add(b"x")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_worse_than_a_protocol_error(data: bytes) -> None:
    try:
        message = tensor_pb2.Tensor.FromString(data)
    except DecodeError:
        return
    with pytest.raises(ProtocolError):
        IncomingTensor(message, ANY).decode()


@given(st.integers(1, 5), st.integers(1, 20), st.randoms(use_true_random=False))
def test_a_mask_crosses_in_bits(sequences: int, tokens: int, random: object) -> None:
    mask_BT = torch.tensor([[random.randint(0, 1) for _ in range(tokens)] for _ in range(sequences)])  # type: ignore[attr-defined]
    packed = pack_mask(mask_BT)
    assert len(packed) == -(-sequences * tokens // 8)
    assert torch.equal(unpack_mask(packed, sequences, tokens), mask_BT)  # type: ignore[arg-type]


def test_no_mask_is_no_bytes() -> None:
    assert pack_mask(None) == b""
    assert unpack_mask(b"", 2, 3) is None


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ProtocolError, match="mask"):
        unpack_mask(b"xx", 2, 3)


@pytest.mark.parametrize("positions", [[1], [0, 1, 2, 3, 4, 99]])
def test_positions_that_do_not_fit_are_refused(positions: list[int]) -> None:
    with pytest.raises(ProtocolError, match="position"):
        unpack_positions(positions, 2, 3, limit=16)
