"""What sampling saves is never overstated: quadrature, simulation and exact counting agree."""

import math
from fractions import Fraction
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from splitfed.privacy.amplification import _divergence, _orders, poisson_overflow, sampled_epsilon

RATES = [1e-6, 1e-3, 0.1, 0.5, 0.9]
NOISES = [0.004, 0.05, 0.5, 1.0, 4.0, 30.0]


def divergence(q, sigma, order):
    """1/(α - 1) · ln E[(1 - q + q·e^((2x - 1)/(2σ²)))^α] over x from N(0, σ²), by the trapezoidal rule."""
    x = np.arange(-13 * sigma, order + 13 * sigma, sigma / 16)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return (logsumexp(order * ratio - (x / sigma) ** 2 / 2) - math.log(16 * math.sqrt(2 * math.pi))) / (order - 1)


def squared(sigma):
    """The squared signal under replace-one of a step to which opacus would give the noise multiplier σ."""
    return 4 / sigma**2


def privacy_loss(generator, q, sigma, steps, draws, *, forward):
    """Draw log p/q of composed steps: with the record against without it, or the other way round."""
    total = np.zeros(draws)
    for _ in range(steps):
        drawn = (generator.random(draws) < q) if forward else 0.0
        x = drawn + sigma * generator.standard_normal(draws)
        total += np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return total if forward else -total


def lower_bound_of_delta(loss, epsilon):
    """The mean of max(0, 1 - e^(ε - L)) less a margin that fails once in 10⁶ times (Hoeffding)."""
    return np.mean(-np.expm1(np.minimum(epsilon - loss, 0))) - math.sqrt(math.log(1e6) / (2 * len(loss)))


@pytest.mark.parametrize("sigma", NOISES)
@pytest.mark.parametrize("q", RATES)
def test_a_divergence_is_at_least_the_integral_and_close_to_it(q, sigma):
    for order in (1 + 1e-6, 1.001, 1.1, 1.5, 2.0, 2.5, 7.3, 31.9, 32.0, 64.0):
        exact, stated = divergence(q, sigma, order), _divergence(q, sigma, order)
        rounding = (1e-12 + 1e-14 * order + 1e-15 * (order / sigma) ** 2) / (order - 1)
        assert exact - rounding / 2 <= stated - rounding <= exact + rounding, order
        assert stated >= exact, order


@pytest.mark.parametrize(
    ("q", "sigma", "order"),
    [(0.5, 1.0, 5000.0), (0.5, 0.0, 2.0), (0.5, 1e-200, 2.0), (0.5, 1e-170, 1.5), (0.5, 1.0, 1040.0)],
)
def test_an_order_that_cannot_be_computed_is_not_used(q, sigma, order):
    assert _divergence(q, sigma, order) == math.inf


def test_fractions_are_used_only_where_the_series_does_not_end_too_early():
    """opacus's series for α = 64.5 and q = 1/2 ends after a term and gives less than nothing."""
    assert _divergence(0.5, 100.0, 64.5) == math.inf
    assert all(order.is_integer() for order in _orders() if order > 32)
    assert all(1 < one < other <= 1024 for one, other in pairwise(_orders()))


