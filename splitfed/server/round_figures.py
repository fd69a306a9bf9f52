"""What is counted while a round is open, by member; and what was counted since the server started."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from splitfed.server.contribution import Contribution


class RoundFigures:
    """The figures of the open round, and their sums since the server started.

    Args:
        clock: Monotonic seconds.

    Attributes:
        wire_bytes: Bytes by client and direction, since the server started.
        happened: How often what happened to members in rounds, since the server started.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.wire_bytes: Counter[tuple[str, str]] = Counter()
        self.happened: Counter[str] = Counter()
        self._clock = clock
        self.begin()

    @property
    def seconds(self) -> float:
        """How long the round has been open."""
        return self._clock() - self._started_s

    def begin(self) -> None:
        """Count from nothing: a round begins."""
        self._contributions: dict[str, Contribution] = {}
        self.start_clock()

    def start_clock(self) -> None:
        """Count seconds from here: the round has been waited for until now."""
        self._started_s = self._clock()

    def count_bytes(self, client: str, *, up: int = 0, down: int = 0) -> None:
        """Add to a client's traffic in this round."""
        contribution = self._of(client)
        contribution.bytes_up += up
        contribution.bytes_down += down
        self.wire_bytes[client, "up"] += up
        self.wire_bytes[client, "down"] += down

    def count_seconds(self, client: str, seconds: float) -> None:
        """Add to the time in which requests of a client were in hand in this round."""
        self._of(client).server_seconds += seconds

    def count_update(self, client: str, contribution: Contribution) -> None:
        """Take what a client says of its update, beside what was counted of it here."""
        here = self._of(client)
        self._contributions[client] = replace(
            contribution, bytes_up=here.bytes_up, bytes_down=here.bytes_down, server_seconds=here.server_seconds
        )

    def contributions(self, clients: Iterable[str]) -> dict[str, Contribution]:
        """Give what some clients came to."""
        return {client: self._contributions[client] for client in clients}

    def note(self, happenings: Mapping[str, Collection[str] | int]) -> None:
        """Add what happened in a round that is over: members, or how many."""
        for what, who in happenings.items():
            self.happened[what] += who if isinstance(who, int) else len(who)

    def _of(self, client: str) -> Contribution:
        return self._contributions.setdefault(client, Contribution())
