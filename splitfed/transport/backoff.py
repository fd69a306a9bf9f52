"""How long to wait before the next try: growing, jittered, capped, and bounded by the time without progress."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0


@dataclass
class Backoff:
    """Pauses between tries.

    Attributes:
        give_up_after_s: Seconds without progress after which there is no further try.
        clock: Monotonic seconds.
        sleep: Waits for so many seconds.
        jitter: Gives a number in [0, 1).
    """

    give_up_after_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = field(default_factory=lambda: threading.Event().wait)
    jitter: Callable[[], float] = random.random
    _tries: int = 0
    _since: float | None = None

    @property
    def tries(self) -> int:
        """Failures since the last progress."""
        return self._tries

    def progress(self) -> None:
        """Note that something worked: the next failure is a first one again."""
        self._tries = 0
        self._since = None

    def pause(self) -> bool:
        """Wait after a failure.

        Returns:
            False if it is time to give up; nothing was waited for then.
        """
        now = self.clock()
        if self._since is None:
            self._since = now
        left_s = self._since + self.give_up_after_s - now
        if left_s <= 0:
            return False
        ceiling_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._tries, 16))
        self._tries += 1
        self.sleep(min(left_s, ceiling_s * (0.5 + 0.5 * self.jitter())))
        return True
