"""A mechanism's noise fits its sensitivity, and every row gets it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfed.errors import PrivacyError
from splitfed.privacy import (
    RELATION,
    UNIT,
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    NoiseStream,
    NoMechanism,
    clip,
)

KEY = bytes(range(32))
PERS = ["token", "sequence"]


def mechanism(clipping_norm=1.0, noise_multiplier=1.0, per="token"):
    return GaussianSequenceMechanism(clipping_norm, noise_multiplier, per, NoiseStream(KEY))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sensitivity_is_twice_the_clip_and_grows_with_the_root_of_rows_per_token():
    assert mechanism(3.0).sensitivity(128) == pytest.approx(2 * 3 * math.sqrt(128), rel=1e-15)
    assert mechanism(3.0, per="sequence").sensitivity(128) == 6.0
    assert (UNIT, RELATION) == ("sequence", "replace-one") == (mechanism().unit, mechanism().relation)


@pytest.mark.parametrize("per", PERS)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 1e6]))
@settings(max_examples=100, deadline=None)
def test_no_two_clipped_sequences_are_further_apart_than_the_sensitivity(per, seed, tokens, scale):
    first, second = (clip(normal(1, tokens, 16, seed=seed + i) * scale, 0.7, per=per).double() for i in (0, 1))
    assert (first - second).norm() <= mechanism(0.7, per=per).sensitivity(tokens)
    assert (first + first).norm() <= mechanism(0.7, per=per).sensitivity(tokens)  # a sequence and its negative


@pytest.mark.parametrize("per", PERS)
def test_the_sensitivity_is_reached_so_it_is_not_too_large(per):
    x = clip(100 * normal(1, 12, 16), 0.7, per=per).double()
    assert (x - -x).norm() == pytest.approx(mechanism(0.7, per=per).sensitivity(12), rel=1e-6)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize(
    ("clipping_norm", "noise_multiplier", "tokens"), [(1.0, 1.0, 4), (0.01, 0.5, 64), (8.0, 3.0, 9)]
)
def test_the_noise_has_multiplier_times_sensitivity_as_standard_deviation(per, clipping_norm, noise_multiplier, tokens):
    tested = mechanism(clipping_norm, noise_multiplier, per)
    noise = tested.release(torch.zeros(200, tokens, 64)).double()
    expected = noise_multiplier * 2 * clipping_norm * (math.sqrt(tokens) if per == "token" else 1)
    assert noise.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))
    assert abs(noise.mean().item()) / expected < 5 / math.sqrt(noise.numel())


def test_a_release_is_the_clipped_input_plus_noise_of_the_stream():
    x, tested = 5 * normal(3, 4, 8), mechanism(2.0, 0.25)
    noise = NoiseStream(KEY).gaussian((3, 4, 8), 0.25 * tested.sensitivity(4))
    assert torch.equal(tested.release(x), clip(x, 2.0, per="token") + noise)


def test_the_privacy_loss_between_the_worst_sequences_is_the_one_that_is_accounted():
    """ln p(y|x)/p(y|x') of the Gaussian mechanism has mean 1/(2z²) and variance 1/z²."""
    noise_multiplier, releases = 0.8, 20_000
    tested = mechanism(0.5, noise_multiplier)
    x = 100 * normal(1, 6, 8)
    std = noise_multiplier * tested.sensitivity(6)
    y = tested.release(x.expand(releases, 6, 8)).double()
    mine, other = (clip(sign * x, 0.5, per="token").double() for sign in (1, -1))
    loss = ((y - other).pow(2).sum((1, 2)) - (y - mine).pow(2).sum((1, 2))) / (2 * std**2)
    mean, variance = 1 / (2 * noise_multiplier**2), 1 / noise_multiplier**2
    assert loss.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / releases))
    assert loss.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / releases))


