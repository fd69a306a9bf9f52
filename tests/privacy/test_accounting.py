"""What releases cost together equals closed forms and opacus, and is never below the exact figure."""

import math
import re
from pathlib import Path

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from splitfed.privacy.accounting import REPLACE_ONE, ZERO_OUT, Composition, epsilon, squared_signal

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
# (sample rate, opacus's noise multiplier, steps) of sampled steps, and (noise multiplier, count) of other releases
SAMPLED = [
    ([(0.01, 1.0, 1_000)], []),
    ([(0.01, 2.0, 1_000)], []),
    ([(0.01, 0.6, 300)], []),
    ([(0.001, 0.5, 10_000)], []),
    ([(0.001, 1.0, 10_000)], []),
    ([(0.1, 4.0, 100)], []),
    ([(0.1, 1.5, 50)], []),
    ([(0.02, 0.7, 3_000)], []),
    ([(0.5, 8.0, 50)], []),
    ([(0.05, 2.0, 200), (0.01, 0.8, 500)], []),
    ([(0.05, 2.0, 200)], [(4.0, 1)]),
    ([(0.004, 1.1, 2_000)], [(3.0, 2), (10.0, 5)]),
]


def exact(signal, delta):
    """The ε at which Φ(μ/2 - ε/μ) - e^ε·Φ(-μ/2 - ε/μ) = δ, with 60 digits (Balle & Wang 2018, Theorem 8)."""
    with mpmath.workdps(60):
        mu = mpmath.sqrt(signal)

        def excess(b):  # of ε = μ·b
            first, second = mpmath.ncdf(mu / 2 - b), mpmath.ncdf(-mu / 2 - b)
            return mpmath.log(max(first - mpmath.exp(mu * b) * second, mpmath.mpf("1e-10000"))) - mpmath.log(delta)

        if excess(mpmath.mpf(0)) <= 0:
            return 0.0
        low, high = max(mu / 2 - 8, mpmath.mpf(0)), mu / 2 + 10
        return float(mu * mpmath.findroot(excess, (low, high), solver="anderson", tol=1e-40))


def opacus_epsilon(history, delta, *, alphas=None):
    accountant = RDPAccountant()
    accountant.history = history
    return accountant.get_epsilon(delta, alphas=alphas)


@pytest.mark.parametrize("releases", SETTINGS, ids=str)
def test_epsilon_is_the_exact_one_of_a_single_release_with_the_summed_signal(releases):
    for delta in DELTAS:
        lower = exact(sum(count / mpmath.mpf(z) ** 2 for z, count in releases), delta)
        assert lower <= epsilon(releases, delta) <= lower * (1 + 1e-6), delta


@pytest.mark.parametrize("releases", [s for s in SETTINGS if min(z for z, _ in s) >= 0.5], ids=str)
def test_opacus_states_no_less_without_sampling_and_little_more(releases):
    """Opacus bounds the same composition by Rényi divergences."""
    theirs = opacus_epsilon(
        [(z, 1.0, count) for z, count in releases], 1e-5, alphas=[*RDPAccountant.DEFAULT_ALPHAS, *range(64, 4096, 16)]
    )
    assert theirs / 1.15 <= epsilon(releases, 1e-5) <= theirs


@pytest.mark.parametrize(("sampled", "others"), SAMPLED, ids=str)
def test_opacus_agrees_on_sampled_steps_under_zero_out(sampled, others):
    """Its multiplier is std ÷ clip; zero-out moves a contribution by the clip, replace-one by twice as much."""
    composition = Composition(squared_signal(others), {(q, (2 / sigma) ** 2): steps for q, sigma, steps in sampled})
    history = [(sigma, q, steps) for q, sigma, steps in sampled] + [(2 * z, 1.0, count) for z, count in others]
    theirs = opacus_epsilon(history, 1e-5)
    assert composition.epsilon(1e-5, ZERO_OUT) == pytest.approx(theirs, rel=0.01)
    assert composition.epsilon(1e-5, ZERO_OUT) <= theirs * 1.001


@pytest.mark.parametrize(("sampled", "others"), SAMPLED, ids=str)
def test_replace_one_counts_a_sampled_step_as_if_the_record_were_always_drawn(sampled, others):
    composition = Composition(squared_signal(others), {(q, (2 / sigma) ** 2): steps for q, sigma, steps in sampled})
    always = [*others, *((sigma / 2, steps) for _, sigma, steps in sampled)]
    assert composition.epsilon(1e-5) == pytest.approx(epsilon(always, 1e-5), rel=1e-9)
    certain = Composition(squared_signal(others), {(1.0, (2 / sigma) ** 2): steps for _, sigma, steps in sampled})
    assert composition.epsilon(1e-5, REPLACE_ONE) == certain.epsilon(1e-5, REPLACE_ONE)
    assert certain.epsilon(1e-5, ZERO_OUT) == pytest.approx(
        epsilon([(2 * z, count) for z, count in always], 1e-5), rel=1e-9
    )


