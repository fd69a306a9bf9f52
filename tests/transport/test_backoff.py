"""Pauses between tries, on a clock that only they move."""

from dataclasses import dataclass, field

import pytest

from splitfed.transport.backoff import LONGEST_PAUSE_S, Backoff


@dataclass
class Clock:
    now_s: float = 0.0
    pauses_s: list[float] = field(default_factory=list)

    def read(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


def backoff(clock: Clock, give_up_after_s: float, jitter: float = 0.5) -> Backoff:
    return Backoff(give_up_after_s, clock=clock.read, sleep=clock.sleep, jitter=lambda: jitter)


def test_pauses_grow_up_to_a_cap() -> None:
    clock = Clock()
    tries = backoff(clock, 1000, jitter=0.999)
    for _ in range(12):
        assert tries.pause()
    assert clock.pauses_s == sorted(clock.pauses_s)
    assert clock.pauses_s[-1] <= LONGEST_PAUSE_S
    assert clock.pauses_s[-1] == clock.pauses_s[-2]


def test_it_gives_up_after_its_time_and_not_before() -> None:
    clock = Clock()
    tries = backoff(clock, 5)
    while tries.pause():
        pass
    assert sum(clock.pauses_s) == pytest.approx(5)
    assert tries.tries == len(clock.pauses_s)


def test_progress_starts_the_time_anew() -> None:
    clock = Clock()
    tries = backoff(clock, 5)
    while tries.pause():
        pass
    tries.progress()
    assert tries.tries == 0
    assert tries.pause()
    assert clock.pauses_s[-1] == clock.pauses_s[0]


def test_no_time_means_no_second_try() -> None:
    clock = Clock()
    assert not backoff(clock, 0).pause()
    assert clock.pauses_s == []


def test_pauses_of_two_agents_differ() -> None:
    first, second = Clock(), Clock()
    backoff(first, 5, jitter=0.0).pause()
    backoff(second, 5, jitter=0.9).pause()
    assert first.pauses_s != second.pauses_s
