"""What becomes of a round's updates: one adapter, by the run's rule."""

from splitfed.federation.aggregate.aggregator import Aggregate, Aggregator, Turn, Update
from splitfed.federation.aggregate.choose import make_aggregator
from splitfed.federation.aggregate.fixed_point import MAX_MAGNITUDE, MAX_TOTAL_WEIGHT, FixedPointMean
from splitfed.federation.aggregate.flora import merged
from splitfed.federation.aggregate.freezing import trained_factors
from splitfed.federation.aggregate.low_rank import at_rank
from splitfed.federation.aggregate.refusal import UpdateRefused

__all__ = [
    "MAX_MAGNITUDE",
    "MAX_TOTAL_WEIGHT",
    "Aggregate",
    "Aggregator",
    "FixedPointMean",
    "Turn",
    "Update",
    "UpdateRefused",
    "at_rank",
    "make_aggregator",
    "merged",
    "trained_factors",
]