def test_without_sampling_zero_out_is_replace_one_with_twice_the_noise():
    for releases in SETTINGS:
        composition = Composition(squared_signal(releases))
        assert composition.epsilon(1e-5) == epsilon(releases, 1e-5)
        doubled = epsilon([(2 * z, count) for z, count in releases], 1e-5)
        assert composition.epsilon(1e-5, ZERO_OUT) == pytest.approx(doubled, rel=1e-9)


def test_channels_of_a_step_count_as_one_release():
    """Three channels with multipliers 1, 2 and 2 are one with 1/√1.5."""
    assert squared_signal([(1.0, 1), (2.0, 2)]) == 1.5
    together = Composition(sampled={(0.1, 1.5): 20})
    assert together.epsilon(1e-5) == pytest.approx(epsilon([(1.0, 20), (2.0, 40)], 1e-5), rel=1e-9)


def test_sampling_is_never_stated_where_it_does_not_help():
    """A single step that draws almost surely: the exact figure is below what Rényi divergences say."""
    composition = Composition(sampled={(0.999, 4.0): 1})
    assert composition.epsilon(1e-5, ZERO_OUT) == Composition(4.0).epsilon(1e-5, ZERO_OUT)


def test_overflow_is_taken_from_delta_and_at_worst_nothing_is_gained():
    sampled, unsampled = {(0.01, 4.0): 1_000}, Composition(4_000.0).epsilon(1e-5, ZERO_OUT)
    figures = [Composition(sampled=sampled, overflow=p).epsilon(1e-5, ZERO_OUT) for p in (0, 5e-6, 9e-6, 1e-5, 1.0)]
    assert figures == sorted(figures)
    assert figures[1] == pytest.approx(Composition(sampled=sampled).epsilon(5e-6, ZERO_OUT))
    assert figures[2] < figures[3] == figures[4] == unsampled
    assert Composition(sampled=sampled, overflow=1.0).epsilon(1e-5) == Composition(sampled=sampled).epsilon(1e-5)


def test_little_noise_and_rare_draws_cost_about_as_much_as_the_draws_that_happen():
    """1,000 steps at 1 % draw a record more than 28 times with a probability below 1e-6: 10 on average."""
    figure = Composition(sampled={(0.01, 1e4): 1_000}).epsilon(1e-5, ZERO_OUT)
    assert Composition(10 * 1e4).epsilon(0.5, ZERO_OUT) / 2 < figure < Composition(40 * 1e4).epsilon(1e-5, ZERO_OUT)


squared_signals = st.floats(1e-3, 1e4)
compositions = st.builds(
    Composition,
    st.just(0.0) | squared_signals,
    st.dictionaries(
        st.tuples(st.sampled_from([0.0, 0.003, 0.1, 1.0]), squared_signals), st.integers(0, 500), max_size=2
    ),
    st.sampled_from([0.0, 1e-7, 1e-3]),
)


@given(one=compositions, other=compositions, delta=st.floats(1e-9, 0.3))
@settings(max_examples=40, deadline=None)
def test_more_releases_and_smaller_deltas_cost_more_and_zero_out_costs_less_than_replace_one(one, other, delta):
    for relation in (REPLACE_ONE, ZERO_OUT):
        stated = one.epsilon(delta, relation)
        assert (one + other).epsilon(delta, relation) >= stated
        assert one.epsilon(2 * delta, relation) <= stated
    assert one.epsilon(delta, ZERO_OUT) <= one.epsilon(delta, REPLACE_ONE)


@given(one=compositions, other=compositions, third=compositions)
def test_compositions_add_up_in_any_order(one, other, third):
    whole = one + other + third
    again = third + (other + one)
    assert whole.signal == pytest.approx(again.signal) == pytest.approx(one.signal + other.signal + third.signal)
    assert whole.sampled == again.sampled
    assert sum(whole.sampled.values()) == sum(sum(each.sampled.values()) for each in (one, other, third))
    assert whole.overflow == pytest.approx(again.overflow)
    assert one + Composition() == Composition(one.signal, {k: n for k, n in one.sampled.items() if n}, one.overflow)


def test_the_same_steps_twice_are_twice_the_steps_and_their_overflow_stays_a_probability():
    half = Composition(1.0, {(0.1, 2.0): 5}, 0.6)
    assert half + half == Composition(2.0, {(0.1, 2.0): 10}, 1.0)


