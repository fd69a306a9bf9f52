"""The ranking that cohorts are drawn by."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.federation.cohort import ranked

names = st.sets(st.text(min_size=1, max_size=8), max_size=12)


@given(names=names, seed=st.integers(0, 2**63 - 1), round=st.integers(1, 1000), data=st.data())
def test_the_order_in_which_names_come_changes_nothing(
    names: set[str], seed: int, round: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(sorted(names)))
    assert ranked(shuffled, seed=seed, round=round) == ranked(sorted(names), seed=seed, round=round)
    assert set(shuffled) == names == set(ranked(names, seed=seed, round=round))


@given(names=names, one=st.text(min_size=1, max_size=8), round=st.integers(1, 1000))
def test_who_comes_before_whom_does_not_hang_on_who_else_is_there(names: set[str], one: str, round: int) -> None:
    without = ranked(names - {one}, seed=3, round=round)
    assert [name for name in ranked(names | {one}, seed=3, round=round) if name != one] == without


def test_the_order_is_the_same_on_every_machine() -> None:
    """Computed once, by hand: sha256 of the JSON of ["cohort", seed, round, name]."""
    assert ranked("abcd", seed=0, round=1) == ["c", "d", "a", "b"]


def test_every_round_and_every_seed_draws_anew() -> None:
    by_round = {tuple(ranked("abcdefgh", seed=0, round=round)) for round in range(1, 21)}
    by_seed = {tuple(ranked("abcdefgh", seed=seed, round=1)) for seed in range(20)}
    assert len(by_round) == len(by_seed) == 20


def test_everybody_is_drawn_about_as_often_as_the_others() -> None:
    """A cohort of 2 of 6, over 600 rounds: 200 each, with a standard deviation of √(600 · 1/3 · 2/3) = 11.5."""
    first = (ranked("abcdef", seed=7, round=round)[:2] for round in range(1, 601))
    counts = Counter(itertools.chain.from_iterable(first))
    assert all(count == pytest.approx(200, abs=4 * 11.5) for count in counts.values())
    assert counts.keys() == set("abcdef")
