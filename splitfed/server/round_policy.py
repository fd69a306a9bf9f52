"""Who is asked to take part in a round, and when it is over: from the configuration to the policy."""

from typing import Final

from splitfed.config import ServerConfig
from splitfed.federation import RoundPolicy
from splitfed.federation.variants import variant_of

LONGEST_LOOK_S: Final = 2.0
"""Twice the time between two ticks: what passes beyond it has passed while nobody was served."""


def round_policy(config: ServerConfig) -> RoundPolicy:
    """Give a run's policy of who is asked to take part in a round, and when it is over."""
    federation = config.federation
    return RoundPolicy(
        cohort=federation.cohort,
        over_selection=federation.over_selection,
        quorum=federation.quorum,
        straggler_margin=federation.straggler_margin,
        merges_late=federation.late_updates == "merge",
        takes_turns=variant_of(federation.variant).takes_turns,
        local_steps=config.training.local_steps,
        seed=config.run.seed,
        longest_look_s=LONGEST_LOOK_S,
    )
