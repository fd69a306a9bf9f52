"""Several clients' work carried on in one thread, in an order that a virtual clock decides."""

import heapq
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from splitfed.training.work import Work

R = TypeVar("R")


def interleave(works: Mapping[str, Work[R]], seconds: Mapping[str, float] | None = None) -> dict[str, R]:
    """Carry the works on to their ends.

    Each is carried on as far as it needs an answer. An answer that is there takes the client its own virtual seconds;
    for one that is not there yet it waits until another client's work brings it about.

    Args:
        works: Work by client.
        seconds: What an answer takes each client; none: no time, so that they go on in turn, in the order of names.

    Returns:
        The results by client.

    Raises:
        RuntimeError: If all that are left wait for each other.

    Guarantees:
        * The order is a function of the arguments alone.
    """
    results: dict[str, R] = {}
    waiting: dict[str, tuple[float, Future[Any]]] = {}
    due = [(0.0, turn, name) for turn, name in enumerate(sorted(works))]
    turn = len(due)
    while due:
        now_s, _, name = heapq.heappop(due)
        try:
            waiting[name] = now_s, next(works[name])
        except StopIteration as end:
            results[name] = end.value
        for ready in [name for name, (_, answer) in waiting.items() if answer.done()]:
            asked_s, _ = waiting.pop(ready)
            takes_s = 0.0 if seconds is None else seconds[ready]
            heapq.heappush(due, (max(now_s, asked_s + takes_s), turn, ready))
            turn += 1
    if waiting:
        raise RuntimeError(f"{', '.join(sorted(waiting))} wait for each other; each client has to make the same calls.")
    return results
