"""Calls that wait until every member of a group has made the same one."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from splitfed.errors import LinkError, ProtocolError, RoundLost, ServerUnreachable

_log = logging.getLogger(__name__)

Key = tuple[str, int, int]
"""What is asked, its local step, its micro-batch."""


class Barrier:
    """Gathers the calls of a group and hands them over together, in the order of the members' names.

    A future that it gives cannot be cancelled: whoever stops waiting leaves its call to the others. Not thread-safe,
    save that what `run` gives may end in any thread.

    Args:
        members: Names of those that are waited for.
        run: Given a call's key, the members and what each has asked, runs it; its future holds an answer for each, or
            the error that is this one's alone.

    Guarantees:
        * What is run, and in which order, does not depend on who came first.
        * A member that leaves is waited for no longer, and what it has asked fails with `RoundLost`.
        * A call that is made again before it was run is run once; the one before fails with `RoundLost`.
        * Once it is closed, or all members wait and not for the same, nobody waits.
    """

    def __init__(self, members: Iterable[str], run: Callable[[Key, Sequence[str], Sequence[Any]], Future[Any]]) -> None:
        self.members = sorted(members)
        self._run = run
        self._asked: dict[Key, dict[str, tuple[Any, Future[Any]]]] = {}
        self._begun: set[str] = set()
        self._closed: LinkError | None = None

    def ask(self, key: Key, member: str, argument: Any) -> Future[Any]:
        """Make a call; the future is done once all have made it and it was run.

        Args:
            key: Which call it is.
            member: Who makes it.
            argument: What it asks.
        """
        answer = open_answer()
        if self._closed is not None or member not in self.members:
            answer.set_exception(_lost() if self._closed is None else _copy(self._closed))
            return answer
        asked = self._asked.setdefault(key, {})
        if member in asked:
            asked[member][1].set_exception(RoundLost("The same was asked again elsewhere; that call is answered."))
        asked[member] = argument, answer
        self._go_on()
        return answer

    def leave(self, member: str) -> None:
        """Go on without a member."""
        if member in self.members:
            self.members.remove(member)
            self._take_back(member, _lost())
            self._go_on()

    def restart(self, member: str) -> bool:
        """Take back what a member has asked that makes its calls from the first one again.

        Returns:
            False if it cannot: one of them was run already, or it left.
        """
        if member in self._begun or member not in self.members:
            return False
        self._take_back(member, RoundLost("This was asked before the round was started again."))
        return True

    def close(self, error: LinkError) -> None:
        """Let everyone go: whatever waits, and whatever is asked from now on, fails with this."""
        self._closed = error
        asked, self._asked = self._asked, {}
        for calls in asked.values():
            for _, answer in calls.values():
                answer.set_exception(_copy(error))

    def missing(self) -> set[str]:
        """Name the members that a call of another one waits for."""
        return {member for asked in self._asked.values() if asked for member in self.members if member not in asked}

    def _go_on(self) -> None:
        """Run what all have asked; where all wait and nothing can be run, go on without those that are out of step."""
        while self._asked:
            complete = [key for key, asked in self._asked.items() if all(member in asked for member in self.members)]
            for key in sorted(complete):
                self._run_all(key, self._asked.pop(key, {}))
            if not complete and not self._let_those_out_of_step_go():
                return

    def _run_all(self, key: Key, asked: dict[str, tuple[Any, Future[Any]]]) -> None:
        members = [member for member in self.members if member in asked]
        if not members:
            return
        self._begun.update(members)
        answers = [asked[member][1] for member in members]
        begun: Future[Future[Any]] = Future()
        settle(begun, lambda: self._run(key, members, [asked[member][0] for member in members]))
        done = begun.result() if begun.exception() is None else begun
        done.add_done_callback(lambda done: hand_out(done, answers))

    def _let_those_out_of_step_go(self) -> bool:
        """Take the call that most wait for as the one that is due, the first by its key of several."""
        waiting = {member for asked in self._asked.values() for member in asked}
        if not waiting.issuperset(self.members):
            return False
        due = min(self._asked, key=lambda key: (-len(self._asked[key]), key))
        out_of_step = [member for member in self.members if member not in self._asked[due]]
        for member in out_of_step:
            self.members.remove(member)
            kind, step, micro_batch = due
            self._take_back(
                member,
                ProtocolError(
                    f"This agent is out of step: the others of its round ask for the {kind} of step {step}, "
                    f"micro-batch {micro_batch}; give all agents the same version of splitfed."
                ),
            )
        return bool(out_of_step)

    def _take_back(self, member: str, error: LinkError) -> None:
        for key, asked in list(self._asked.items()):
            if member in asked:
                asked.pop(member)[1].set_exception(_copy(error))
            if not asked:
                del self._asked[key]


def open_answer() -> Future[Any]:
    """Make a future that cannot be cancelled, so that whoever answers it needs not look."""
    answer: Future[Any] = Future()
    answer.set_running_or_notify_cancel()
    return answer


def settle(answer: Future[Any], work: Callable[[], Any]) -> None:
    """Run something, and make what comes of it the answer, an error too.

    Args:
        answer: Not done yet.
        work: What is run.
    """
    try:
        answer.set_result(work())
    except Exception as error:  # noqa: BLE001  # whatever went wrong is the answer
        _log.debug("what was asked for failed: %s", error)
        answer.set_exception(error)


def hand_out(done: Future[Any], answers: Sequence[Future[Any]]) -> None:
    """Give each its part of what was run for all, or the error.

    Args:
        done: What was run, over.
        answers: Those that wait for it, in the order of its parts; a part that is an error is this one's alone.
    """
    parts: Sequence[Any]
    if done.cancelled():
        parts = [ServerUnreachable("The server shut down before it came to this; come back when it is up again.")]
        parts *= len(answers)
    elif (error := done.exception()) is not None:
        parts = [error] * len(answers)
    else:
        parts = done.result()
    for answer, part in zip(answers, parts, strict=True):
        if isinstance(part, Exception):
            answer.set_exception(part)
        else:
            answer.set_result(part)


def _lost() -> RoundLost:
    return RoundLost("The round goes on without this agent; it takes part again when it is asked.")


def _copy(error: LinkError) -> LinkError:
    return type(error)(*error.args)
