"""What came with an update, and a round's line of figures."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from splitfed.federation import Rounds
from splitfed.server.store import RunState


@dataclass
class Contribution:
    """What came with an update, for the metrics.

    Attributes:
        tokens: Rows that crossed the link in one direction in this round.
        training_loss: Mean training loss, if the agent's owner shares it.
        held_out_loss: Held-out loss, if the agent's owner shares it.
        bytes_up: Bytes that came from this agent in this round.
        bytes_down: Bytes that went to it.
    """

    tokens: int = 0
    training_loss: float | None = None
    held_out_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


def metrics_line(
    state: RunState,
    contributions: Mapping[str, Contribution],
    *,
    rounds: int,
    seconds: float,
    happenings: Mapping[str, object],
    aggregation: Mapping[str, float],
    ages: Mapping[int, int] | None = None,
) -> dict[str, object]:
    """Give the line that ``metrics.jsonl`` gets at a round's end.

    Args:
        state: The state at the round's end.
        contributions: Of each client whose update is in it.
        rounds: Rounds of the run.
        seconds: What the round took.
        happenings: What ``happenings`` gives.
        aggregation: Figures of the rule.
        ages: How many steps were applied at each age, where clients step as they come.
    """
    staleness = {}
    if ages:
        mean = sum(age * steps for age, steps in ages.items()) / sum(ages.values())
        staleness = {"staleness": {"mean": round(mean, 3), "oldest": max(ages)}}
    return {
        "round": state.round,
        "rounds": rounds,
        "seconds": round(seconds, 3),
        "agents": {
            client: {
                "weight": state.weights[client],
                "tokens": contribution.tokens,
                "bytes_up": contribution.bytes_up,
                "bytes_down": contribution.bytes_down,
                "training_loss": contribution.training_loss,
                "held_out_loss": contribution.held_out_loss,
            }
            for client, contribution in sorted(contributions.items())
        },
        "adapter": f"adapters/round-{state.round:04d}",
        "aggregation": dict(sorted(aggregation.items())),
        **staleness,
        **happenings,
    }


def happenings(rounds: Rounds) -> dict[str, Collection[str]]:
    """Say what became of the members of a round that is closed, as far as it is out of the ordinary.

    Returns:
        Any of ``selected`` (who was asked, in a run with a cohort), ``replaced`` (who went, and who was asked instead),
        ``taken_out`` (who had no place in the round's joint steps, or lost it), ``late`` (whom the round was closed
        without), ``dropped`` (whose late update was given up in this round), and ``merged`` (whose late update is in
        this round, and the round that it was made in).
    """
    said: dict[str, Collection[str]] = {
        "selected": rounds.selected if rounds.policy.cohort is not None else [],
        "replaced": rounds.replaced,
        "taken_out": rounds.taken_out,
        "late": rounds.late,
        "dropped": rounds.dropped,
        "merged": rounds.merged,
    }
    return {name: what for name, what in said.items() if what}
