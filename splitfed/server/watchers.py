"""Those who watch a run: each is told of every change that it can see, until the run is over or the server drains."""

import asyncio
from collections.abc import AsyncIterator, Callable

from splitfed.federation import Phase, Rounds

_View = tuple[Phase, int, bool, bool, bool]
"""What a member sees: the phase, the round, whether its update is in or was refused, whether it may start, whether the
server drains."""


class Watchers:
    """The members that watch a run. All methods run on the event loop.

    Args:
        rounds: Where the run stands.
        clock: Monotonic seconds.

    Attributes:
        is_draining: The server takes no more work; who watches is told, and then let go.
    """

    def __init__(self, rounds: Rounds, clock: Callable[[], float]) -> None:
        self.is_draining = False
        self._rounds = rounds
        self._clock = clock
        self._changed = asyncio.Condition()
        self._told_end: set[str] = set()

    @property
    def has_ended(self) -> bool:
        """The run is over and every member that may still ask knows it."""
        return self._rounds.phase is Phase.FINISHED and not self.unaware

    @property
    def unaware(self) -> list[str]:
        """Members that did not leave, and have not heard yet that the run is over, in the order of names."""
        return [c for c in self._rounds.members if c not in self._told_end and not self._rounds.has_left(c)]

    async def watch(self, client: str) -> AsyncIterator[tuple[Phase, int, bool]]:
        """Yield the run's phase, current round, and whether this client's update is in or was refused, at every change.

        A change of whether the client may start counts as one; `Rounds.may_start` says it.
        """
        view: _View | None = None
        while True:
            view = await self._next_view(client, view)
            if view[0] is Phase.OPEN and not view[2]:  # who watches is there, and waits to be asked
                self._rounds.progress(client, self._clock())
                view = self._view(client)
            phase, round, is_submitted, _, _ = view
            if phase is Phase.FINISHED:  # noted before: who has read it may hang up, and this is then over
                self._told_end.add(client)
                await self.tell()
            yield phase, round, is_submitted
            if phase is Phase.FINISHED or self.is_draining:
                return

    async def tell(self) -> None:
        """Let everyone look again."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_for_end(self) -> None:
        """Wait until the run is over and every member knows."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.has_ended)

    async def _next_view(self, client: str, seen: _View | None) -> _View:
        async with self._changed:
            await self._changed.wait_for(lambda: self._view(client) != seen)
            return self._view(client)

    def _view(self, client: str) -> _View:
        rounds = self._rounds
        return rounds.phase, rounds.current, rounds.is_done(client), rounds.may_start(client), self.is_draining
