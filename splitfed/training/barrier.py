"""Calls that wait until every member of a group has made the same one."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from splitfed.errors import RoundLost

Key = tuple[str, int, int]
"""What is asked, its local step, its micro-batch."""


class Barrier:
    """Gathers the calls of a group and hands them over together, in the order of the members' names.

    Args:
        members: Names of those that are waited for.
        run: Given a call's key, the members and what each has asked, runs it; its future holds an answer for each.

    Guarantees:
        * What is run, and in which order, does not depend on who came first.
        * A member that leaves is waited for no longer, and what it has asked fails with `RoundLost`.
    """

    def __init__(self, members: Iterable[str], run: Callable[[Key, Sequence[str], Sequence[Any]], Future[Any]]) -> None:
        self.members = sorted(members)
        self._run = run
        self._asked: dict[Key, dict[str, tuple[Any, Future[Any]]]] = {}

    def ask(self, key: Key, member: str, argument: Any) -> Future[Any]:
        """Make a call; the future is done once all have made it and it was run.

        Args:
            key: Which call it is.
            member: Who makes it.
            argument: What it asks.
        """
        answer: Future[Any] = Future()
        if member not in self.members:
            answer.set_exception(_lost(member))
            return answer
        self._asked.setdefault(key, {})[member] = argument, answer
        self._run_if_complete(key)
        return answer

    def leave(self, member: str) -> None:
        """Go on without a member."""
        if member not in self.members:
            return
        self.members.remove(member)
        for asked in self._asked.values():
            if member in asked:
                asked.pop(member)[1].set_exception(_lost(member))
        for key in list(self._asked):
            self._run_if_complete(key)

    def missing(self) -> set[str]:
        """Name the members that a call of another one waits for."""
        return {member for asked in self._asked.values() if asked for member in self.members if member not in asked}

    def _run_if_complete(self, key: Key) -> None:
        asked = self._asked[key]
        if any(member not in asked for member in self.members):
            return
        del self._asked[key]
        if not asked:
            return
        members = list(self.members)
        answers = [asked[member][1] for member in members]
        done = self._run(key, members, [asked[member][0] for member in members])
        done.add_done_callback(lambda done: hand_out(done, answers))


def hand_out(done: Future[Any], answers: Sequence[Future[Any]]) -> None:
    """Give each its part of what was run for all, or the error.

    Args:
        done: What was run, over.
        answers: Those that wait for it, in the order of its parts.
    """
    error = done.exception()
    for index, answer in enumerate(answers):
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result()[index])


def _lost(member: str) -> RoundLost:
    return RoundLost(f"The round goes on without {member!r}.")
