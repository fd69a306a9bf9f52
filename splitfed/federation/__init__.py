"""Rounds and aggregation: when a round is over, and what comes of it."""

from splitfed.federation.aggregate import (
    Aggregate,
    Aggregator,
    FixedPointMean,
    Turn,
    Update,
    UpdateRefused,
    at_rank,
    make_aggregator,
    merged,
    trained_factors,
)
from splitfed.federation.open_round import RoundPolicy
from splitfed.federation.rounds import Phase, Rounds

__all__ = [
    "Aggregate",
    "Aggregator",
    "FixedPointMean",
    "Phase",
    "RoundPolicy",
    "Rounds",
    "Turn",
    "Update",
    "UpdateRefused",
    "at_rank",
    "make_aggregator",
    "merged",
    "trained_factors",
]
