"""Work that stops where it needs an answer, so that one thread can carry several clients on in turn."""

from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

R = TypeVar("R")

Work: TypeAlias = Generator[Future[Any], None, R]
"""Yields a future that has to be done before it is carried on; what it returns is its result."""


def done(work: Work[R], *, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> R:
    """Carry work on to its end, waiting wherever it does.

    Args:
        work: The work, at its beginning or anywhere later.
        waiting: Gives what is entered while it waits.
    """
    while True:
        try:
            answer = next(work)
            with waiting():
                wait([answer])
        except StopIteration as end:
            result: R = end.value
            return result
