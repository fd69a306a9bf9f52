"""What is said where no server answers."""

import logging

from splitfed.config.agent import AgentSection
from splitfed.errors import ServerUnreachable

_log = logging.getLogger(__name__)


def gave_up(agent: AgentSection, tries: int, reason: Exception) -> ServerUnreachable:
    """Say that no server answered for as long as the owner lets an agent try."""
    return ServerUnreachable(
        f"No server answered at {agent.server} (tries: {tries}, over {agent.retry_for_s:.0f} s); start it, or check "
        f"[agent] server, [tls] on both sides (last reason: {reason})."
    )


def goes_on(agent: AgentSection, tries: int, reason: Exception) -> None:
    """Say once that no server answers, and that it is tried again."""
    if tries == 0:
        _log.warning("no server at %s (%s); trying again", agent.server, reason)