@pytest.mark.parametrize("delta", [1e-9, 1e-5])
@pytest.mark.parametrize(
    ("sampled", "certain"),
    [
        ([(0.01, 1.0, 1000)], 0.0),
        ([(0.001, 0.5, 10_000)], 0.0),
        ([(0.1, 4.0, 100)], 0.0),
        ([(0.02, 0.7, 3_000)], 0.0),
        ([(0.5, 8.0, 50)], 0.0),
        ([(1e-4, 1.0, 100_000)], 0.0),
        ([(0.01, 0.05, 1000)], 0.0),
        ([(0.01, 0.004, 1000)], 0.0),
        ([(0.05, 2.0, 200), (0.01, 0.8, 500)], 0.0),
        ([(0.05, 2.0, 200)], 0.25),
        ([(0.01, 0.05, 300), (0.1, 3.0, 20)], 400.0),
    ],
    ids=str,
)
def test_epsilon_is_the_least_over_all_orders(sampled, certain, delta):
    """min over α of α·signal/8 + Σ steps·D_α - (ln δ + ln α)/(α - 1) + ln((α - 1)/α), by a search of another kind."""

    def at(log_excess):
        excess = math.exp(log_excess)
        spent = (1 + excess) * certain / 8 + sum(n * divergence(q, sigma, 1 + excess) for q, sigma, n in sampled)
        return spent - (math.log(delta) + math.log1p(excess)) / excess + log_excess - math.log1p(excess)

    grid = np.linspace(-14, 6, 81)
    best = grid[np.argmin([at(x) for x in grid])]
    least = min(at(x) for x in np.linspace(best - 0.25, best + 0.25, 51))
    stated = sampled_epsilon({(q, squared(sigma)): n for q, sigma, n in sampled}, certain, delta)
    assert least * (1 - 5e-4) <= stated <= least * (1 + 2e-3)


@pytest.mark.parametrize("forward", [True, False], ids=["with-against-without", "without-against-with"])
@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 0.8, 10), (0.5, 2.0, 10), (0.03, 0.3, 20)])
def test_the_simulated_privacy_loss_is_no_larger(q, sigma, steps, forward):
    delta = 0.02
    stated = sampled_epsilon({(q, squared(sigma)): steps}, 0.0, delta)
    loss = privacy_loss(np.random.default_rng(2), q, sigma, steps, 200_000, forward=forward)
    assert lower_bound_of_delta(loss, stated) <= delta


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 0.8, 10), (0.5, 2.0, 10), (0.03, 0.3, 20)])
def test_half_the_figure_would_be_found_out(q, sigma, steps):
    delta = 0.02
    stated = sampled_epsilon({(q, squared(sigma)): steps}, 0.0, delta)
    loss = privacy_loss(np.random.default_rng(2), q, sigma, steps, 200_000, forward=True)
    assert lower_bound_of_delta(loss, stated / 2) > delta


def ways_of_a_step(rates, places, *, shuffled):
    """List all that a step may do with two records: its probability, and the place of each of the two or None."""
    for drawn in product((False, True), repeat=2):
        chance = math.prod(q if is_drawn else 1 - q for q, is_drawn in zip(rates, drawn, strict=True))
        seatings = list(permutations([0, 1] if places == 2 else [0, None]))
        if not shuffled:  # from the front, the second record after the first
            seatings = [(0, int(drawn[0]))]
        for seats in seatings:
            yield (
                chance / len(seatings),
                *(seat if is_drawn else None for seat, is_drawn in zip(seats, drawn, strict=True)),
            )


def loss_of_a_step(generator, rates, sigma, draws, *, places=2, shuffled=True):
    """Draw log p/p' of what a whole step sends, for a data set of x = 1 and y = -1, against the one where x is zero."""
    ways = [way for way in ways_of_a_step(rates, places, shuffled=shuffled) if way[0]]
    weights = np.array([way[0] for way in ways])
    means = np.zeros((2, len(ways), places))
    for index, (_, x, y) in enumerate(ways):
        if x is not None:
            means[0, index, x] = 1.0
        if y is not None:
            means[:, index, y] = -1.0
    sent = means[0][generator.choice(len(ways), draws, p=weights)]
    sent = sent + sigma * generator.standard_normal(sent.shape)
    with_x, without_x = (
        logsumexp(np.log(weights) - ((sent[:, None] - mean) ** 2).sum(-1) / (2 * sigma**2), axis=1) for mean in means
    )
    return with_x - without_x


def loss_of_ten_steps(rates, sigma, **how):
    generator = np.random.default_rng(3)
    return sum(loss_of_a_step(generator, rates, sigma, 40_000, **how) for _ in range(10))


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 1.0), (0.5, 0.2)], ids=str)
def test_whole_steps_with_random_places_keep_the_figure(rates):
    sigma, delta = 0.7, 0.02
    stated = sampled_epsilon({(rates[0], squared(sigma)): 10}, 0.0, delta)
    assert lower_bound_of_delta(loss_of_ten_steps(rates, sigma), stated) <= delta


