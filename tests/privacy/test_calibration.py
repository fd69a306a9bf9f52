"""The noise found keeps the epsilon asked for, and less noise does not."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfed.privacy.accounting import ZERO_OUT, Composition, epsilon, gaussian_delta
from splitfed.privacy.calibration import noise_multiplier_for, sampled_noise_multiplier_for

SAMPLED = [
    (1.0, {"sample_rate": 0.01, "steps": 500}),
    (8.0, {"sample_rate": 0.02, "steps": 600, "channels": 3, "unsampled": 2, "overflow": 1e-6}),
    (1000.0, {"sample_rate": 0.05, "steps": 300, "channels": 2}),
    (1.0, {"sample_rate": 0.1, "steps": 10, "overflow": 1e-5}),
    (2.0, {"sample_rate": 1.0, "steps": 10}),
    (2.0, {"sample_rate": 0.1, "steps": 0, "unsampled": 10}),
]


def sampled_epsilon(z, delta, *, sample_rate, steps, channels=1, unsampled=0, overflow=0.0):
    composition = Composition(unsampled / z**2, {(sample_rate, channels / z**2): steps}, overflow)
    return composition.epsilon(delta, ZERO_OUT)


def has_four_digits(number):
    return float(f"{number:.3e}") == number


@given(log_epsilon=st.floats(-10, 30), log_delta=st.floats(-60, -1), releases=st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_the_noise_found_keeps_epsilon_and_one_percent_less_does_not(log_epsilon, log_delta, releases):
    wanted, delta = math.exp(log_epsilon), math.exp(log_delta)
    found = noise_multiplier_for(wanted, delta, releases)
    assert has_four_digits(found)
    assert epsilon([(found, releases)], delta) <= wanted
    assert epsilon([(found * 0.99, releases)], delta) > wanted


@pytest.mark.parametrize(("wanted", "options"), SAMPLED, ids=str)
def test_the_noise_found_for_sampled_steps_keeps_epsilon_and_one_percent_less_does_not(wanted, options):
    found = sampled_noise_multiplier_for(wanted, 1e-5, **options)
    assert has_four_digits(found)
    assert sampled_epsilon(found, 1e-5, **options) <= wanted
    assert sampled_epsilon(found * 0.99, 1e-5, **options) > wanted


def test_a_known_figure_is_found():
    """For ε = 1 and δ = 1e-5 the analytic Gaussian mechanism needs 3.7306 sensitivities of noise."""
    assert noise_multiplier_for(1.0, 1e-5, 1) == 3.731
    assert gaussian_delta(1 / 3.731**2, 1.0) <= 1e-5 < gaussian_delta(1 / 3.730**2, 1.0)


def test_without_sampling_zero_out_needs_half_the_noise():
    alone = noise_multiplier_for(2.0, 1e-5, 40)
    for options in ({"sample_rate": 1.0, "steps": 40}, {"sample_rate": 1.0, "steps": 10, "channels": 4}):
        assert sampled_noise_multiplier_for(2.0, 1e-5, **options) == pytest.approx(alone / 2, rel=1e-3)


def test_sampling_saves_noise_unless_batches_overflow_too_often():
    half = noise_multiplier_for(1.0, 1e-5, 10) / 2
    assert sampled_noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=10) < 0.6 * half
    overflowing = sampled_noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=10, overflow=1e-5)
    assert overflowing == pytest.approx(half, rel=1e-3)


def test_more_noise_is_needed_for_less_epsilon_more_steps_and_more_channels():
    base = sampled_noise_multiplier_for(4.0, 1e-5, sample_rate=0.02, steps=100)
    assert sampled_noise_multiplier_for(2.0, 1e-5, sample_rate=0.02, steps=100) > base
    assert sampled_noise_multiplier_for(4.0, 1e-7, sample_rate=0.02, steps=100) > base
    assert sampled_noise_multiplier_for(4.0, 1e-5, sample_rate=0.04, steps=100) > base
    assert sampled_noise_multiplier_for(4.0, 1e-5, sample_rate=0.02, steps=200) > base
    assert sampled_noise_multiplier_for(4.0, 1e-5, sample_rate=0.02, steps=100, channels=2) > base
    assert sampled_noise_multiplier_for(4.0, 1e-5, sample_rate=0.02, steps=100, unsampled=1) > base


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_an_epsilon_that_noise_cannot_be_found_for_is_refused(wrong):
    with pytest.raises(ValueError, match="epsilon must be above 0 and finite"):
        noise_multiplier_for(wrong, 1e-5, 1)
    with pytest.raises(ValueError, match="epsilon must be above 0 and finite"):
        sampled_noise_multiplier_for(wrong, 1e-5, sample_rate=0.1, steps=1)


def test_nothing_to_calibrate_for_is_refused():
    with pytest.raises(ValueError, match="at least 1 release, not 0"):
        noise_multiplier_for(1.0, 1e-5, 0)
    for wrong in ({"steps": 0}, {"steps": -1}, {"steps": 1, "channels": 0}, {"steps": 2, "unsampled": -1}):
        with pytest.raises(ValueError, match="at least 1 channel and 1 step or release"):
            sampled_noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, **wrong)


def test_a_delta_or_a_sample_rate_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        noise_multiplier_for(1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"probability must be in 0 to 1, not 1\.5"):
        sampled_noise_multiplier_for(1.0, 1e-5, sample_rate=1.5, steps=1)


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(ValueError, match="No noise is enough for epsilon 1e-200"):
        noise_multiplier_for(1e-200, 1e-300, 1)
    with pytest.raises(ValueError, match="No noise is enough for epsilon 1e-200"):
        sampled_noise_multiplier_for(1e-200, 1e-300, sample_rate=1.0, steps=1)
