"""The secret sample of a step: who is in it, in which rows, and where its randomness comes from.

Statistics are of one fixed stream, so that they come out alike every time; bounds are at five standard deviations, or
at the 10⁻⁶ quantile of χ².
"""

import inspect
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from splitfed.training.sampling import poisson_sample


def stream(seed: int = 0) -> Callable[[int], bytes]:
    """Repeatable bytes."""
    return np.random.Generator(np.random.Philox(seed)).bytes


def draws(times: int, n_examples: int, *, sample_rate: float, capacity: int) -> list[list[int | None]]:
    random_bytes = stream()
    return [
        poisson_sample(n_examples, sample_rate=sample_rate, capacity=capacity, random_bytes=random_bytes)
        for _ in range(times)
    ]


def drawn(rows: Iterable[int | None]) -> list[int]:
    return [index for index in rows if index is not None]


def assert_follows(counts: Mapping[Any, int], expected: Mapping[Any, float]) -> None:
    """Pearson's test; cells of fewer than 10 expected are one cell."""
    assert counts.keys() <= expected.keys()
    large = [cell for cell, count in expected.items() if count >= 10]
    pairs = [(counts.get(cell, 0), expected[cell]) for cell in large]
    rest = sum(expected.values()) - sum(expectation for _, expectation in pairs)
    if rest >= 10:
        pairs.append((sum(counts.values()) - sum(count for count, _ in pairs), rest))
    statistic = sum((count - expectation) ** 2 / expectation for count, expectation in pairs)
    assert len(pairs) > 2
    assert statistic < chi2.isf(1e-6, len(pairs) - 1)


# Who is drawn


@pytest.mark.parametrize("sample_rate", [0.01, 0.3, 0.9])
def test_each_example_is_drawn_with_the_sample_rate(sample_rate: float) -> None:
    times, n_examples = 4000, 30
    counts = Counter(
        index for rows in draws(times, n_examples, sample_rate=sample_rate, capacity=30) for index in drawn(rows)
    )
    deviation = math.sqrt(times * sample_rate * (1 - sample_rate))
    assert all(abs(counts[index] - times * sample_rate) < 5 * deviation for index in range(n_examples))


def test_the_number_of_examples_drawn_is_binomial() -> None:
    times, n, q = 4000, 12, 0.3
    counts = Counter(len(drawn(rows)) for rows in draws(times, n, sample_rate=q, capacity=n))
    assert_follows(counts, {k: times * math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)})


def test_examples_are_drawn_independently_of_each_other() -> None:
    times, n, q = 4000, 4, 0.4
    counts = Counter(tuple(sorted(drawn(rows))) for rows in draws(times, n, sample_rate=q, capacity=n))
    subsets = [subset for size in range(n + 1) for subset in combinations(range(n), size)]
    assert_follows(counts, {subset: times * q ** len(subset) * (1 - q) ** (n - len(subset)) for subset in subsets})


def test_an_example_is_drawn_if_its_64_bits_are_below_the_rate() -> None:
    sample_rate = 0.1
    threshold = int(sample_rate * 2**64)
    assert threshold / 2**64 == sample_rate  # exact: a float64 has 53 bits
    words = np.array([threshold - 1, threshold, threshold + 1, 0, 2**64 - 1], dtype="<u8")

    def random_bytes(count: int) -> bytes:
        return words.tobytes() if count == words.nbytes else stream()(count)

    assert sorted(drawn(poisson_sample(5, sample_rate=sample_rate, capacity=8, random_bytes=random_bytes))) == [0, 3]


def test_at_rate_one_all_are_drawn() -> None:
    assert sorted(drawn(poisson_sample(7, sample_rate=1, capacity=9))) == list(range(7))


def test_nobody_may_be_drawn_at_all() -> None:
    assert poisson_sample(3, sample_rate=1e-300, capacity=4, random_bytes=lambda count: b"\xff" * count) == [None] * 4


# Surplus and rows


@given(n_examples=st.integers(1, 40), sample_rate=st.floats(0.001, 1), capacity=st.integers(1, 20), seed=st.integers(0))
def test_there_are_as_many_rows_as_asked_for_and_no_example_is_in_two(
    n_examples: int, sample_rate: float, capacity: int, seed: int
) -> None:
    rows = poisson_sample(n_examples, sample_rate=sample_rate, capacity=capacity, random_bytes=stream(seed))
    assert len(rows) == capacity
    assert len(set(drawn(rows))) == len(drawn(rows))
    assert set(drawn(rows)) <= set(range(n_examples))


def test_of_a_surplus_every_choice_stays_equally_often_in_every_order() -> None:
    times = 6000
    counts = Counter(tuple(rows) for rows in draws(times, 5, sample_rate=1, capacity=3))
    assert_follows(counts, dict.fromkeys(permutations(range(5), 3), times / 60))


def test_examples_stand_in_every_choice_of_rows_equally_often_in_every_order() -> None:
    times = 6000
    counts = Counter((rows.index(0), rows.index(1)) for rows in draws(times, 2, sample_rate=1, capacity=6))
    assert_follows(counts, dict.fromkeys(permutations(range(6), 2), times / 30))


def test_the_row_of_an_example_does_not_depend_on_who_else_is_drawn() -> None:
    rows = [each for each in draws(6000, 4, sample_rate=0.5, capacity=4) if 0 in each]
    for others in range(4):
        alike = [each.index(0) for each in rows if len(drawn(each)) == 1 + others]
        assert_follows(Counter(alike), dict.fromkeys(range(4), len(alike) / 4))


# Where the randomness comes from


def test_the_randomness_is_the_operating_systems_and_no_seed_repeats_it() -> None:
    assert inspect.signature(poisson_sample).parameters["random_bytes"].default is os.urandom
    samples = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # type: ignore[index]
        samples.append(poisson_sample(1000, sample_rate=0.5, capacity=1000))
        after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # type: ignore[index]
        assert after == before
    assert samples[0] != samples[1]


# Arguments


@pytest.mark.parametrize("sample_rate", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_sample_rate_out_of_range_is_refused(sample_rate: float) -> None:
    with pytest.raises(ValueError, match="sample rate is above 0 and at most 1, not"):
        poisson_sample(3, sample_rate=sample_rate, capacity=3)


@pytest.mark.parametrize(("n_examples", "capacity"), [(0, 3), (3, 0), (-1, 3)])
def test_no_examples_or_no_rows_are_refused(n_examples: int, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"must be 1 or more, but they are {n_examples} and {capacity}"):
        poisson_sample(n_examples, sample_rate=0.5, capacity=capacity)
