"""How an agent goes when it stops for a reason of its own: one word to the server, which never gets in the way."""

import logging
from collections.abc import Callable
from contextlib import closing

from splitfed.agent.server_calls import ServerCalls
from splitfed.errors import JoinRefused, ServerUnreachable, SplitFedError

_log = logging.getLogger(__name__)

_FOR_GOOD = 3
"""Exit status of what the same agent would meet again in the same run."""


def leave(connect: Callable[[], ServerCalls], run_id: str, error: BaseException) -> None:
    """Tell the server that this agent stops, so that nobody waits for it: one try, with a short deadline.

    The server learns that the agent stops, and whether for good, which its absence shows anyway. It learns no reason.
    An agent that is refused when it comes back has not left for good: that is the server's to say.

    Args:
        connect: Opens a connection; the one before may hold what stopped the agent.
        run_id: The run that the agent has joined.
        error: What stops the agent; it may be a signal.
    """
    if isinstance(error, ServerUnreachable):
        return
    try:
        with closing(connect()) as calls:
            is_for_good = getattr(error, "exit_code", 0) == _FOR_GOOD and not isinstance(error, JoinRefused)
            calls.leave(run_id, for_good=is_for_good)
    except SplitFedError as failure:
        _log.info("the server did not hear that this agent stops (%s)", str(failure).rstrip("."))
