"""Epsilon equals closed forms, and never falls below the exact one."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

from splitfed.privacy import epsilon

DELTAS = [1e-3, 1e-5, 1e-8, 1e-12]
SETTINGS = [
    [(100.0, 1)],
    [(10.0, 1)],
    [(3.0, 20)],
    [(1.0, 1)],
    [(1.0, 100)],
    [(0.5, 1)],
    [(0.1, 1)],
    [(0.02, 1)],
    [(0.02, 5_000)],
    [(0.005, 1)],
    [(0.005, 4_000)],
    [(0.005, 10_000_000)],
    [(1.0, 10), (2.0, 5), (0.3, 1)],
    [(0.02, 100), (0.5, 100), (50.0, 100)],
]


def squared_signal(releases):
    return sum(count / z**2 for z, count in releases)


def closed_form(releases, delta):
    """min over α of n·α/(2·z²) - (ln δ + ln α)/(α - 1) + ln((α - 1)/α), by a search of another kind than ours."""
    rho = squared_signal(releases) / 2

    def at(log_excess):
        excess = math.exp(log_excess)
        alpha = 1 + excess
        return alpha * rho - (math.log(delta) + math.log1p(excess)) / excess + log_excess - math.log1p(excess)

    grid = np.linspace(-30, 30, 2001)
    best = grid[np.argmin([at(x) for x in grid])]
    return minimize_scalar(at, bounds=(best - 0.1, best + 0.1), method="bounded", options={"xatol": 1e-10}).fun


def exact(releases, delta):
    """The epsilon at which Φ(μ/2 - ε/μ) - exp(ε)·Φ(-μ/2 - ε/μ) = δ, in log space (Balle & Wang 2018, Theorem 8)."""
    mu = math.sqrt(squared_signal(releases))

    def excess(eps):
        first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return first + math.log(-math.expm1(min(second - first, -1e-300))) - math.log(delta)

    return 0.0 if excess(0) <= 0 else brentq(excess, 0, mu**2 + 20 * mu + 200, xtol=1e-13, rtol=1e-14)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("releases", SETTINGS, ids=str)
def test_epsilon_is_the_minimum_of_the_closed_form(releases, delta):
    assert epsilon(releases, delta) == pytest.approx(closed_form(releases, delta), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("releases", SETTINGS, ids=str)
def test_epsilon_is_at_least_the_exact_one_and_close_to_it(releases, delta):
    lower = exact(releases, delta)
    stated = epsilon(releases, delta)
    assert stated >= lower * (1 - 1e-12)
    if lower > 0.1 and delta <= 1e-5:
        assert stated <= 1.12 * lower


@pytest.mark.parametrize("releases", [s for s in SETTINGS if min(z for z, _ in s) >= 0.5], ids=str)
def test_opacus_with_its_own_orders_agrees_where_they_suffice(releases):
    accountant = RDPAccountant()
    accountant.history = [(z, 1.0, count) for z, count in releases]
    alphas = [*RDPAccountant.DEFAULT_ALPHAS, *range(64, 4096, 16)]
    theirs = accountant.get_epsilon(1e-5, alphas=alphas)
    assert epsilon(releases, 1e-5) <= theirs
    assert epsilon(releases, 1e-5) == pytest.approx(theirs, rel=0.02)


def test_little_noise_and_thousands_of_releases_give_the_figure_that_they_should():
    """ρ = n/(2·z²), and epsilon is about ρ + 2·√(ρ·ln(1/δ))."""
    rho = 4_000 / (2 * 0.005**2)
    stated = epsilon([(0.005, 4_000)], 1e-5)
    assert stated == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1e5)), rel=1e-5)
    assert stated == pytest.approx(8.006e7, rel=1e-3)


def test_the_threat_model_quotes_figures_that_hold_rounded_up():
    text = (Path(__file__).parents[2] / "docs" / "threat_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+)(?: \(default\))? \| ([\d.,]+) \| ([\d.,]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for noise_multiplier, *quoted in rows:
        for releases, figure in zip((1, 480), quoted, strict=True):
            stated = epsilon([(float(noise_multiplier), releases)], 1e-5)
            assert stated <= float(figure.replace(",", "")) <= stated * 1.02


@given(
    releases=st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=1, max_size=5),
    delta=st.floats(1e-12, 0.4),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_order_and_grouping_of_releases_do_not_matter_and_more_cost_more(releases, delta, data):
    stated = epsilon(releases, delta)
    assert epsilon(data.draw(st.permutations(releases)), delta) == pytest.approx(stated, rel=1e-9, abs=1e-12)
    split = [(z, part) for z, count in releases for part in (count // 2, count - count // 2)]
    assert epsilon(split, delta) == pytest.approx(stated, rel=1e-9, abs=1e-12)
    assert epsilon([*releases, data.draw(st.sampled_from(releases))], delta) >= stated
    assert epsilon([(2 * z, count) for z, count in releases], delta) <= stated
    assert epsilon(releases, 2 * delta) <= stated


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0
    assert epsilon([(0.0, 0), (1.0, 0)], 1e-5) == 0


@pytest.mark.parametrize("releases", [[(0.0, 1)], [(1.0, 5), (0.0, 1)], [(1e-11, 1)], [(1e-300, 1)], [(5e-324, 1)]])
def test_no_noise_or_none_to_speak_of_guarantees_nothing(releases):
    assert epsilon(releases, 1e-5) is None


@pytest.mark.parametrize("noise_multiplier", [1e-9, 1e-6, 1e6, 1e12, 1e200])
@pytest.mark.parametrize("delta", [1e-300, 1e-5, 0.5, 0.999, 1 - 1e-16])
def test_extreme_settings_give_a_finite_figure_above_the_exact_one(noise_multiplier, delta):
    stated = epsilon([(noise_multiplier, 1)], delta)
    assert math.isfinite(stated)
    assert stated >= (0.5 / noise_multiplier**2 if noise_multiplier < 1 else 0)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_not_a_probability_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        epsilon([(1.0, 1)], delta)


@pytest.mark.parametrize("noise_multiplier", [-1.0, math.nan, math.inf])
def test_a_noise_multiplier_that_is_none_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise multiplier must be finite and at least 0"):
        epsilon([(noise_multiplier, 1)], 1e-5)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count of releases is at least 0, not -1"):
        epsilon([(1.0, -1)], 1e-5)
