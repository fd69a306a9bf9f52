"""What came with an update, a round's line of figures, and what was out of the ordinary, in words too."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

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
        server_seconds: Seconds in which a request of this agent was in hand, others that it waited for included.
    """

    tokens: int = 0
    training_loss: float | None = None
    held_out_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0


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
                "server_seconds": round(contribution.server_seconds, 3),
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


def happenings(
    rounds: Rounds, *, refused: Mapping[str, str], left_out: Collection[str]
) -> dict[str, Collection[str] | int]:
    """Say what became of the members of a round that is closed, as far as it is out of the ordinary.

    Args:
        rounds: The rounds, before the next one opens.
        refused: Whose update is not in this round, and why.
        left_out: Whose update the rule has left out.

    Returns:
        Any of ``selected`` (who was asked, in a run with a cohort), ``replaced`` (who went, and who was asked instead),
        ``left`` (who said that it stops), ``silent`` (of whom nothing was heard), ``taken_out`` (who had no place in
        the round's joint steps, or lost it), ``begun_again`` (how often they began again for all), ``late`` (whom the
        round was closed without), ``dropped`` (whose late update was given up in this round), ``merged`` (whose late
        update is in this round, and the round that it was made in), ``refused`` and ``left_out``.
    """
    absences = rounds.absences
    said: dict[str, Collection[str] | int] = {
        "selected": rounds.selected if rounds.policy.cohort is not None else [],
        "replaced": rounds.replaced,
        "left": sorted(absences.left),
        "silent": sorted(absences.silent),
        "taken_out": rounds.taken_out,
        "begun_again": absences.begun_again,
        "late": rounds.late,
        "dropped": rounds.dropped,
        "merged": rounds.merged,
        "refused": dict(sorted(refused.items())),
        "left_out": list(left_out),
    }
    return {name: what for name, what in said.items() if what}


_IN_WORDS: Final[dict[str, str]] = {
    "selected": "asked were {}",
    "replaced": "asked in place of one that went or was refused: {}",
    "left": "left: {}",
    "silent": "nothing was heard of {}",
    "taken_out": "no place in its joint steps had {}",
    "begun_again": "begun again: {}",
    "late": "closed while at work: {}",
    "dropped": "late and dropped: {}",
    "merged": "late and taken: {}",
    "refused": "refused: {}",
    "left_out": "left out by the rule: {}",
}


def in_words(happened: Mapping[str, Collection[str] | int]) -> str:
    """Write what `happenings` gives for a person."""

    def names(what: str, who: Collection[str] | int) -> str:
        if isinstance(who, int):
            return "once" if who == 1 else f"{who} times"
        if not isinstance(who, Mapping) or what == "refused":
            return ", ".join(who)
        pattern = "{1} for {0}" if what == "replaced" else "{0} (of round {1})"
        return ", ".join(pattern.format(*pair) for pair in who.items())

    return "; ".join(_IN_WORDS[what].format(names(what, who)) for what, who in happened.items())


def here(joined: int, agents: int) -> str:
    """Write how many are here, of those that the first round waits for, as long as they are no more than these."""
    return f"{joined} of {agents} here" if joined <= agents else f"{joined} here"
