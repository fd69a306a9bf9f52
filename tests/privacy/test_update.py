"""An update leaves no longer than the clip, with noise on every element, or not at all."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.errors import PrivacyError
from splitfed.privacy import NoiseStream, UpdateMechanism

KEY = bytes(range(32))
SLACK = 1 - 2.0**-22
SHAPES = {"a": (3, 4), "b": (5,)}
DTYPES = [torch.float32, torch.float64]


class Silence(NoiseStream):
    """Noise of zero; keeps the standard deviations that were asked for."""

    def __init__(self):
        super().__init__()
        self.stds = []

    def gaussian(self, shape, std=1.0):
        self.stds.append(std)
        return torch.zeros(tuple(shape))


def mechanism(clipping_norm=1.0, noise_multiplier=1.0, stream=None):
    return UpdateMechanism(clipping_norm, noise_multiplier, stream or NoiseStream(KEY))


def adapter(seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}


def changed(before, after):
    """The change of each tensor in extended precision, in one vector."""
    pairs = [(before[name].double().numpy(), after[name].double().numpy()) for name in before]
    return np.concatenate([(b.astype(np.longdouble) - a.astype(np.longdouble)).ravel() for a, b in pairs])


def test_the_unit_is_the_client_and_the_sensitivity_twice_the_clip():
    tested = mechanism(3.0, 0.5)
    assert (tested.unit, tested.relation) == ("client", "replace-one")
    assert (tested.clipping_norm, tested.noise_multiplier, tested.sensitivity()) == (3.0, 0.5, 6.0)
    assert tested.rdp(8.0) == 8 / (2 * 0.5**2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data(), clipping_norm=st.floats(1e-20, 1e20))
@settings(max_examples=300, deadline=None)
def test_no_update_from_zero_is_longer_than_the_clip(dtype, data, clipping_norm):
    elements = st.floats(-(2.0**126), 2.0**126, width=32 if dtype == "float32" else 64)
    after = {"a": torch.from_numpy(data.draw(hnp.arrays(dtype, (3, 5), elements=elements)))}
    before = {"a": torch.zeros_like(after["a"])}
    released = mechanism(clipping_norm, stream=Silence()).release(before, after)
    assert np.sqrt((changed(before, released) ** 2).sum()) <= np.longdouble(clipping_norm)
    assert released["a"].dtype == after["a"].dtype


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_is_clipped_over_all_tensors_together_and_keeps_its_direction(scale, dtype):
    before, update = adapter(dtype=torch.float64), adapter(seed=1, scale=scale, dtype=torch.float64)
    before = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in before.items()}
    after = {name: update[name].to(dtype) for name in update}
    released = mechanism(0.5, stream=Silence()).release(before, after)
    length = math.sqrt((changed(before, after) ** 2).sum())
    factor = min(1.0, 0.5 * SLACK / length)
    for name, tensor in after.items():
        torch.testing.assert_close(released[name], (tensor.double() * factor).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_within_the_clip_leaves_as_it_is(dtype):
    before = adapter(dtype=dtype)
    after = {name: tensor + 0.001 for name, tensor in before.items()}
    released = mechanism(1.0, stream=Silence()).release(before, after)
    for name, tensor in after.items():
        torch.testing.assert_close(released[name], tensor, rtol=0, atol=torch.finfo(dtype).eps)


def test_an_update_of_nothing_is_the_adapter_before_and_noise():
    before = adapter()
    quiet = Silence()
    released = mechanism(2.0, 0.25, quiet).release(before, before)
    assert all(torch.equal(released[name], tensor) for name, tensor in before.items())
    assert quiet.stds == [0.25 * 2 * 2.0] * len(before)


@pytest.mark.parametrize(("clipping_norm", "noise_multiplier"), [(1.0, 1.0), (0.01, 0.5), (8.0, 3.0)])
def test_the_noise_has_multiplier_times_sensitivity_as_standard_deviation_on_every_tensor(
    clipping_norm, noise_multiplier
):
    zeros = {"a": torch.zeros(200, 64), "b": torch.zeros(20_000)}
    for noise in mechanism(clipping_norm, noise_multiplier).release(zeros, zeros).values():
        scaled = noise.double() / (noise_multiplier * 2 * clipping_norm)
        assert scaled.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))
        assert abs(scaled.mean().item()) < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_that_is_not_finite_is_refused_and_draws_no_noise(value, dtype):
    before, after, quiet = adapter(dtype=dtype), adapter(1, dtype=dtype), Silence()
    after["b"][3] = value
    with pytest.raises(PrivacyError, match="adapter update holds a NaN or an infinite value; it was not sent"):
        mechanism(stream=quiet).release(before, after)
    assert quiet.stds == []


def test_neither_adapter_is_written_to():
    before, after = adapter(0), adapter(1)
    kept = adapter(0), adapter(1)
    mechanism().release(before, after)
    for given_, copy in zip((before, after), kept, strict=True):
        assert all(torch.equal(given_[name], copy[name]) for name in copy)


@pytest.mark.parametrize("wrong", [{"a": torch.zeros(3, 4)}, {**adapter(), "c": torch.zeros(1)}])
def test_adapters_with_other_tensors_are_refused(wrong):
    for pair in ((adapter(), wrong), (wrong, adapter())):
        with pytest.raises(ValueError, match=r"tensor '[bc]' is on one side of the round only"):
            mechanism().release(*pair)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="'b' is on one side of the round only or differs in shape"):
        mechanism().release(adapter(), {**adapter(), "b": torch.zeros(6)})


@pytest.mark.parametrize(("clipping_norm", "noise_multiplier"), [(0.0, 1.0), (math.inf, 1.0), (1.0, 0.0)])
def test_an_argument_out_of_range_is_refused(clipping_norm, noise_multiplier):
    with pytest.raises(ValueError, match=r"clipping norm must be from|must be above 0 and finite"):
        UpdateMechanism(clipping_norm, noise_multiplier)
