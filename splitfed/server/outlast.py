"""Work on the event loop that is finished even if whoever asked for it no longer waits."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from splitfed.errors import SplitFedError

T = TypeVar("T")


async def outlasting(work: Awaitable[T]) -> T:
    """Wait for work that goes on when the waiting is cancelled, as it is where a stream or a call breaks.

    Args:
        work: A coroutine or a future; it is begun in any case.

    Returns:
        What comes of it.

    Guarantees:
        * Cancelling the waiting does not cancel the work.
        * An answer that nobody waits for any more is no error of the server where it is a `SplitFedError`; anything
          else that goes wrong then is logged.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_hear)
        raise


def _hear(task: asyncio.Future[Any]) -> None:
    """Take what went wrong for heard, unless nobody foresaw it."""
    if task.cancelled() or (error := task.exception()) is None or isinstance(error, SplitFedError):
        return
    task.get_loop().call_exception_handler(
        {"message": "What nobody waited for any more went wrong", "exception": error, "future": task}
    )
