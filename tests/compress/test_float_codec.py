"""What the floating-point codecs promise about values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.compress import get_codec

ROUNDING = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}
ANY_BITS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", ANY_BITS)
def test_none_gives_every_element_back_to_the_bit(dtype):
    limits = torch.finfo(dtype)
    x = torch.tensor([0.0, -0.0, 1 / 3, limits.max, limits.min, limits.tiny, limits.smallest_normal / 2], dtype=dtype)
    decoded = get_codec("none").decode(get_codec("none").encode(x), x.shape, dtype)
    assert torch.equal(decoded.view(torch.uint8), x.view(torch.uint8))


def test_none_is_little_endian_in_row_order():
    payload = get_codec("none").encode(torch.tensor([[1.0, 2.0], [-2.0, 0.0]]))
    assert bytes(payload) == bytes.fromhex("0000803f 00000040 000000c0 00000000")


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("width", [32, 64])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_error_is_at_most_half_a_unit_in_the_last_place(name, width, data):
    codec = get_codec(name)
    relative, absolute = ROUNDING[name]
    limit = 65_504.0 if name == "fp16" else 2.0**127
    elements = st.floats(-limit, limit, width=width)
    x = torch.from_numpy(data.draw(hnp.arrays(f"float{width}", (40,), elements=elements)))
    decoded = codec.decode(codec.encode(x), x.shape, torch.float64)
    error = (decoded - x.double()).abs()
    assert (error <= torch.clamp(relative * x.double().abs(), min=absolute)).all()


@pytest.mark.parametrize(("name", "value"), [("fp16", 65_520.0), ("fp16", -1e9), ("bf16", 3.4e38), ("bf16", -3.4e38)])
def test_a_value_beyond_the_range_is_refused_not_saturated(name, value):
    with pytest.raises(ValueError, match=f"{name} ends at .*; choose bf16, int8 or none"):
        get_codec(name).encode(torch.tensor([1.0, value]))


def test_the_largest_float16_still_passes():
    decoded = get_codec("fp16").decode(get_codec("fp16").encode(torch.tensor([65_504.0, -65_519.0])), (2,))
    assert decoded.tolist() == [65_504.0, -65_504.0]


def test_a_bf16_payload_beyond_float16_is_refused_by_a_float16_receiver():
    payload = get_codec("bf16").encode(torch.tensor([1e6]))
    with pytest.raises(ValueError, match=r"read as torch\.float16, holds a NaN or an infinite"):
        get_codec("bf16").decode(payload, (1,), torch.float16)


@pytest.mark.parametrize(("name", "pattern"), [("fp16", "007c"), ("fp16", "01fe"), ("bf16", "807f"), ("bf16", "c1ff")])
def test_a_payload_that_is_not_finite_is_refused(name, pattern):
    with pytest.raises(ValueError, match="NaN or an infinite"):
        get_codec(name).decode(bytes.fromhex("0000" + pattern), (2,))
