"""The analytic formula equals itself with 120 digits, from tiny signals to huge ones."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitfed.privacy.gaussian import MAX_SQUARED_SIGNAL, gaussian_delta, gaussian_epsilon, gaussian_signal

SIGNALS = [10.0**exponent for exponent in range(-20, 21)]
DELTAS = [1e-300, 1e-100, 1e-30, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 0.5]
# (ε - μ²/2) / μ: below -5, delta is 1 but for the last digits; above 36, it is below 1e-280
THRESHOLDS = [-5.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 3.0, 8.0, 20.0, 36.0]


def exact_delta(signal, epsilon):
    """Φ(μ/2 - ε/μ) - e^ε·Φ(-μ/2 - ε/μ) (Balle & Wang 2018, Theorem 8)."""
    with mpmath.workdps(120):
        mu, epsilon = mpmath.sqrt(signal), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def test_the_oracle_is_right_where_the_formula_can_be_done_by_hand():
    """At ε = 0, δ = 2·Φ(μ/2) - 1; at ε = μ²/2, δ = 1/2 - e^(μ²/2)·Φ(-μ)."""
    assert float(exact_delta(4.0, 0.0)) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-15)
    assert float(exact_delta(4.0, 2.0)) == pytest.approx(0.5 - math.exp(2) * math.erfc(2 / math.sqrt(2)) / 2, rel=1e-12)


@pytest.mark.parametrize("signal", SIGNALS)
def test_delta_is_at_least_the_exact_one_and_a_millionth_above_at_most(signal):
    mu = math.sqrt(signal)
    epsilons = [mu * (mu / 2 + threshold) for threshold in THRESHOLDS]
    compared = 0
    for epsilon in [0.0, *(epsilon for epsilon in epsilons if epsilon >= 0)]:
        exact = exact_delta(signal, epsilon)
        if exact > 1e-300:
            compared += 1
            assert exact <= gaussian_delta(signal, epsilon) <= exact * (1 + mpmath.mpf(1e-6)), epsilon
    assert compared >= 7


@pytest.mark.parametrize("signal", SIGNALS)
def test_epsilon_is_at_least_the_exact_one_and_a_millionth_above_at_most(signal):
    for delta in DELTAS:
        stated = gaussian_epsilon(signal, delta)
        assert exact_delta(signal, stated) <= delta, delta
        less = stated * (1 - 1e-6) - 1e-8 * math.sqrt(signal)
        assert stated == 0 or less < 0 or exact_delta(signal, less) > delta, delta


def test_a_release_that_misleads_a_numerical_accountant_costs_its_exact_epsilon():
    """One release with z = 0.0055 costs 17,303.37; opacus's PRV accountant says 709.8, the logarithm of max float."""
    signal = 1 / 0.0055**2
    with mpmath.workdps(120):
        exact = float(mpmath.findroot(lambda e: mpmath.log(exact_delta(signal, e) / mpmath.mpf(1e-5)), (17200, 17400)))
    assert exact == pytest.approx(17_303.371867, abs=1e-6)
    assert exact <= gaussian_epsilon(signal, 1e-5) <= exact * (1 + 1e-9)


def test_the_published_figures_of_the_formula_are_met():
    """For ε = 1 and δ = 1e-5 the analytic noise is 3.7306 sensitivities; μ = 1 at ε = 1 gives δ = 0.12694."""
    assert gaussian_epsilon(1 / 3.7306**2, 1e-5) == pytest.approx(1.0, rel=1e-4)
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126937, abs=1e-6)


@pytest.mark.parametrize(("signal", "delta"), [(0.25, 0.02), (4.0, 0.02), (100.0, 0.1)])
def test_the_privacy_loss_of_sampled_noise_agrees(signal, delta):
    """δ(ε) is the mean of max(0, 1 - e^(ε - L)) over L = log p/q under p; Hoeffding's bound fails once in 10⁶ times."""
    draws = 400_000
    mu, generator = math.sqrt(signal), np.random.default_rng(1)
    loss = mu * (generator.standard_normal(draws) + mu / 2)
    margin = math.sqrt(math.log(1e6) / (2 * draws))

    def estimate(epsilon):
        return np.mean(-np.expm1(np.minimum(epsilon - loss, 0)))

    stated = gaussian_epsilon(signal, delta)
    assert estimate(stated) - margin <= delta
    assert estimate(stated - 0.5 * mu) - margin > delta  # the estimate is sharp enough to find a figure that is too low


