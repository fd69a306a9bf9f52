"""The agent daemon: from a configuration to the end of the run, or a clean stop."""

import logging
import signal
from types import FrameType

from rich.console import Console

from splitfed.agent.loop import Agent
from splitfed.agent.progress import Progress
from splitfed.agent.state import AgentState
from splitfed.config import AgentConfig, refuse_plain_text
from splitfed.training.runtime import prepare_process

_log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """A signal asked the agent to stop."""


def run_agent(config: AgentConfig, *, insecure: bool = False) -> int:
    """Take part in a run until it is over or a signal asks to stop.

    Args:
        config: The agent's configuration.
        insecure: Allow plain text beyond this machine.

    Returns:
        The exit status: 0 when the run is over or a signal came.

    Raises:
        SplitFedError: What keeps the agent from taking part.
    """
    refuse_plain_text(
        {"agent.server": config.agent.server, "agent.fed_server": config.agent.fed_server},
        has_tls=config.tls is not None,
        insecure=insecure,
    )
    prepare_process(config.agent.threads)
    state = AgentState(config.agent.state_directory)
    progress = Progress(Console(stderr=True))
    before = signal.signal(signal.SIGTERM, _stop)
    agent: Agent | None = None
    try:
        agent = Agent(config, state, progress)
        agent.run()
    except _Stopped:
        _log.info(
            "stopped by SIGTERM: the open round goes on without this agent, unless its update was sent; start it "
            "again, and it takes part again"
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        progress.close()
        if agent is not None:
            agent.close()
        state.close()
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped
