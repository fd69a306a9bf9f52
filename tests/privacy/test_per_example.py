"""No example moves the sum by more than the clip, over all its tensors together, and every element gets noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.errors import PrivacyError
from splitfed.privacy import NoiseStream, PerExampleMechanism

KEY = bytes(range(32))
SLACK = 1 - 2.0**-22
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 3)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def mechanism(clipping_norm=1.0, noise_multiplier=1.0, stream=None):
    return PerExampleMechanism(clipping_norm, noise_multiplier, stream or NoiseStream(KEY))


def gradients(examples, *, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(examples, *shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()
    }


def norm(tensors):
    """One norm over all tensors, in extended precision."""
    return np.sqrt(sum((tensor.double().numpy().astype(np.longdouble) ** 2).sum() for tensor in tensors.values()))


def only(per_example, row):
    return {name: tensor[row : row + 1] for name, tensor in per_example.items()}


def test_the_sensitivity_is_twice_the_clip_for_a_sequence_that_is_replaced():
    tested = mechanism(3.0, 0.5)
    assert tested.sensitivity() == 6.0
    assert (tested.unit, tested.relation) == ("sequence", "replace-one")
    assert tested.rdp(8.0) == 8 / (2 * 0.5**2)


@given(
    flat=hnp.arrays("float32", (2, 23), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    clipping_norm=st.floats(1e-20, 1e20),
)
@settings(max_examples=300, deadline=None)
def test_no_example_is_longer_than_the_clip_over_all_its_tensors(flat, clipping_norm):
    x = torch.from_numpy(flat)
    per_example = {"a": x[:, :12].view(2, 3, 4), "b": x[:, 12:17], "c": x[:, 17:].view(2, 2, 1, 3)}
    for row in range(2):
        assert norm(mechanism(clipping_norm).clip(only(per_example, row))) <= np.longdouble(clipping_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 768, 8192])
def test_no_example_is_longer_whatever_dtype_and_size(dtype, columns):
    per_example = {"a": gradients(1)["b"].to(dtype), "b": torch.randn(1, columns, 8).to(dtype)}
    for clipping_norm in (1e-3, 0.3, 1.0, 1e4):
        clipped = norm(mechanism(clipping_norm).clip(per_example))
        assert clipped <= np.longdouble(clipping_norm)
        if norm(per_example) > clipping_norm:
            assert clipped >= clipping_norm * (1 - 2.0**-21)


def test_the_sum_is_that_of_the_examples_clipped_one_by_one():
    per_example, tested = gradients(6, scale=3.0), mechanism(2.0)
    one_by_one = [tested.clip(only(per_example, row)) for row in range(6)]
    for name, total in tested.clip(per_example).items():
        assert total.shape == SHAPES[name]
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, sum(clipped[name] for clipped in one_by_one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("held", [[], [0], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_a_row_that_holds_no_example_adds_nothing(held):
    per_example, tested = gradients(6, scale=3.0), mechanism(2.0)
    is_real_B = torch.tensor([row in held for row in range(6)])
    for name, total in tested.clip(per_example, is_real_B=is_real_B).items():
        each = [tested.clip(only(per_example, row))[name] for row in held]
        torch.testing.assert_close(total, sum(each, torch.zeros_like(total)), rtol=1e-12, atol=1e-12)


def test_a_row_that_holds_no_example_is_refused_like_any_other():
    """Or the refusal would tell that the row held one."""
    per_example = gradients(3)
    per_example["b"][1] = math.inf
    for held in ([True, True, True], [True, False, True], [False] * 3):
        with pytest.raises(PrivacyError, match="nothing was applied"):
            mechanism().clip(per_example, is_real_B=torch.tensor(held))


def test_an_example_is_clipped_by_the_norm_over_all_tensors_not_of_each():
    per_example = {"a": torch.full((1, 9), 1.0), "b": torch.full((1, 16), 1.0)}  # norms 3 and 4, together 5
    clipped = mechanism(4.0).clip(per_example)
    torch.testing.assert_close(clipped["a"], torch.full((9,), 0.8 * SLACK, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(clipped["b"], torch.full((16,), 0.8 * SLACK, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_long_example_scales_no_other():
    per_example = gradients(3, scale=0.01)
    for tensor in per_example.values():
        tensor[1] *= 1e6
    total = mechanism(1.0).clip(per_example)
    long = mechanism(1.0).clip(only(per_example, 1))
    for name, tensor in per_example.items():
        torch.testing.assert_close(total[name] - long[name], tensor[0].double() + tensor[2].double())


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1.0, 1e6]), other=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=100, deadline=None)
def test_replacing_an_example_moves_the_sum_by_at_most_the_sensitivity_and_dropping_one_by_half(seed, scale, other):
    tested, first, second = mechanism(0.7), gradients(4, seed=seed, scale=scale), gradients(1, seed=seed + 1)
    replaced = {name: torch.cat([tensor[:3], second[name] * other]) for name, tensor in first.items()}
    dropped = {name: tensor[:3] for name, tensor in first.items()}
    whole = tested.clip(first)
    rounding = 1e-14  # of the sums' difference, which is taken here and not by the mechanism
    for neighbour, bound in ((replaced, tested.sensitivity()), (dropped, 0.7)):
        moved = {name: total - whole[name] for name, total in tested.clip(neighbour).items()}
        assert norm(moved) <= bound + rounding


def test_the_sensitivity_is_reached_so_it_is_not_too_large():
    first = gradients(1, scale=100.0)
    second = {name: -tensor for name, tensor in first.items()}
    tested = mechanism(0.7)
    moved = {name: total - tested.clip(second)[name] for name, total in tested.clip(first).items()}
    assert float(norm(moved)) == pytest.approx(tested.sensitivity(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.01])
def test_short_examples_are_added_up_as_they_are(scale):
    per_example = gradients(3, scale=scale)
    for name, total in mechanism(1.0).clip(per_example).items():
        torch.testing.assert_close(total, per_example[name].double().sum(0), rtol=1e-12, atol=1e-45)


def test_the_longest_float32_is_clipped_not_refused():
    per_example = {"a": torch.full((1, 64), torch.finfo(torch.float32).max)}
    assert float(norm(mechanism(1.0).clip(per_example))) == pytest.approx(SLACK)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_that_is_not_finite_is_refused(value, dtype):
    per_example = gradients(3, dtype=dtype)
    per_example["b"][1, 2] = value
    with pytest.raises(PrivacyError, match="gradient of an example holds a NaN or an infinite value; nothing was appl"):
        mechanism().clip(per_example)


def test_no_examples_add_up_to_zeros_and_no_tensors_to_none():
    total = mechanism().clip(gradients(0))
    assert {name: tensor.shape for name, tensor in total.items()} == SHAPES
    assert all(tensor.count_nonzero() == 0 for tensor in total.values())
    assert mechanism().clip({}) == {}


def test_the_input_is_not_written_to():
    per_example, sums = gradients(2, scale=9.0), gradients(1)
    before = {name: tensor.clone() for name, tensor in (*per_example.items(), *((n + "s", t) for n, t in sums.items()))}
    mechanism().clip(per_example)
    mechanism().release(sums)
    assert all(torch.equal(tensor, before[name]) for name, tensor in per_example.items())
    assert all(torch.equal(tensor, before[name + "s"]) for name, tensor in sums.items())


@pytest.mark.parametrize(("clipping_norm", "noise_multiplier"), [(1.0, 1.0), (0.01, 0.5), (8.0, 3.0)])
def test_the_noise_has_multiplier_times_sensitivity_as_standard_deviation_on_every_tensor(
    clipping_norm, noise_multiplier
):
    zeros = {"a": torch.zeros(200, 64), "b": torch.zeros(20_000)}
    for noise in mechanism(clipping_norm, noise_multiplier).release(zeros).values():
        scaled = noise.double() / (noise_multiplier * 2 * clipping_norm)
        assert scaled.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))
        assert abs(scaled.mean().item()) < 5 / math.sqrt(noise.numel())


def test_a_release_is_the_sum_plus_noise_of_the_stream():
    sums, expected = gradients(2), NoiseStream(KEY)
    for name, released in mechanism(2.0, 0.25).release(sums).items():
        assert torch.equal(released, sums[name] + expected.gaussian(sums[name].shape, 0.25 * 4.0))


def test_tensors_and_calls_get_noise_of_their_own():
    tested, zeros = mechanism(), {"a": torch.zeros(4), "b": torch.zeros(4)}
    first, second = tested.release(zeros), tested.release(zeros)
    assert len({tuple(tensor.tolist()) for tensor in (*first.values(), *second.values())}) == 4
    others = [PerExampleMechanism(1.0, 1.0).release(zeros) for _ in range(2)]
    assert not torch.equal(others[0]["a"], others[1]["a"])


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, math.nan, math.inf, 1e-21, 1e21])
def test_a_clipping_norm_out_of_range_is_refused(clipping_norm):
    with pytest.raises(ValueError, match="clipping norm must be from"):
        mechanism(clipping_norm=clipping_norm)


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, math.nan, math.inf])
def test_a_noise_multiplier_out_of_range_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        mechanism(noise_multiplier=noise_multiplier)
