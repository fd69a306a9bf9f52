"""No vector leaves the clip longer than its norm, and the short ones leave as they came."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.errors import PrivacyError
from splitfed.privacy import clip

SLACK = 1 - 2.0**-22
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
AXES = {"token": -1, "sequence": (-2, -1)}


def norms(x_BTD, per):
    """L2 norms in extended precision."""
    x = x_BTD.detach().double().numpy().astype(np.longdouble)
    return np.sqrt((x**2).sum(axis=AXES[per]))


@pytest.mark.parametrize("per", ["token", "sequence"])
@given(
    x=hnp.arrays("float32", (2, 3, 33), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    clipping_norm=st.floats(1e-20, 1e20),
)
@settings(max_examples=300, deadline=None)
def test_no_result_is_longer_than_the_clipping_norm(per, x, clipping_norm):
    clipped = clip(torch.from_numpy(x), clipping_norm, per=per)
    assert (norms(clipped, per) <= np.longdouble(clipping_norm)).all()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 64, 768, 4096])
def test_no_result_is_longer_whatever_dtype_and_width(per, dtype, columns):
    x = torch.randn(16, 32, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    for clipping_norm in (1e-3, 0.3, 1.0, math.sqrt(columns), 1e4):
        lengths = norms(clip(x, clipping_norm, per=per), per)
        assert (lengths <= np.longdouble(clipping_norm)).all()
        was_long = norms(x, per) > clipping_norm
        assert (lengths[was_long] >= clipping_norm * (1 - 2.0**-21)).all()


@given(x=hnp.arrays("float32", (2, 3, 5), elements=st.floats(-1, 1, width=32)), factor=st.floats(1.0, 1e6))
@settings(max_examples=200, deadline=None)
def test_a_vector_within_the_norm_comes_back_to_the_bit(x, factor):
    x_BTD = torch.from_numpy(x)
    clipping_norm = max(float(norms(x_BTD, "token").max()) * factor / SLACK * (1 + 1e-12), 1e-20)
    clipped = clip(x_BTD, clipping_norm, per="token")
    assert torch.equal(clipped.view(torch.int32), x_BTD.view(torch.int32))


def test_a_longer_vector_keeps_its_direction():
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clipped = clip(x, 0.5, per="token")
    torch.testing.assert_close(clipped, x / x.norm(dim=-1, keepdim=True) * 0.5 * SLACK)


def test_a_clip_per_sequence_scales_all_its_tokens_alike_and_no_other_sequence():
    x = torch.ones(2, 4, 4)
    x[1] *= 0.01
    clipped = clip(x, 1.0, per="sequence")
    torch.testing.assert_close(clipped[0], torch.full((4, 4), 0.25))
    assert torch.equal(clipped[1], x[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_zero_stays_zero_with_a_finite_gradient(dtype, per):
    x = torch.zeros(1, 2, 3, dtype=dtype, requires_grad=True)
    clipped = clip(x, 1.0, per=per)
    clipped.sum().backward()
    assert clipped.count_nonzero() == 0
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a_norm_that_is_not_finite_is_refused(value, dtype, per):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    x[1, 2, 3] = value
    with pytest.raises(PrivacyError, match=f"this {per} holds a NaN or an infinite value; it was not sent"):
        clip(x, 1.0, per=per)


def test_the_largest_float32_is_clipped_not_refused():
    x = torch.full((1, 2, 64), torch.finfo(torch.float32).max, requires_grad=True)
    clipped = clip(x, 1.0, per="token")
    clipped.sum().backward()
    assert (norms(clipped, "token") <= 1).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_gradient_is_that_of_finite_differences(per, scale):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    assert torch.autograd.gradcheck(lambda x: clip(x, 2.0, per=per), x.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_float32_or_wider(dtype):
    assert clip(torch.ones(1, 1, 4, dtype=dtype), 1.0, per="token").dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
