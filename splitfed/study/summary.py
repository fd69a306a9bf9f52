"""What a round amounts to over its agents.

None stands for not shared, an infinite epsilon for nothing guaranteed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from splitfed.study.record import AgentRound, Round, RunRecord

CHANNELS = {"smashed": "smashed data", "output_gradient": "output gradient", "adapter": "adapter update"}
"""Names for readers, by channel, in the order in which a step makes the releases."""

LossName = Literal["training_loss", "held_out_loss"]
Direction = Literal["up", "down"]


@dataclass(frozen=True)
class TimeSplit:
    """Where an agent's time went, in seconds.

    Attributes:
        agent_s: It did not wait.
        link_s: It waited, and the server had nothing of it in hand.
        server_s: It waited, and the server had a request of it in hand.
    """

    agent_s: float
    link_s: float
    server_s: float

    @property
    def whole_s(self) -> float:
        """All of it."""
        return self.agent_s + self.link_s + self.server_s


def mean_loss(finished: Round, name: LossName) -> float | None:
    """Mean of a loss over the agents that share it, by the weight that their adapters have in the average."""
    shared = [agent for agent in finished.agents.values() if getattr(agent, name) is not None]
    if not shared:
        return None
    weights = [agent.weight for agent in shared if agent.weight]
    if len(weights) < len(shared):
        weights = [1] * len(shared)
    losses = [float(getattr(agent, name)) for agent in shared]
    return math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def time_split(agent: AgentRound) -> TimeSplit | None:
    """Split an agent's round by what both sides have measured; None where one of them has not."""
    if agent.seconds is None or agent.waiting_seconds is None or agent.server_seconds is None:
        return None
    waiting_s = min(agent.waiting_seconds, agent.seconds)
    server_s = min(agent.server_seconds, waiting_s)
    return TimeSplit(agent.seconds - waiting_s, waiting_s - server_s, server_s)


def total_bytes(agents: Iterable[AgentRound], direction: Direction) -> int | None:
    """Bytes on the wire in one direction."""
    counts = [getattr(agent, f"bytes_{direction}") for agent in agents]
    shared = [count for count in counts if count is not None]
    return sum(shared) if shared else None


def bytes_per_token(agents: Iterable[AgentRound], direction: Direction) -> float | None:
    """Bytes on the wire in one direction ÷ tokens, over the agents of which both are known."""
    pairs = [(getattr(agent, f"bytes_{direction}"), agent.tokens) for agent in agents]
    known = [(count, tokens) for count, tokens in pairs if count is not None and tokens]
    return sum(count for count, _ in known) / sum(tokens for _, tokens in known) if known else None


def epsilon(agent: AgentRound, channel: str) -> float | None:
    """Epsilon of a channel: None where it was not shared, infinity where nothing is guaranteed."""
    if agent.epsilon is None or channel not in agent.epsilon:
        return None
    value = agent.epsilon[channel]
    return math.inf if value is None else value


def largest_epsilon(finished: Round, channel: str) -> float | None:
    """The largest epsilon of a channel among the agents that share it."""
    return max(
        (value for agent in finished.agents.values() if (value := epsilon(agent, channel)) is not None), default=None
    )


def channels(rounds: Sequence[Round]) -> list[str]:
    """The channels to show: the two of every step, and any other that an agent accounts for."""
    found = {name for one in rounds for agent in one.agents.values() for name in agent.epsilon or {}}
    return [name for name in CHANNELS if name in {"smashed", "output_gradient"} | found] + sorted(found - set(CHANNELS))


def total_statements(record: RunRecord) -> dict[str, list[str]]:
    """What the agents say holds for all channels together at the end of the last round, and who says it."""
    said: dict[str, list[str]] = {}
    for name, agent in record.rounds[-1].agents.items() if record.rounds else ():
        if agent.total is not None:
            said.setdefault(agent.total, []).append(name)
    return said
