from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from splitfed.training.link import Traffic
from splitfed.training.work import done


def test_only_the_waiting_counts_as_waiting():
    said = []

    @contextmanager
    def waiting():
        said.append("waits")
        yield
        said.append("goes on")

    def work():
        for number in range(2):
            said.append(f"computes {number}")
            answer = Future()
            answer.set_result(number)
            yield answer
        return "result"

    assert done(work(), waiting=waiting) == "result"
    assert said == ["computes 0", "waits", "goes on", "computes 1", "waits", "goes on"]


def test_time_that_was_waited_for_adds_up_even_where_no_answer_comes(monkeypatch):
    times = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("splitfed.training.link.time.perf_counter", lambda: next(times))
    traffic = Traffic()
    with traffic.waiting():
        pass
    with pytest.raises(OSError, match="lost"), traffic.waiting():
        raise OSError("lost")
    assert traffic.waited_s == 3.5
