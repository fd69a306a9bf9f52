"""What joint steps usually take, from one round to the next: what a step is too slow by."""

from collections import deque
from statistics import median_high
from typing import Final

_STEPS_TO_GO_BY: Final = 3
_STEPS_KEPT: Final = 64
_ROUNDS_KEPT: Final = 16


class JointPace:
    """How long joint steps of the last rounds took.

    A round's first step is measured apart, from its first agent on: the others still fetch what they start from, so
    that it takes longer than the steps after it.

    Guarantees:
        * Nobody is too slow before three steps are known, or of first steps one.
        * Fewer than half of the known steps, however slow, do not make others seem fast.
    """

    def __init__(self) -> None:
        self._first_s: deque[float] = deque(maxlen=_ROUNDS_KEPT)
        self._later_s: deque[float] = deque(maxlen=_STEPS_KEPT)

    def note(self, seconds: float, *, is_first: bool) -> None:
        """Note how long a step took."""
        (self._first_s if is_first else self._later_s).append(seconds)

    def usual_s(self, *, is_first: bool) -> float | None:
        """Give the upper median of what steps take; None while too few are known."""
        known_s = self._first_s if is_first else self._later_s
        return median_high(known_s) if len(known_s) >= (1 if is_first else _STEPS_TO_GO_BY) else None
