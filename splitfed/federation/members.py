"""The members of a run: who is here, who is silent, who left."""

from dataclasses import dataclass, field
from enum import Enum


class Place(Enum):
    """Where a member is: taking part, silent or not back yet, or gone by its own word."""

    HERE = "here"
    SILENT = "silent"
    LEFT = "left"
    LEFT_FOR_GOOD = "left for good"


@dataclass
class Member:
    """One member.

    Attributes:
        weight: What its updates count for.
        last_progress_s: When it was last heard of, or asked to start.
        place: Where it is.
    """

    weight: int
    last_progress_s: float
    place: Place = Place.HERE

    @property
    def is_here(self) -> bool:
        """It takes part."""
        return self.place is Place.HERE

    @property
    def has_left(self) -> bool:
        """It left, for good or not, and has not joined again."""
        return self.place in (Place.LEFT, Place.LEFT_FOR_GOOD)


@dataclass
class Members:
    """Every agent that ever joined.

    Attributes:
        agents: Agents to wait for before the first round.
        population: Agents that may ever join.
    """

    agents: int
    population: int
    _members: dict[str, Member] = field(default_factory=dict)

    def __getitem__(self, client: str) -> Member:
        return self._members[client]

    def __contains__(self, client: str) -> bool:
        return client in self._members

    def __len__(self) -> int:
        return len(self._members)

    @property
    def names(self) -> list[str]:
        """All of them, in the order of names."""
        return sorted(self._members)

    @property
    def here(self) -> set[str]:
        """Those that take part."""
        return {client for client, member in self._members.items() if member.is_here}

    @property
    def may_come(self) -> set[str]:
        """Those that did not leave for good."""
        return {client for client, member in self._members.items() if member.place is not Place.LEFT_FOR_GOOD}

    def expected(self, now_s: float, timeout_s: float) -> set[str]:
        """Give those that take part, and those that went so short a time ago that they may soon be back."""
        return {
            client
            for client in self.may_come
            if self._members[client].is_here or now_s - self._members[client].last_progress_s <= timeout_s
        }

    def restore(self, weights: dict[str, int], now_s: float) -> None:
        """Take up the members of a run that goes on; they count as here once they join again."""
        for client, weight in weights.items():
            self._members[client] = Member(weight, now_s, Place.SILENT)

    def can_join(self, client: str) -> bool:
        """Say whether there is room for this agent, or it is a member already."""
        return client in self._members or len(self._members) < self.population

    def join(self, client: str, weight: int, now_s: float) -> None:
        """Take an agent in, or back in.

        Raises:
            ValueError: If the run has its agents already, or this one left for good.
        """
        if not self.can_join(client):
            raise ValueError(f"The run has all its agents ({self.population}); {client!r} is not one of them.")
        if client in self._members and self._members[client].place is Place.LEFT_FOR_GOOD:
            raise ValueError(f"{client!r} left the run for good.")
        self._members[client] = Member(weight, now_s)

    def leave(self, client: str, now_s: float, *, for_good: bool) -> bool:
        """Note that a member goes of its own accord; that it leaves for good it cannot take back.

        Returns:
            False if that was known already.
        """
        member = self._members[client]
        place = Place.LEFT_FOR_GOOD if for_good else Place.LEFT
        if member.place in (place, Place.LEFT_FOR_GOOD):
            return False
        member.place, member.last_progress_s = place, now_s
        return True

    def are_all_here(self) -> bool:
        """Say whether the first round may open: nobody is waited for any more.

        That is once `agents` are here, or all that did not leave for good; after a restart, once all that were members
        before are back, so that the round is run again with those that it had.
        """
        awaited, here = self.may_come, self.here
        if not here or len(self) < self.agents:
            return False
        is_anyone_missing = any(self._members[client].place is Place.SILENT for client in awaited)
        return not is_anyone_missing and (len(here) >= self.agents or here == awaited)

    def are_others_silent(self, now_s: float, timeout_s: float) -> bool:
        """Say whether whoever is not here has been away for too long to be waited for."""
        return all(
            member.place in (Place.HERE, Place.LEFT_FOR_GOOD) or now_s - member.last_progress_s > timeout_s
            for member in self._members.values()
        )
