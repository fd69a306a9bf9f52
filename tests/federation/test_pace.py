"""How long a round waits for its slower members."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.federation.pace import Pace, WatchedClock, deadline_s

seconds = st.floats(0.001, 1e6)


def test_a_clock_that_nobody_looked_at_has_moved_by_no_more_than_a_look() -> None:
    clock = WatchedClock(longest_look_s=2)
    assert [clock.look(now_s) for now_s in (100, 101, 103, 10_000, 10_001)] == [0, 1, 3, 5, 6]


def test_a_clock_that_goes_backwards_stands_still() -> None:
    clock = WatchedClock()
    assert [clock.look(now_s) for now_s in (100, 105, 50, 51)] == [0, 5, 5, 6]


def test_a_duration_is_projected_from_the_steps_so_far() -> None:
    pace = Pace()
    assert pace.duration_s(5, 10) is None
    pace.start(10)
    assert pace.duration_s(13, 10) == 3
    pace.note(14, steps=2)
    assert pace.duration_s(14, 10) == 20
    pace.note(15, steps=None)
    assert pace.duration_s(15, 10) == 20
    assert pace.duration_s(40, 10) == 30
    pace.submitted_s = 50
    assert pace.duration_s(90, 10) == 40


def test_a_member_that_starts_afresh_is_not_taken_for_a_fast_one() -> None:
    pace = Pace()
    pace.start(0)
    pace.note(8, steps=8)
    pace.note(20, steps=0)
    assert pace.duration_s(20, 10) == 20
    pace.note(22, steps=1)
    assert pace.duration_s(22, 10) == 220


def test_the_deadline_is_a_multiple_of_the_median_duration() -> None:
    assert deadline_s([1, 2, 9], 3) == 6
    assert deadline_s([1, 2, 8, 9], 3) == 24
    assert deadline_s([None, 5, None], 1.5) == 7.5


def test_without_a_duration_there_is_no_deadline() -> None:
    assert deadline_s([], 3) == deadline_s([None], 3) == math.inf


@given(done=st.lists(seconds, max_size=8), at_work=st.integers(1, 8), waited_s=seconds, margin=st.floats(1, 10))
def test_while_half_of_the_members_are_at_work_nobody_is_past_the_deadline(
    done: list[float], at_work: int, waited_s: float, margin: float
) -> None:
    done = done[:at_work]
    assert waited_s <= deadline_s([*done, *[waited_s] * at_work], margin)


@given(done=st.lists(seconds, min_size=2, max_size=9), margin=st.floats(1, 10), slow=st.lists(seconds, max_size=8))
def test_the_deadline_does_not_hang_on_how_slow_the_slower_half_is(
    done: list[float], margin: float, slow: list[float]
) -> None:
    slow = slow[: len(done) - 1]
    slower = [max(done) + duration_s for duration_s in slow]
    assert deadline_s([*done, *slower], margin) == pytest.approx(
        deadline_s([*done, *[math.inf] * len(slower)], margin), rel=1e-12
    )
