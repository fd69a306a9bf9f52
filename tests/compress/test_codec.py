"""One contract for every codec of the table."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.compress import CODECS, get_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1,), (7,), (64,), (65,), (2, 3, 1), (2, 3, 63), (2, 3, 64), (2, 3, 130), (1, 1, 1, 1, 1, 1, 1, 3)]


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return get_codec(request.param)


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_an_unknown_codec_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match=r"no codec 'zip'; choose one of none, bf16, fp16, int8"):
        get_codec("zip")


def test_each_codec_is_found_by_the_name_it_carries(codec):
    assert get_codec(codec.name) is codec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_payload_has_exactly_the_size_that_was_announced(codec, shape, dtype):
    payload = codec.encode(normal(shape, dtype))
    assert len(payload) == codec.encoded_bytes(shape, dtype)
    assert len(bytes(payload)) == len(payload)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_tensor_has_shape_dtype_and_nearly_the_values(codec, shape, dtype):
    x = normal(shape, dtype)
    decoded = codec.decode(bytes(codec.encode(x)), shape, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    assert decoded.is_contiguous()
    torch.testing.assert_close(decoded.double(), x.double(), rtol=2**-7, atol=x.double().abs().max().item() / 253)


def test_float32_is_what_decode_gives_unless_told(codec):
    assert codec.decode(codec.encode(normal((2, 64))), (2, 64)).dtype == torch.float32


def test_bytes_bytearray_and_memoryview_decode_alike(codec):
    payload = bytes(codec.encode(normal((3, 70))))
    decoded = [codec.decode(kind(payload), (3, 70)) for kind in (bytes, bytearray, memoryview)]
    assert all(torch.equal(decoded[0], other) for other in decoded[1:])


def test_same_tensor_gives_the_same_bytes_whatever_its_layout(codec):
    x = normal((5, 6, 70))
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert bytes(codec.encode(transposed)) == bytes(codec.encode(x.clone().requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_and_tensors_share_no_memory(codec, dtype):
    x = normal((2, 64), dtype)
    payload = codec.encode(x)
    before = hashlib.sha256(payload).digest()
    x.zero_()
    assert hashlib.sha256(payload).digest() == before
    codec.decode(payload, (2, 64), dtype).zero_()
    assert hashlib.sha256(payload).digest() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_is_refused_by_encode(codec, dtype, value):
    for position in (0, 63, 64, 129):
        x = normal((1, 130), dtype)
        x[0, position] = value
        with pytest.raises(ValueError, match="NaN or an infinite"):
            codec.encode(x)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 4), (-1, 4), (2, -4), (2.0, 4), (True, 4), ("8",), (1,) * 9])
def test_a_shape_that_no_tensor_has_is_refused(codec, shape):
    with pytest.raises(ValueError, match="cannot be sent"):
        codec.encoded_bytes(shape)
    with pytest.raises(ValueError, match="cannot be sent"):
        codec.decode(b"\0" * 64, shape)


@pytest.mark.parametrize("shape", [(2**33,), (2**31, 2**31, 2**31), (10**30,)])
def test_a_huge_shape_is_refused_before_anything_is_allocated(codec, shape):
    with pytest.raises(ValueError, match="more than 4294967296 elements"):
        codec.decode(b"\0" * 64, shape)


def test_a_large_shape_with_a_short_payload_is_refused_before_anything_is_allocated(codec):
    with pytest.raises(ValueError, match=r"The payload has 64 bytes; its shape and codec ask for \d{10}"):
        codec.decode(b"\0" * 64, (2**16, 2**15))


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)])
def test_a_dtype_that_is_not_floating_point_is_refused(codec, tensor):
    with pytest.raises(ValueError, match=r"A tensor of torch\.\w+ cannot be sent"):
        codec.encode(tensor)
    with pytest.raises(ValueError, match=r"A tensor of torch\.\w+ cannot be sent"):
        codec.decode(b"\0" * 3, (3,), tensor.dtype)


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_an_empty_tensor_and_a_scalar_are_refused(codec, shape):
    with pytest.raises(ValueError, match="cannot be sent"):
        codec.encode(torch.zeros(shape))


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_payload_of_the_wrong_length_is_refused(codec, change):
    payload = bytes(codec.encode(normal((2, 70))))
    wrong = payload[:change] if change < 0 else payload + b"\0" * change
    with pytest.raises(
        ValueError, match=f"The payload has {len(wrong)} bytes; its shape and codec ask for {len(payload)}"
    ):
        codec.decode(wrong, (2, 70))


@given(data=st.data(), name=st.sampled_from(sorted(CODECS)), dtype=st.sampled_from(DTYPES), columns=st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_any_payload_gives_finite_values_or_a_value_error(data, name, dtype, columns):
    codec = get_codec(name)
    size = codec.encoded_bytes((columns,), dtype)
    content = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = codec.decode(content, (columns,), dtype)
    except ValueError:
        return
    assert torch.isfinite(decoded).all()
    assert decoded.shape == (columns,)
    assert decoded.dtype == dtype


@given(
    x=hnp.arrays("float32", hnp.array_shapes(min_dims=1, max_dims=4, max_side=70), elements=st.floats(width=32)),
    name=st.sampled_from(sorted(CODECS)),
)
@settings(max_examples=200, deadline=None)
def test_whatever_encode_accepts_decode_takes_back(x, name):
    codec = get_codec(name)
    try:
        payload = codec.encode(torch.from_numpy(x))
    except ValueError:
        return
    decoded = codec.decode(payload, x.shape)
    assert decoded.shape == x.shape
    assert torch.isfinite(decoded).all()
