"""Calls of a group: who waits for whom, who goes, and that nobody waits for ever."""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfed.errors import ProtocolError, RoundLost, ServerUnreachable
from splitfed.training.barrier import Barrier, Key, hand_out, open_answer

FORWARD, BACKWARD, STEP = ("forward", 0, 0), ("backward", 0, 0), ("step", 0, 0)


class Group:
    """A barrier whose calls are run as they come, and give each member its own name with what it asked."""

    def __init__(self, *members: str) -> None:
        self.ran: list[tuple[Key, list[str], list[Any]]] = []
        self.barrier = Barrier(members, self._run)

    def _run(self, key: Key, members: Sequence[str], asked: Sequence[Any]) -> Future[Any]:
        self.ran.append((key, list(members), list(asked)))
        done: Future[Any] = Future()
        done.set_result([f"{member}: {argument}" for member, argument in zip(members, asked, strict=True)])
        return done


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_a_call_is_run_once_all_have_made_it_in_the_order_of_names(order: tuple[str, ...]) -> None:
    group = Group("c", "a", "b")
    answers = {}
    for count, member in enumerate(order, start=1):
        answers[member] = group.barrier.ask(FORWARD, member, member.upper())
        assert len(group.ran) == (count == 3)
    assert group.ran == [(FORWARD, ["a", "b", "c"], ["A", "B", "C"])]
    assert {member: answer.result(0) for member, answer in answers.items()} == {"a": "a: A", "b": "b: B", "c": "c: C"}


def test_those_that_a_call_waits_for_are_missing() -> None:
    group = Group("a", "b", "c")
    assert group.barrier.missing() == set()
    group.barrier.ask(FORWARD, "b", 1)
    assert group.barrier.missing() == {"a", "c"}
    group.barrier.ask(FORWARD, "a", 1)
    assert group.barrier.missing() == {"c"}
    group.barrier.ask(FORWARD, "c", 1)
    assert group.barrier.missing() == set()


def test_a_member_that_leaves_is_waited_for_no_longer_and_what_it_asked_fails() -> None:
    group = Group("a", "b", "c")
    lost = group.barrier.ask(FORWARD, "b", 1)
    kept = group.barrier.ask(FORWARD, "a", 1)
    group.barrier.leave("b")
    with pytest.raises(RoundLost, match="goes on without this agent; it takes part again when it is asked"):
        lost.result(0)
    assert not kept.done()
    group.barrier.leave("c")
    assert kept.result(0) == "a: 1"
    assert group.ran == [(FORWARD, ["a"], [1])]


def test_whatever_comes_from_one_that_has_left_fails_and_holds_nobody_up() -> None:
    group = Group("a", "b")
    group.barrier.leave("b")
    group.barrier.leave("b")
    with pytest.raises(RoundLost):
        group.barrier.ask(FORWARD, "b", 1).result(0)
    assert group.barrier.ask(FORWARD, "a", 1).result(0) == "a: 1"


def test_all_may_leave_at_once_and_nothing_is_run() -> None:
    group = Group("a", "b", "c")
    asked = [group.barrier.ask(FORWARD, member, 1) for member in "ab"]
    for member in "abc":
        group.barrier.leave(member)
    assert [type(answer.exception(0)) for answer in asked[:1]] == [RoundLost]
    assert asked[1].done()
    assert group.barrier.missing() == set()
    assert [members for _, members, _ in group.ran] == []


def test_a_call_that_is_made_again_is_run_once_and_the_one_before_is_let_go() -> None:
    group = Group("a", "b")
    first = group.barrier.ask(FORWARD, "a", "old")
    again = group.barrier.ask(FORWARD, "a", "new")
    with pytest.raises(RoundLost, match="asked again elsewhere"):
        first.result(0)
    group.barrier.ask(FORWARD, "b", 1)
    assert again.result(0) == "a: new"
    assert group.ran == [(FORWARD, ["a", "b"], ["new", 1])]


def test_a_member_may_begin_again_until_something_of_it_was_run() -> None:
    group = Group("a", "b")
    first = group.barrier.ask(FORWARD, "a", "old")
    assert group.barrier.restart("a")
    with pytest.raises(RoundLost, match="before the round was started again"):
        first.result(0)
    group.barrier.ask(FORWARD, "b", 1)
    assert group.ran == []
    group.barrier.ask(FORWARD, "a", "new")
    assert group.ran == [(FORWARD, ["a", "b"], ["new", 1])]
    assert not group.barrier.restart("a")
    group.barrier.leave("b")
    assert not group.barrier.restart("b")


