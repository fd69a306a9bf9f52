"""Updates whose round is over: who is late with one, and what becomes of it."""

from dataclasses import dataclass, field


@dataclass
class LateUpdates:
    """Late members, and what happened to their updates in the open round.

    Attributes:
        waited_for: Members at work on an update that will still be taken, and the round that it is made in.
        merged: Members whose late update is taken in the open round, and the round that it was made in.
        closed_without: Members that were at work on the open round when it was closed.
        dropped: Members whose late update was given up in the open round.
        refused: Members whose late update came in the open round and was refused, and why.
    """

    waited_for: dict[str, int] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    closed_without: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    _missed: dict[str, int] = field(default_factory=dict)

    @property
    def busy(self) -> set[str]:
        """Members that have no part in the open round, because of a late update."""
        return self.waited_for.keys() | self.merged.keys()

    def has_missed(self, client: str, round: int) -> bool:
        """Say whether a round was closed without this member while it was at work on it."""
        return self._missed.get(client) == round

    def miss(self, client: str, round: int, *, is_waited_for: bool) -> None:
        """Note that a round is closed without a member that is at work on it."""
        self.closed_without.add(client)
        self._missed[client] = round
        if is_waited_for:
            self.waited_for[client] = round
        else:
            self.dropped.add(client)

    def take(self, client: str, round: int) -> bool | None:
        """Take an update that was made in a round before the open one.

        Returns:
            True if it is to be counted in the open round, False if it is counted there already, None if it is not
            waited for.
        """
        if self.merged.get(client) == round:
            return False
        if self.waited_for.get(client) != round:
            return None
        self.merged[client] = self.waited_for.pop(client)
        return True

    def refuse(self, client: str, why: str) -> None:
        """Wait no longer for a late update that has come and cannot be counted."""
        del self.waited_for[client]
        self.refused[client] = why

    def give_up(self, client: str) -> None:
        """Wait no longer for a member's late update, if it has one."""
        if self.waited_for.pop(client, None) is not None:
            self.dropped.add(client)

    def give_up_all(self) -> None:
        """Wait no longer for anybody: there is no round left that would take it."""
        for client in list(self.waited_for):
            self.give_up(client)

    def begin_round(self) -> None:
        """Forget what happened in the round before."""
        self.merged.clear()
        self.closed_without.clear()
        self.dropped.clear()
        self.refused.clear()
