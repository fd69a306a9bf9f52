"""How fast members are, and from when on one of them is too slow: by what the others need, never by a constant."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_high


@dataclass
class WatchedClock:
    """Time that passes while someone looks.

    A clock may jump, and a server may stand still (a suspended machine, a loop that is held up): members could not have
    been served meanwhile, so that the time is no one's fault.

    Attributes:
        longest_look_s: Seconds between two looks at most; of a longer gap, this much has passed.
        now_s: Seconds that have passed.
    """

    longest_look_s: float = math.inf
    now_s: float = 0.0
    _last_s: float | None = None

    def look(self, now_s: float) -> float:
        """Take up what a clock says; gives the seconds that have passed."""
        if self._last_s is not None:
            self.now_s += min(max(now_s - self._last_s, 0.0), self.longest_look_s)
        self._last_s = now_s
        return self.now_s


@dataclass
class Pace:
    """One member's way through a round. All times are a `WatchedClock`'s.

    Attributes:
        started_s: When it could start; None: it waits for its turn.
        steps: Local steps that it has made.
        stepped_s: When the last of them was over.
        submitted_s: When its update came; None: it is on its way.
        has_moved: It has given a sign of life since it was asked.
    """

    started_s: float | None = None
    steps: int = 0
    stepped_s: float = 0.0
    submitted_s: float | None = None
    has_moved: bool = False

    def start(self, now_s: float) -> None:
        """Note that it may start, now or once more."""
        self.started_s, self.steps = now_s, 0

    def note(self, now_s: float, steps: int | None) -> None:
        """Note a sign of life and, where they are told, the local steps made so far."""
        self.has_moved = True
        if steps is not None:
            self.steps, self.stepped_s = steps, now_s

    def waits_s(self, now_s: float) -> float:
        """Say for how long the round has waited for it; 0 before its turn."""
        return 0.0 if self.started_s is None else now_s - self.started_s

    def duration_s(self, now_s: float, local_steps: int) -> float | None:
        """Give the time that it took, or will take at the pace of its steps so far; None before its turn.

        Without a step to go by, and at the least, that is the time that it has taken already.
        """
        if self.started_s is None:
            return None
        if self.submitted_s is not None:
            return self.submitted_s - self.started_s
        projected_s = (self.stepped_s - self.started_s) * local_steps / self.steps if self.steps else 0.0
        return max(projected_s, now_s - self.started_s)


def deadline_s(durations_s: Iterable[float | None], margin: float) -> float:
    """Say how long a round waits for a member from its start on: the margin times the median of all durations.

    The median is the upper one of two, so that while half of the members are at work it is one of theirs: they are
    never cut off because a few are fast.

    Args:
        durations_s: `Pace.duration_s` of each member; None: it does not count.
        margin: How many times the median; 1 or more.

    Returns:
        Seconds; infinite without any duration.

    Guarantees:
        * While at least half of the members that have started at once are at work, none of these is past it.
        * It does not hang on the durations of the slower half, however slow they are.
    """
    known_s = [duration_s for duration_s in durations_s if duration_s is not None]
    return margin * median_high(known_s) if known_s else math.inf