def test_steps_that_fill_their_places_in_order_do_not_keep_the_figure():
    """Where the other record stands tells whether this one was drawn."""
    rates, sigma, delta = (0.1, 1.0), 0.7, 0.02
    stated = sampled_epsilon({(rates[0], squared(sigma)): 10}, 0.0, delta)
    assert lower_bound_of_delta(loss_of_ten_steps(rates, sigma, shuffled=False), stated) > 2 * delta


@pytest.mark.parametrize("sigma", [0.2, 1.5])
def test_a_batch_that_is_too_small_keeps_the_figure_once_its_overflow_is_taken_from_delta(sigma):
    q, delta = 0.1, 0.12
    overflow = poisson_overflow(2, q, 1, 1)
    assert overflow == pytest.approx(q)  # the other record alone fills the only place
    stated = sampled_epsilon({(q, squared(sigma)): 1}, 0.0, delta - overflow)
    loss = loss_of_a_step(np.random.default_rng(3), (q, q), sigma, 200_000, places=1)
    assert lower_bound_of_delta(loss, stated) <= delta


@pytest.mark.parametrize(
    ("records", "rate", "capacity", "steps"),
    [(1, 0.5, 1, 9), (2, 0.25, 1, 1), (10, 0.3, 5, 7), (60, 0.1, 20, 1000), (200, 0.01, 12, 50), (400, 0.5, 399, 1)],
)
def test_overflow_bounds_what_counting_gives(records, rate, capacity, steps):
    q = Fraction(rate)

    def more_than(drawn, among):
        return sum(math.comb(among, k) * q**k * (1 - q) ** (among - k) for k in range(drawn + 1, among + 1))

    stated = poisson_overflow(records, rate, capacity, steps)
    some_step = 1 - (1 - more_than(capacity, records)) ** steps
    bound = steps * more_than(capacity - 1, records - 1)
    assert some_step <= stated
    assert bound <= stated <= bound * (1 + Fraction(1, 10**6))


@given(records=st.integers(0, 3000), rate=st.floats(0, 1), capacity=st.integers(1, 300), steps=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_overflow_is_a_probability_that_falls_with_the_places_and_grows_with_all_else(records, rate, capacity, steps):
    stated = poisson_overflow(records, rate, capacity, steps)
    assert 0 <= stated <= 1
    assert poisson_overflow(records, rate, capacity + 1, steps) <= stated * (1 + 1e-9)
    assert poisson_overflow(records + 1, rate, capacity, steps) >= stated * (1 - 1e-9)
    assert poisson_overflow(records, rate, capacity, steps + 1) >= stated


def test_overflow_at_its_ends():
    assert poisson_overflow(100, 0.5, 100, 10**9) == 0
    assert poisson_overflow(100, 0.0, 1, 10) == 0
    assert poisson_overflow(100, 1.0, 99, 1) == 1
    assert poisson_overflow(100, 0.1, 5, 0) == 0
    assert 0 < poisson_overflow(10**6, 1e-6, 10**5, 1) < 1e-300


@pytest.mark.parametrize(
    ("records", "rate", "capacity", "steps", "said"),
    [
        (10, -0.1, 5, 1, "sample rate lies in 0 to 1"),
        (10, 1.1, 5, 1, "sample rate lies in 0 to 1"),
        (10, math.nan, 5, 1, "sample rate lies in 0 to 1"),
        (10, 0.1, 0, 1, "at least 1 place"),
        (-1, 0.1, 1, 1, "at least 0 records"),
        (10, 0.1, 1, -1, "at least 0 records"),
    ],
)
def test_an_overflow_of_impossible_numbers_is_refused(records, rate, capacity, steps, said):
    with pytest.raises(ValueError, match=said):
        poisson_overflow(records, rate, capacity, steps)
