"""Adapters on the wire: what goes in comes out, and what this run does not train stays out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfed.compress import get_codec
from splitfed.errors import ProtocolError
from splitfed.proto.v1 import federation_pb2, tensor_pb2
from splitfed.transport.adapters import IncomingAdapter, adapter_messages
from splitfed.transport.tensors import CHUNK_BYTES, MAX_MESSAGE_BYTES

NONE = get_codec("none")
LARGE, SMALL = "model.layers.0.mlp.lora_A.weight", "model.layers.3.q_proj.lora_B.weight"
SHAPES = {LARGE: (600, 1000), SMALL: (4, 6)}


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sent(codec: str = "none") -> list[federation_pb2.AdapterChunk]:
    """What carries the state: a header, the large factor in three messages, the small one in one."""
    header = federation_pb2.AdapterHeader(run_id="r", client="a", round=1)
    return list(adapter_messages(header, state(), get_codec(codec)))


def receive(messages: list[federation_pb2.AdapterChunk], codec: str = "none") -> dict[str, Tensor]:
    incoming = IncomingAdapter(SHAPES, get_codec(codec))
    for message in messages:
        incoming.add(message)
    return incoming.state()


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
def test_an_adapter_crosses_as_its_codec_has_it(codec: str) -> None:
    received = receive(sent(codec)[1:], codec)
    own = get_codec(codec)
    assert received.keys() == SHAPES.keys()
    for name, tensor in state().items():
        assert torch.equal(received[name], own.decode(own.encode(tensor), tuple(tensor.shape), tensor.dtype))


def test_an_adapter_of_half_precision_comes_back_in_full() -> None:
    halves = {name: tensor.bfloat16() for name, tensor in state().items()}
    messages = list(adapter_messages(federation_pb2.AdapterHeader(), halves, NONE))
    received = receive(messages[1:])
    assert all(tensor.dtype is torch.float32 for tensor in received.values())
    assert all(torch.equal(received[name], tensor.float()) for name, tensor in halves.items())


def test_the_header_comes_first_and_counts_the_factors() -> None:
    header, *rest = sent()
    assert header.WhichOneof("body") == "header"
    assert (header.header.run_id, header.header.tensors) == ("r", 2)
    assert [message.WhichOneof("body") for message in rest] == ["tensor", "chunk", "chunk", "tensor"]


def test_no_message_is_larger_than_a_chunk_and_its_frame() -> None:
    assert max(message.ByteSize() for message in sent()) < CHUNK_BYTES + 1024 < MAX_MESSAGE_BYTES


def test_an_adapter_without_factors_is_a_header_alone() -> None:
    messages = list(adapter_messages(federation_pb2.AdapterHeader(), {}, NONE))
    assert len(messages) == 1
    assert IncomingAdapter({}, NONE).state() == {}


def test_a_factor_that_the_run_does_not_train_is_refused() -> None:
    messages = sent()[1:]
    messages[0].tensor.name = "model.embed_tokens.weight"
    with pytest.raises(ProtocolError, match=r"'model\.embed_tokens\.weight' came although"):
        receive(messages)


def test_a_factor_that_comes_twice_is_refused() -> None:
    messages = sent()[1:]
    with pytest.raises(ProtocolError, match="came twice"):
        receive([*messages, messages[-1]])


def test_a_factor_that_does_not_come_is_named() -> None:
    with pytest.raises(ProtocolError, match=f"1 factors .* {SMALL!r} among them"):
        receive(sent()[1:-1])


def test_a_factor_that_is_cut_short_is_refused() -> None:
    large = sent()[1:-1]
    incoming = IncomingAdapter({LARGE: SHAPES[LARGE]}, NONE)
    for message in large[:-1]:
        incoming.add(message)
    with pytest.raises(ProtocolError, match="bytes early"):
        incoming.state()


def test_a_factor_before_the_one_before_it_is_whole_is_refused() -> None:
    _, *large, small = sent()
    with pytest.raises(ProtocolError, match="holds tensor where another message was due"):
        receive([*large[:-1], small])


def test_a_factor_of_another_shape_is_refused() -> None:
    messages = sent()[1:]
    messages[-1].tensor.tensor.shape[:] = [6, 4]
    with pytest.raises(ProtocolError, match=r"shape \[6, 4\]; expected \[4, 6\]"):
        receive(messages)


def test_a_factor_in_another_codec_is_refused() -> None:
    with pytest.raises(ProtocolError, match="agreed on 'none'"):
        receive(sent("int8")[1:])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, federation_pb2.AdapterChunk(chunk=b"x")),
        (4, federation_pb2.AdapterChunk(chunk=b"x")),
        (0, federation_pb2.AdapterChunk()),
        (1, federation_pb2.AdapterChunk()),
        (1, federation_pb2.AdapterChunk(header=federation_pb2.AdapterHeader())),
    ],
)
def test_a_message_out_of_place_is_refused(place: int, message: federation_pb2.AdapterChunk) -> None:
    messages = sent()[1:]
    messages.insert(place, message)
    with pytest.raises(ProtocolError, match="where another message was due"):
        receive(messages)


@pytest.mark.parametrize("chunk", [b"", b"x" * (CHUNK_BYTES + 1)])
def test_a_chunk_of_a_wrong_length_is_refused(chunk: bytes) -> None:
    messages = sent()[1:]
    messages[1].chunk = chunk
    with pytest.raises(ProtocolError, match="chunk of"):
        receive(messages)


def test_a_long_name_is_not_repeated_in_full() -> None:
    stranger = federation_pb2.AdapterChunk(tensor=tensor_pb2.NamedTensor(name="x" * 100_000))
    with pytest.raises(ProtocolError) as refused:
        receive([stranger])
    assert len(str(refused.value)) < 300


@given(st.lists(st.integers(0, 3), max_size=6))
def test_messages_in_any_order_give_the_whole_adapter_or_a_protocol_error(places: list[int]) -> None:
    messages = sent()[1:]
    try:
        received = receive([messages[place] for place in places])
    except ProtocolError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in received.items()} == SHAPES