@pytest.mark.parametrize("per", PERS)
def test_every_row_gets_noise_of_its_own_padding_and_zeros_included(per):
    x = normal(4, 10, 16)
    x[:, 6:] = 0
    released = mechanism(1.0, 1e-3, per).release(x)
    assert released.count_nonzero() == released.numel()
    rows = released.view(-1, 16)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_equal_sequences_do_not_get_equal_noise_within_a_call_or_between_calls():
    tested = mechanism()
    first, second = tested.release(torch.zeros(2, 3, 4)), tested.release(torch.zeros(2, 3, 4))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_two_mechanisms_without_a_stream_of_the_caller_draw_different_noise():
    first, second = (GaussianSequenceMechanism(1.0, 1.0).release(torch.zeros(1, 2, 3)) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_noise_is_added_in_float32_or_wider(dtype):
    released = mechanism(1.0, 1.0).release(torch.zeros(1, 8, 64, dtype=dtype))
    assert released.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not torch.equal(released, released.to(torch.bfloat16).to(released.dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_refused_and_draws_no_noise(value):
    tested, x = mechanism(), torch.ones(1, 2, 3)
    x[0, 1, 2] = value
    with pytest.raises(PrivacyError, match="it was not sent"):
        tested.release(x)
    assert torch.equal(tested.release(torch.zeros(1, 2, 3)), mechanism().release(torch.zeros(1, 2, 3)))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
def test_gradients_are_those_of_the_clip(scale):
    x = (normal(2, 3, 4) * scale).requires_grad_()
    weights = normal(2, 3, 4, seed=1)
    (through_release,) = torch.autograd.grad((mechanism().release(x) * weights).sum(), x)
    (through_clip,) = torch.autograd.grad((clip(x, 1.0, per="token") * weights).sum(), x)
    assert torch.equal(through_release, through_clip)
    assert through_release.count_nonzero() > 0


def test_the_input_is_not_written_to():
    x = 10 * normal(2, 3, 4)
    before = x.clone()
    mechanism().release(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 3), torch.ones(1, 2, 3, 4), torch.ones(1, 0, 4), torch.ones(1, 1, 1).long()]
)
def test_what_is_not_a_batch_of_hidden_vectors_is_refused(x):
    with pytest.raises(ValueError, match=r"A release takes hidden vectors \[B, T, D\], not torch"):
        mechanism().release(x)


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, math.nan, math.inf, 1e-21, 1e21])
def test_a_clipping_norm_out_of_range_is_refused(clipping_norm):
    with pytest.raises(ValueError, match="clipping norm must be from"):
        mechanism(clipping_norm=clipping_norm)


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, math.nan, math.inf])
def test_a_noise_multiplier_out_of_range_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match=r"must be above 0 and finite.*use NoMechanism"):
        mechanism(noise_multiplier=noise_multiplier)


def test_a_clip_per_anything_else_is_refused():
    with pytest.raises(ValueError, match="not per 'batch'"):
        mechanism(per="batch")


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_sequence_without_rows_has_no_sensitivity(tokens):
    with pytest.raises(ValueError, match=f"at least one row, not {tokens}"):
        mechanism().sensitivity(tokens)


def test_no_mechanism_gives_the_input_back_and_claims_nothing():
    x = torch.ones(1, 2, 3)
    assert NoMechanism().release(x) is x
    assert NoMechanism().noise_multiplier == 0


# Tokens as the unit


def per_token(clipping_norm=1.0, noise_multiplier=1.0, rows=1):
    return GaussianTokenMechanism(clipping_norm, noise_multiplier, rows=rows, stream=NoiseStream(KEY))


@pytest.mark.parametrize("rows", [1, 2])
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 1.0, 1e6]), first_row=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_sequences_that_differ_in_one_token_s_rows_are_within_its_sensitivity(rows, seed, scale, first_row):
    x = normal(1, 9, 16, seed=seed) * scale
    other = x.clone()
    other[:, first_row : first_row + rows] = normal(1, rows, 16, seed=seed + 1) * scale
    distance = (clip(x, 0.7, per="token").double() - clip(other, 0.7, per="token").double()).norm()
    assert distance <= per_token(0.7, rows=rows).sensitivity(9)


def test_a_token_s_sensitivity_is_that_of_its_rows_whatever_the_length():
    for tokens in (2, 128):
        assert per_token(3.0).sensitivity(tokens) == 6.0
        assert per_token(3.0, rows=2).sensitivity(tokens) == pytest.approx(6 * math.sqrt(2), rel=1e-15)
    assert per_token(3.0, rows=2).sensitivity(1) == 6.0


@pytest.mark.parametrize("rows", [1, 2])
def test_the_noise_of_a_token_fits_its_sensitivity(rows):
    noise = per_token(0.5, 2.0, rows).release(torch.zeros(100, 16, 64)).double()
    expected = 2.0 * 2 * 0.5 * math.sqrt(rows)
    assert noise.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 128), (2, 128), (1, 1), (2, 1)])
def test_a_sequence_s_guarantee_follows_from_its_tokens_for_the_noise_that_is_there(rows, tokens):
    """The same noise, read as a mechanism for sequences: std ÷ (2·C·√T) is its noise multiplier."""
    tested = per_token(0.5, 2.0, rows)
    of_sequence = tested.noise_std(tokens) / GaussianSequenceMechanism(0.5, 1.0).sensitivity(tokens)
    assert tested.units(tokens) / tested.noise_multiplier**2 == pytest.approx(1 / of_sequence**2, rel=1e-12)
    assert tested.unit == "token"


@pytest.mark.parametrize("rows", [0, 3, 1.5])
def test_a_token_touches_one_row_or_two(rows):
    with pytest.raises(ValueError, match="1 row of smashed data or 2 of the output gradient"):
        per_token(rows=rows)


@pytest.mark.parametrize("z", [0.002, 0.5, 3.0])
@pytest.mark.parametrize("order", [1.5, 2.0, 32.0])
def test_the_rdp_curve_is_that_of_the_gaussian_mechanism(z, order):
    assert mechanism(2.0, z).rdp(order) == per_token(2.0, z).rdp(order) == pytest.approx(order / (2 * z * z), rel=1e-15)
