"""What becomes of a round's updates: one adapter, by the run's rule."""

from splitfed.federation.aggregate.fixed_point import MAX_MAGNITUDE, MAX_TOTAL_WEIGHT, FixedPointMean

__all__ = ["MAX_MAGNITUDE", "MAX_TOTAL_WEIGHT", "FixedPointMean"]
