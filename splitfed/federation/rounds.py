"""When a round opens, who is in it, and when it is over: a pure state machine, with the clock passed in."""

from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Where a run stands."""

    WAITING = "waiting"
    OPEN = "open"
    FINISHED = "finished"


@dataclass
class _Member:
    weight: int
    last_progress_s: float
    is_here: bool = True


@dataclass
class Rounds:
    """The rounds of one run.

    A round opens when the configured number of agents has joined. It is over when every member that still makes
    progress has submitted, at least one; a member that is silent for `timeout_s` is left out of the round and may come
    back in the next one.

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
    def submitted(self) -> list[str]:
        """Members whose update of the open round is here, in the order of names."""
        return sorted(self._submitted)

    def weight(self, client: str) -> int:
        """Give a member's weight in every mean."""
        return self._members[client].weight

    def restore(self, weights: dict[str, int], now_s: float) -> None:
        """Take up the members of a run that goes on; they count as here once they join again."""
        for client, weight in weights.items():
            self._members[client] = _Member(weight, now_s, is_here=False)

    def can_join(self, client: str) -> bool:
        """Say whether there is room for this agent, or it is a member already."""
        return client in self._members or len(self._members) < self.agents

    def join(self, client: str, weight: int, now_s: float) -> None:
        """Take an agent in, or back in. The first round opens with the last agent that was waited for.

        Raises:
            ValueError: If the run has its agents already.
        """
        if not self.can_join(client):
            raise ValueError(f"The run has its {self.agents} agents already; {client!r} is not one of them.")
        self._members[client] = _Member(weight, now_s)
        if len(self._members) == self.agents and self.joined == self.agents:
            self._is_open = True

    def progress(self, client: str, now_s: float) -> None:
        """Note that a member is at work."""
        member = self._members[client]
        member.last_progress_s = now_s
        member.is_here = True

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
            self._members[client].is_here = False
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

    def _all_silent_since(self, now_s: float) -> bool:
        return all(
            member.is_here or now_s - member.last_progress_s > self.timeout_s for member in self._members.values()
        )
