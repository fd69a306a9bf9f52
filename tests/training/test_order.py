"""The order in which a client draws its examples."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.training.order import step_examples

PINNED = [1, 2, 7, 4, 9, 3, 8, 5, 0, 6]
STEP: dict[str, Any] = {"seed": 7, "client": "a", "round": 1, "step": 0, "batch_size": 4, "local_steps": 5}


def draw(n_examples: int, **changed: Any) -> list[int]:
    return step_examples(n_examples, **{**STEP, **changed})


def sequence(n_examples: int, *, rounds: int, batch_size: int, local_steps: int, **changed: Any) -> list[int]:
    """Everything that a client draws in its first rounds."""
    return [
        index
        for round_ in range(1, rounds + 1)
        for step in range(local_steps)
        for index in draw(
            n_examples, round=round_, step=step, batch_size=batch_size, local_steps=local_steps, **changed
        )
    ]


@given(
    n_examples=st.integers(1, 40),
    batch_size=st.integers(1, 60),
    local_steps=st.integers(1, 7),
    rounds=st.integers(1, 3),
)
def test_every_example_is_drawn_once_before_any_is_drawn_again(
    n_examples: int, batch_size: int, local_steps: int, rounds: int
) -> None:
    drawn = sequence(n_examples, rounds=rounds, batch_size=batch_size, local_steps=local_steps)
    assert len(drawn) == rounds * local_steps * batch_size
    for start in range(0, len(drawn), n_examples):
        one_pass = Counter(drawn[start : start + n_examples])
        assert max(one_pass.values()) == 1
        assert all(0 <= index < n_examples for index in one_pass)


def test_the_sequence_does_not_depend_on_how_it_is_cut_into_rounds_and_steps() -> None:
    whole = sequence(10, rounds=1, batch_size=30, local_steps=1)
    assert whole == sequence(10, rounds=3, batch_size=5, local_steps=2)
    assert whole == sequence(10, rounds=5, batch_size=1, local_steps=6)


def test_a_step_is_the_same_whatever_was_drawn_before() -> None:
    alone = draw(100, round=3, step=2)
    sequence(100, rounds=4, batch_size=4, local_steps=5)
    assert draw(100, round=3, step=2) == alone


def test_seed_client_and_pass_change_the_order() -> None:
    first = draw(100, batch_size=100)
    assert sorted(first) == list(range(100))
    assert first != list(range(100))
    orders = [
        first,
        draw(100, batch_size=100, seed=8),
        draw(100, batch_size=100, client="b"),
        draw(100, batch_size=100, step=1),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    # A resumed run must draw on as it began: this order must not change from version to version.
    assert draw(10, batch_size=10) == PINNED


@pytest.mark.parametrize("place", range(5))
def test_each_example_comes_first_about_equally_often(place: int) -> None:
    # 2000 clients, 5 examples: 400 expected, standard deviation sqrt(2000 * 0.2 * 0.8) = 17.9; 5 of them = 90.
    firsts = Counter(draw(5, client=str(client), batch_size=5)[place] for client in range(2000))
    assert all(abs(firsts[index] - 400) < 90 for index in range(5))


@pytest.mark.parametrize(
    "changed", [{"batch_size": 0}, {"local_steps": 0}, {"round": 0}, {"step": -1}, {"step": 5}, {"n_examples": 0}]
)
def test_an_argument_outside_its_range_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be 1 or more|rounds start at 1"):
        step_examples(**{"n_examples": 3, **STEP, **changed})