def test_little_noise_and_thousands_of_releases_give_the_figure_that_they_should():
    """With ρ = n/(2·z²), epsilon is about ρ + √(2·ρ)·Φ⁻¹(1 - δ)."""
    rho = 4_000 / (2 * 0.005**2)
    assert epsilon([(0.005, 4_000)], 1e-5) == pytest.approx(rho + 4.2649 * math.sqrt(2 * rho), rel=1e-6)
    assert epsilon([(0.005, 4_000)], 1e-5) == pytest.approx(8.0054e7, rel=1e-4)


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
    assert epsilon(data.draw(st.permutations(releases)), delta) == pytest.approx(stated, rel=1e-8, abs=1e-9)
    split = [(z, part) for z, count in releases for part in (count // 2, count - count // 2)]
    assert epsilon(split, delta) == pytest.approx(stated, rel=1e-8, abs=1e-9)
    assert epsilon([*releases, data.draw(st.sampled_from(releases))], delta) >= stated
    assert epsilon([(2 * z, count) for z, count in releases], delta) <= stated
    assert epsilon(releases, 2 * delta) <= stated


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0
    assert epsilon([(0.0, 0), (1.0, 0)], 1e-5) == 0
    for relation in (REPLACE_ONE, ZERO_OUT):
        assert Composition().epsilon(1e-5, relation) == 0
        assert Composition(sampled={(0.1, math.inf): 0, (0.0, 0.0): 7}).epsilon(1e-5, relation) == 0


@pytest.mark.parametrize("releases", [[(0.0, 1)], [(1.0, 5), (0.0, 1)], [(1e-11, 1)], [(1e-300, 1)], [(5e-324, 1)]])
def test_no_noise_or_none_to_speak_of_guarantees_nothing(releases):
    assert epsilon(releases, 1e-5) is None
    for relation in (REPLACE_ONE, ZERO_OUT):
        assert Composition(squared_signal(releases)).epsilon(1e-5, relation) is None
        assert Composition(squared_signal(releases), {(0.1, 4.0): 10}).epsilon(1e-5, relation) is None
        assert Composition(1.0, {(0.1, squared_signal(releases)): 10}).epsilon(1e-5, relation) is None


@pytest.mark.parametrize("noise_multiplier", [1e-9, 1e-6, 1e6, 1e12, 1e200])
@pytest.mark.parametrize("delta", [1e-300, 1e-5, 0.5, 0.999, 1 - 1e-16])
def test_extreme_settings_give_a_finite_figure(noise_multiplier, delta):
    stated = epsilon([(noise_multiplier, 1)], delta)
    assert stated == pytest.approx(0.5 / noise_multiplier**2 if noise_multiplier < 1 else 0, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("squared", [1e-300, 1e-12, 1e12, 1e20])
@pytest.mark.parametrize("rate", [1e-300, 1e-9, 0.5, 1 - 2**-53])
def test_extreme_steps_give_a_figure_that_sampling_does_not_raise(squared, rate):
    stated = Composition(sampled={(rate, squared): 1}).epsilon(1e-5, ZERO_OUT)
    assert 0 <= stated <= Composition(squared).epsilon(1e-5, ZERO_OUT)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_not_a_probability_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        epsilon([(1.0, 1)], delta)
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        Composition(1.0, {(0.1, 1.0): 1}).epsilon(delta, ZERO_OUT)


@pytest.mark.parametrize("noise_multiplier", [-1.0, math.nan, math.inf])
def test_a_noise_multiplier_that_is_none_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise multiplier must be finite and at least 0"):
        epsilon([(noise_multiplier, 1)], 1e-5)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count of releases is at least 0, not -1"):
        epsilon([(1.0, -1)], 1e-5)


def test_a_relation_that_is_not_accounted_for_is_refused():
    with pytest.raises(ValueError, match="There is no relation 'add-remove'; choose 'replace-one' or 'zero-out'"):
        Composition(1.0).epsilon(1e-5, "add-remove")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"signal": -1.0}, "squared signal must be at least 0, not -1.0"),
        ({"signal": math.nan}, "squared signal must be at least 0, not nan"),
        ({"sampled": {(0.1, -1.0): 1}}, "squared signal must be at least 0, not -1.0"),
        ({"sampled": {(1.5, 1.0): 1}}, "probability must be in 0 to 1, not 1.5"),
        ({"sampled": {(0.1, 1.0): -2}}, "number of steps is at least 0, not -2"),
        ({"overflow": 1.1}, "probability must be in 0 to 1, not 1.1"),
        ({"overflow": math.nan}, "probability must be in 0 to 1, not nan"),
    ],
    ids=str,
)
def test_a_composition_of_impossible_numbers_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Composition(**wrong)
