"""Several clients' work in one thread: an order that is decided by the arguments, and no silent deadlock."""

from concurrent.futures import Future

import pytest

from splitfed.training.interleave import interleave
from splitfed.training.work import Work


def there() -> Future[None]:
    answer: Future[None] = Future()
    answer.set_result(None)
    return answer


def steps(name: str, seen: list[str], count: int) -> Work[str]:
    for number in range(count):
        seen.append(f"{name}{number}")
        yield there()
    return name.upper()


def test_without_times_clients_go_on_in_turn_in_the_order_of_names() -> None:
    seen: list[str] = []
    works = {name: steps(name, seen, 2) for name in "cab"}
    assert interleave(works) == {"a": "A", "b": "B", "c": "C"}
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_one_that_takes_three_times_as_long_goes_on_a_third_as_often() -> None:
    seen: list[str] = []
    interleave({name: steps(name, seen, 6) for name in "ab"}, {"a": 1.0, "b": 3.0})
    before_b1 = seen[: seen.index("b1")]
    assert [name for name in before_b1 if name.startswith("a")] in (["a0", "a1", "a2"], ["a0", "a1", "a2", "a3"])
    assert seen[-1] == "b5"


def test_the_order_is_that_of_the_arguments_whatever_their_order() -> None:
    orders = []
    for names in ("abc", "bca"):
        seen: list[str] = []
        interleave({name: steps(name, seen, 4) for name in names}, {"a": 1.0, "b": 1.5, "c": 0.7})
        orders.append(seen)
    assert orders[0] == orders[1]


def test_one_waits_for_what_another_brings_about() -> None:
    met: Future[str] = Future()
    seen = []

    def waits() -> Work[None]:
        yield met
        seen.append(met.result())

    def answers() -> Work[None]:
        yield there()
        met.set_result("here")

    interleave({"a": waits(), "b": answers()})
    assert seen == ["here"]


def test_those_that_wait_for_each_other_are_named() -> None:
    def waits() -> Work[None]:
        yield Future()

    with pytest.raises(RuntimeError, match="a, c wait for each other; each client has to make the same calls"):
        interleave({"c": waits(), "b": steps("b", [], 2), "a": waits()})


def test_what_goes_wrong_in_one_is_raised() -> None:
    def fails() -> Work[None]:
        yield there()
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        interleave({"a": fails(), "b": steps("b", [], 1)})