signals = st.floats(-46, 45).map(math.exp)
deltas = st.floats(-600, -0.7).map(math.exp)


@given(signal=signals, delta=deltas, factor=st.sampled_from([1 + 2**-52, 1 + 1e-14, 1 + 1e-11, 1 + 1e-9, 1.001, 2.0]))
@example(signal=1.0, delta=0.3829249225480262, factor=1 + 2**-52)  # epsilon begins to be above 0
@settings(max_examples=250, deadline=None)
def test_a_larger_signal_or_a_smaller_delta_never_costs_less_down_to_the_last_bit(signal, delta, factor):
    stated = gaussian_epsilon(signal, delta)
    assert gaussian_epsilon(signal * factor, delta) >= stated
    assert gaussian_epsilon(signal, delta / factor) >= stated


@given(signal=signals, delta=deltas)
@settings(max_examples=200, deadline=None)
def test_the_signal_of_an_epsilon_gives_the_signal_back(signal, delta):
    stated = gaussian_epsilon(signal, delta)
    again = gaussian_signal(stated, delta)
    assert again >= signal * (1 - 1e-8)
    assert stated == 0 or again <= signal * (1 + 1e-7)
    assert gaussian_epsilon(again, delta) <= stated


@given(log_epsilon=st.floats(-40, 44), delta=deltas)
@settings(max_examples=200, deadline=None)
def test_the_epsilon_of_a_signal_gives_the_epsilon_back(log_epsilon, delta):
    epsilon = math.exp(log_epsilon)
    signal = gaussian_signal(epsilon, delta)
    again = gaussian_epsilon(signal, delta)
    assert again <= epsilon
    assert again >= epsilon * (1 - 1e-6) - 1e-7 * math.sqrt(signal)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (1e-6, 1e-5), (1.0, 1e-5), (1e3, 1e-12), (1e15, 0.5)])
def test_the_signal_of_an_epsilon_is_the_largest(epsilon, delta):
    signal = gaussian_signal(epsilon, delta)
    assert exact_delta(signal, epsilon) <= delta
    assert exact_delta(signal * (1 + 1e-8), epsilon) > delta


def test_extremes_have_an_answer():
    assert gaussian_delta(0.0, 1.0) == 0
    assert gaussian_delta(math.inf, 1.0) == 1
    assert gaussian_delta(1e300, 0.0) == 1
    assert 0 < gaussian_delta(1e-300, 1e300) <= 1e-300
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(5e-324, 5e-324) < 1e-150
    assert gaussian_epsilon(1e-20, 1e-5) == 0
    assert gaussian_epsilon(MAX_SQUARED_SIGNAL, 1e-5) == pytest.approx(5e19)
    assert gaussian_epsilon(math.nextafter(MAX_SQUARED_SIGNAL, math.inf), 1e-5) is None
    assert gaussian_epsilon(math.inf, 1e-5) is None
    assert gaussian_signal(1e300, 1e-5) == pytest.approx(MAX_SQUARED_SIGNAL)
    assert gaussian_signal(0.0, 1e-200) == 0
    assert gaussian_epsilon(1.0, 0.9) == gaussian_epsilon(1.0, 0.5)


def test_what_is_no_signal_no_epsilon_or_no_delta_is_refused():
    for signal in (-1.0, math.nan):
        with pytest.raises(ValueError, match="squared signal must be at least 0"):
            gaussian_epsilon(signal, 1e-5)
        with pytest.raises(ValueError, match="squared signal must be at least 0"):
            gaussian_delta(signal, 1.0)
    for epsilon in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
            gaussian_signal(epsilon, 1e-5)
        with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
            gaussian_delta(1.0, epsilon)
    for delta in (0.0, 1.0, -1e-5, math.nan, Fraction(3, 2)):
        with pytest.raises(ValueError, match="delta must be between 0 and 1"):
            gaussian_epsilon(1.0, delta)
        with pytest.raises(ValueError, match="delta must be between 0 and 1"):
            gaussian_signal(1.0, delta)