def test_closing_fails_what_waits_and_what_comes_each_with_an_error_of_its_own() -> None:
    group = Group("a", "b")
    waiting = group.barrier.ask(FORWARD, "a", 1)
    group.barrier.close(ServerUnreachable("The server is shutting down."))
    later = group.barrier.ask(FORWARD, "b", 1)
    errors = [answer.exception(0) for answer in (waiting, later)]
    assert [(type(error), str(error)) for error in errors] == [(ServerUnreachable, "The server is shutting down.")] * 2
    assert errors[0] is not errors[1]
    assert group.ran == []


def test_the_member_that_asks_for_something_else_goes_once_all_wait() -> None:
    group = Group("a", "b", "c")
    odd = group.barrier.ask(STEP, "a", 1)
    others = [group.barrier.ask(FORWARD, "b", 1)]
    assert not odd.done()
    others.append(group.barrier.ask(FORWARD, "c", 1))
    with pytest.raises(
        ProtocolError, match=r"out of step: the others of its round ask for the forward of step 0, micro-b"
    ):
        odd.result(0)
    assert [answer.result(0) for answer in others] == ["b: 1", "c: 1"]
    assert group.barrier.members == ["b", "c"]


def test_a_member_that_leaves_may_show_that_another_is_out_of_step() -> None:
    group = Group("a", "b", "c", "d")
    odd = group.barrier.ask(STEP, "a", 1)
    for member in "bc":
        group.barrier.ask(FORWARD, member, 1)
    group.barrier.leave("d")
    assert isinstance(odd.exception(0), ProtocolError)
    assert group.ran == [(FORWARD, ["b", "c"], [1, 1])]


def test_a_member_may_have_two_calls_open_at_once() -> None:
    group = Group("a", "b")
    mean = ("mean", 0, 0)
    answers = [group.barrier.ask(key, "a", 1) for key in (STEP, mean)]
    group.barrier.ask(STEP, "b", 1)
    assert [answer.done() for answer in answers] == [True, False]
    group.barrier.ask(mean, "b", 1)
    assert answers[1].result(0) == "a: 1"


def test_what_cannot_be_run_fails_for_all_that_asked_it() -> None:
    def cannot(key: Key, members: Sequence[str], asked: Sequence[Any]) -> Future[Any]:
        raise KeyError("shape")

    barrier = Barrier("ab", cannot)
    answers = [barrier.ask(FORWARD, member, 1) for member in "ab"]
    assert [type(answer.exception(0)) for answer in answers] == [KeyError, KeyError]


def test_a_part_that_is_an_error_is_one_members_alone() -> None:
    done: Future[Any] = Future()
    answers = [open_answer(), open_answer()]
    done.add_done_callback(lambda done: hand_out(done, answers))
    done.set_result([ProtocolError("Yours."), 2])
    assert str(answers[0].exception(0)) == "Yours."
    assert answers[1].result(0) == 2


def test_work_that_is_never_begun_because_the_engine_is_closed_is_answered_all_the_same() -> None:
    with ThreadPoolExecutor(1) as engine:
        held, answer = Future[None](), open_answer()
        engine.submit(held.result)
        engine.submit(lambda: ["never"]).add_done_callback(lambda done: hand_out(done, [answer]))
        engine.shutdown(wait=False, cancel_futures=True)
        held.set_result(None)
    with pytest.raises(ServerUnreachable, match="shut down before it came to this; come back"):
        answer.result(0)


def test_nobody_can_cancel_what_others_answer() -> None:
    group = Group("a", "b")
    waiting = group.barrier.ask(FORWARD, "a", 1)
    assert not waiting.cancel()
    group.barrier.ask(FORWARD, "b", 1)
    assert waiting.result(0) == "a: 1"


actions = st.tuples(st.sampled_from(["ask", "leave", "restart"]), st.sampled_from("abc"), st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=30), st.booleans())
def test_whatever_members_do_no_call_waits_while_all_wait_and_none_is_left_at_the_end(
    script: list[tuple[str, str, int]], closes: bool
) -> None:
    group = Group("a", "b", "c")
    answers: list[tuple[str, Future[Any]]] = []
    for what, member, index in script:
        if what == "ask":
            answers.append((member, group.barrier.ask(("forward", 0, index), member, len(answers))))
        elif what == "leave":
            group.barrier.leave(member)
        else:
            group.barrier.restart(member)
        waiting = {member for member, answer in answers if not answer.done()}
        assert waiting <= set(group.barrier.members)
        assert not waiting or waiting < set(group.barrier.members)
    assert all(members == sorted(members) for _, members, _ in group.ran)
    run = [argument for _, _, asked in group.ran for argument in asked]
    assert len(run) == len(set(run))
    if closes:
        group.barrier.close(RoundLost("It is over."))
    else:
        for member in "abc":
            group.barrier.leave(member)
    assert all(answer.done() for _, answer in answers)
