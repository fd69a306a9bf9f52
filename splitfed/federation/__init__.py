"""Rounds and aggregation: when a round is over, and what comes of it."""

from splitfed.federation.aggregate import FixedPointMean
from splitfed.federation.open_round import RoundPolicy
from splitfed.federation.rounds import Phase, Rounds

__all__ = ["FixedPointMean", "Phase", "RoundPolicy", "Rounds"]
