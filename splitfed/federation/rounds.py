"""When a round opens, who is in it, and when it is over: a pure state machine, with the clock passed in."""

from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Where a run stands."""

    WAITING = "waiting"
    OPEN = "open"
    FINISHED = "finished"


class _Place(Enum):
    """Where a member is: taking part, silent or not back yet, or gone by its own word."""

    HERE = "here"
    SILENT = "silent"
    LEFT = "left"
    LEFT_FOR_GOOD = "left for good"


@dataclass
class _Member:
    weight: int
    last_progress_s: float
    place: _Place = _Place.HERE

    @property
    def is_here(self) -> bool:
        return self.place is _Place.HERE


@dataclass
class Rounds:
    """The rounds of one run.

    A round opens when the configured number of agents has joined. It is over when every member that still makes
    progress has submitted, at least one; a member that is silent for `timeout_s` is left out of the round and may come
    back in the next one. A member that leaves is not waited for at all, and an update that it submitted before counts;
    it may come back by joining again, unless it left for good.

    Attributes:
        agents: Agents to wait for.
        rounds: Rounds in the run.
        timeout_s: Seconds without progress after which a member is left out.
        committed: Rounds that are over.
    """

    agents: int
    rounds: int
    timeout_s: float
    committed: int = 0
    _members: dict[str, _Member] = field(default_factory=dict)
    _submitted: set[str] = field(default_factory=set)
    _is_open: bool = False
    _is_closed: bool = False

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        if self.committed >= self.rounds:
            return Phase.FINISHED
        return Phase.OPEN if self._is_open else Phase.WAITING

    @property
    def current(self) -> int:
        """The round that is open, or will be next, from 1."""
        return self.committed + 1

    @property
    def members(self) -> list[str]:
        """Every agent that ever joined, in the order of names."""
        return sorted(self._members)

    @property
    def joined(self) -> int:
        """Members that are here."""
        return sum(member.is_here for member in self._members.values())

    @property
    def is_abandoned(self) -> bool:
        """Every agent of the run left it for good, and no update of the open round waits to be written."""
        left = [member.place is _Place.LEFT_FOR_GOOD for member in self._members.values()]
        return self.phase is not Phase.FINISHED and not self._submitted and len(left) == self.agents and all(left)

    @property
    def submitted(self) -> list[str]:
        """Members whose update of the open round is here, in the order of names."""
        return sorted(self._submitted)

    def weight(self, client: str) -> int:
        """Give a member's weight in every mean."""
        return self._members[client].weight

    def restore(self, weights: dict[str, int], now_s: float) -> None:
        """Take up the members of a run that goes on; they count as here once they join again."""
        for client, weight in weights.items():
            self._members[client] = _Member(weight, now_s, _Place.SILENT)

    def can_join(self, client: str) -> bool:
        """Say whether there is room for this agent, or it is a member already."""
        return client in self._members or len(self._members) < self.agents

    def join(self, client: str, weight: int, now_s: float) -> None:
        """Take an agent in, or back in. The first round opens with the last agent that was waited for.

        Raises:
            ValueError: If the run has its agents already, or this one left for good.
        """
        if not self.can_join(client):
            raise ValueError(f"The run has all its agents ({self.agents}); {client!r} is not one of them.")
        if self.has_left_for_good(client):
            raise ValueError(f"{client!r} left the run for good.")
        self._members[client] = _Member(weight, now_s)
        self._open_if_all_are_here()

    def leave(self, client: str, now_s: float, *, for_good: bool) -> bool:
        """Note that a member goes of its own accord; that it leaves for good it cannot take back.

        An open round goes on without it. One that is yet to open waits for it like for a silent one, unless it left for
        good.

        Returns:
            False if that was known already.
        """
        member = self._members[client]
        place = _Place.LEFT_FOR_GOOD if for_good else _Place.LEFT
        if member.place in (place, _Place.LEFT_FOR_GOOD):
            return False
        member.place, member.last_progress_s = place, now_s
        self._open_if_all_are_here()
        return True

    def has_left(self, client: str) -> bool:
        """Say whether a member left, for good or not, and has not joined again."""
        return self._members[client].place in (_Place.LEFT, _Place.LEFT_FOR_GOOD)

    def has_left_for_good(self, client: str) -> bool:
        """Say whether an agent left for good."""
        return client in self._members and self._members[client].place is _Place.LEFT_FOR_GOOD

    def progress(self, client: str, now_s: float) -> None:
        """Note that a member is at work. What still comes from one that left changes nothing: it has to join again."""
        member = self._members[client]
        if not self.has_left(client):
            member.last_progress_s, member.place = now_s, _Place.HERE

    def has_submitted(self, client: str) -> bool:
        """Say whether this member's update of the open round is here."""
        return client in self._submitted

    def submit(self, client: str, round: int, now_s: float) -> bool:
        """Note a member's update.

        Returns:
            False if it was here already: it must not be counted again.

        Raises:
            ValueError: If that round is not open.
        """
        if self.phase is not Phase.OPEN or round != self.current:
            raise ValueError(f"Round {round} is not open; the run is at round {self.current} ({self.phase.value}).")
        self.progress(client, now_s)
        if client in self._submitted:
            return False
        if self._is_closed:
            raise ValueError(f"Round {round} is closed; {client!r} takes part in the next one.")
        self._submitted.add(client)
        return True

    def leave_out_silent(self, now_s: float) -> list[str]:
        """Leave out the members of the open round that were silent for too long.

        Where too few are left to open a round at all, the silent ones are left out of the wait as well.

        Returns:
            Those that were left out by this call, in the order of names.
        """
        if self.phase is Phase.FINISHED or len(self._members) < self.agents:
            return []
        silent = [
            client
            for client, member in sorted(self._members.items())
            if member.is_here and client not in self._submitted and now_s - member.last_progress_s > self.timeout_s
        ]
        for client in silent:
            self._members[client].place = _Place.SILENT
        if self.phase is Phase.WAITING and self.joined and self._all_silent_since(now_s):
            self._is_open = True
        return silent

    def is_complete(self) -> bool:
        """Say whether the open round has every update that it waits for, and at least one."""
        if self._is_closed:
            return True
        waited_for = {client for client, member in self._members.items() if member.is_here}
        return self.phase is Phase.OPEN and bool(self._submitted) and waited_for <= self._submitted

    def close(self) -> None:
        """Take no more updates: whoever comes back while the round is being written takes part in the next one.

        Raises:
            ValueError: If it still waits for someone.
        """
        if not self.is_complete():
            raise ValueError(f"Round {self.current} still waits for updates.")
        self._is_closed = True

    def commit(self) -> int:
        """Open the next round, now that this one is written.

        Returns:
            The round that is over.

        Raises:
            ValueError: If it still waits for someone.
        """
        self.close()
        self.committed += 1
        self._submitted.clear()
        self._is_closed = False
        return self.committed

    def _open_if_all_are_here(self) -> None:
        """Open the first round once every agent is here, save those that left for good."""
        awaited = [member for member in self._members.values() if member.place is not _Place.LEFT_FOR_GOOD]
        if awaited and len(self._members) == self.agents and all(member.is_here for member in awaited):
            self._is_open = True

    def _all_silent_since(self, now_s: float) -> bool:
        return all(
            member.place in (_Place.HERE, _Place.LEFT_FOR_GOOD) or now_s - member.last_progress_s > self.timeout_s
            for member in self._members.values()
        )
