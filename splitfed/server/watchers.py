"""Those who watch a run: each is told of every change that it can see, until the run is over or the server drains."""

import asyncio
from collections.abc import AsyncIterator, Callable

from splitfed.federation import Phase, Rounds

_View = tuple[Phase, int, bool, bool, bool]
"""What a member sees: the phase, the round, whether its update is in, whether it may start, whether the server drains.
"""


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
        asks = {client for client in self._rounds.members if not self._rounds.has_left_for_good(client)}
        return self._rounds.phase is Phase.FINISHED and self._told_end >= asks

    async def watch(self, client: str) -> AsyncIterator[tuple[Phase, int, bool]]:
        """Yield the run's phase, current round, and whether this client's update is in, at every change.

        A change of whether the client may start counts as one; `Rounds.may_start` says it.
        """
        view: _View | None = None
        while True:
            view = await self._next_view(client, view)
            if view[0] is Phase.OPEN and not view[2]:  # who watches is there, and waits to be asked
                self._rounds.progress(client, self._clock())
                view = self._view(client)
            phase, round, is_submitted, _, _ = view
            yield phase, round, is_submitted
            if phase is Phase.FINISHED:
                self._told_end.add(client)
                await self.tell()
                return
            if self.is_draining:
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
        is_submitted = rounds.has_submitted(client)
        return rounds.phase, rounds.current, is_submitted, rounds.may_start(client), self.is_draining
