"""What the int8 codec promises about values, and its payload's layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.compress import BLOCK, get_codec

INT8 = get_codec("int8")
LARGEST = 127 * (torch.finfo(torch.float32).max / 128)
HALF_LARGEST = float(np.float32(LARGEST / 2))


def scale_per_element(x_ND):
    """Largest magnitude of each element's block ÷ 127, in float64, block by block."""
    scale = np.empty_like(x_ND, dtype=np.float64)
    for start in range(0, x_ND.shape[1], BLOCK):
        block = np.abs(x_ND[:, start : start + BLOCK].astype(np.float64))
        scale[:, start : start + BLOCK] = block.max(axis=1, keepdims=True) / 127
    return scale


@given(
    x_ND=hnp.arrays(
        "float32",
        st.tuples(st.integers(1, 3), st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(125, 200))),
        elements=st.floats(-HALF_LARGEST, HALF_LARGEST, width=32),
        fill=st.floats(-1, 1, width=32),
    )
)
@settings(max_examples=150, deadline=None)
def test_the_error_is_at_most_half_a_scale(x_ND):
    decoded = INT8.decode(INT8.encode(torch.from_numpy(x_ND)), x_ND.shape).numpy()
    scale = scale_per_element(x_ND)
    error = np.abs(decoded.astype(np.float64) - x_ND)
    rounding = 127 * scale * 2.0**-21
    flushed = scale < 2.0**-126
    assert (error <= np.where(flushed, 127 * 2.0**-126, scale / 2 + rounding)).all()


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 127, 128, 129])
def test_the_bound_holds_and_is_tight_at_every_alignment(columns):
    x_ND = torch.randn(200_000 // columns, columns, generator=torch.Generator().manual_seed(columns))
    decoded = INT8.decode(INT8.encode(x_ND), x_ND.shape)
    scale = scale_per_element(x_ND.numpy())
    error = (decoded.double() - x_ND.double()).abs().numpy()
    assert (error <= scale / 2 + 127 * scale * 2.0**-21).all()
    assert columns == 1 or (error / scale).max() > 0.49  # the bound is tight: no level is wasted


def test_a_zero_block_decodes_to_zeros_beside_one_that_is_not():
    x = torch.zeros(2, 3 * BLOCK)
    x[0, BLOCK : 2 * BLOCK] = 5.0
    decoded = INT8.decode(INT8.encode(x), x.shape)
    assert torch.equal(decoded == 0, x == 0)
    torch.testing.assert_close(decoded, x)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.4e-36])
def test_a_block_too_small_for_a_normal_scale_decodes_to_zeros(value):
    assert INT8.decode(INT8.encode(torch.full((BLOCK,), value)), (BLOCK,)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_magnitude_passes_and_the_next_is_refused(dtype):
    x = torch.tensor([1.0, -LARGEST], dtype=dtype)
    decoded = INT8.decode(INT8.encode(x), (2,), dtype)
    assert decoded[1].item() == pytest.approx(-LARGEST, rel=1e-6)
    with pytest.raises(ValueError, match=r"int8 ends at 3\.37"):
        INT8.encode(x * 1.005)


def test_encoding_a_decoded_tensor_gives_the_same_codes():
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    payload = INT8.encode(x)
    again = INT8.encode(INT8.decode(payload, x.shape))
    scale_bytes = 40 * 4 * 4
    assert bytes(again[scale_bytes:]) == bytes(payload[scale_bytes:])


def test_payload_is_scales_then_codes():
    x = torch.zeros(1, BLOCK + 1)
    x[0, 0], x[0, 1], x[0, BLOCK] = 127.0, -3.4, -254.0
    payload = bytes(INT8.encode(x))
    assert np.frombuffer(payload[:8], "<f4").tolist() == [1.0, 2.0]
    assert np.frombuffer(payload[8:], "i1").tolist() == [127, -3] + [0] * 62 + [-127]


def test_a_hidden_vector_takes_seventeen_bytes_for_sixteen_elements():
    assert INT8.encoded_bytes((8, 128, 768)) == 8 * 128 * (768 + 4 * 12)
    assert INT8.encoded_bytes((3, 65)) == 3 * (65 + 4 * 2)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "-1.0", "-1e-45", "3e36"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_scale_that_encode_cannot_give_is_refused(scale, block):
    payload = bytearray(INT8.encode(torch.ones(1, 2 * BLOCK)))
    payload[4 * block : 4 * block + 4] = np.float32(scale).tobytes()
    with pytest.raises(ValueError, match="The payload has scales from"):
        INT8.decode(payload, (1, 2 * BLOCK))


def test_the_most_negative_code_with_the_largest_scale_stays_finite():
    payload = np.float32(torch.finfo(torch.float32).max / 128).tobytes() + b"\x80"
    assert torch.isfinite(INT8.decode(payload, (1,))).all()


def test_values_beyond_float16_are_refused_by_a_float16_receiver():
    payload = INT8.encode(torch.tensor([1e6]))
    with pytest.raises(ValueError, match=r"read as torch\.float16, holds a NaN or an infinite"):
        INT8.decode(payload, (1,), torch.float16)
    assert torch.isfinite(INT8.decode(payload, (1,), torch.bfloat16)).all()
