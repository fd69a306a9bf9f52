"""The sessions of a round's members: opened, found again where a stream broke, and ended where a place is lost."""

import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from splitfed.config import ServerConfig
from splitfed.errors import RoundLost
from splitfed.federation import Phase, Rounds
from splitfed.federation.variants import variant_of
from splitfed.server.devices import Devices
from splitfed.server.engine import Engine
from splitfed.server.member_session import MemberSession
from splitfed.server.sessions import Limits, TrainSession, new_token
from splitfed.server.trunk_round import TrunkRound
from splitfed.training.link import link_codecs

_log = logging.getLogger(__name__)


class RoundSessions:
    """One session for each member at work, in one round after the other. All methods run on the event loop.

    Args:
        config: The server's configuration.
        rounds: Who is asked, and how far everyone is.
        devices: What each agent holds.
        engine: Where the trunk runs.
        limits: What a request may hold.
        worker: Where tensors are decoded and encoded.
        clock: Monotonic seconds.
        begin_again: Begins the round from its start, for everyone; gives the sessions that are over by it.
        tell: Tells those who watch that something has changed.
    """

    def __init__(
        self,
        config: ServerConfig,
        rounds: Rounds,
        devices: Devices,
        engine: Engine,
        *,
        limits: Limits,
        worker: Executor,
        clock: Callable[[], float],
        begin_again: Callable[[], list[MemberSession]],
        tell: Callable[[], Awaitable[None]],
    ) -> None:
        self._margin = config.federation.straggler_margin
        self._variant = variant_of(config.federation.variant)
        self._codecs = link_codecs(config.codecs)
        self._rounds = rounds
        self._devices = devices
        self._engine = engine
        self._limits = limits
        self._worker = worker
        self._clock = clock
        self._begin_again = begin_again
        self._tell = tell
        self._sessions: dict[str, MemberSession] = {}
        self._slow_before: set[str] = set()

    @property
    def late(self) -> list[str]:
        """Clients whose session is kept although its round is over: their late update is still waited for."""
        return [client for client in self._sessions if self._rounds.lateness(client) is not None]

    @property
    def late_rounds(self) -> set[int]:
        """The rounds that these sessions are of."""
        return {self._sessions[client].round for client in self.late}

    def begin(self, trunk_round: TrunkRound) -> list[MemberSession]:
        """Go on to the next round, or to the same one from its start.

        Returns:
            The sessions that are over by it; the trunk is still to forget them.
        """
        before, late = self._sessions, self.late
        self._trunk_round = trunk_round
        self._sessions = {client: before[client] for client in late}
        return [session for client, session in before.items() if client not in self._sessions]

    def is_current(self, session: TrainSession) -> bool:
        """Say whether a session is still its client's own."""
        return self._sessions.get(session.client) is session

    def of(self, client: str, round: int) -> MemberSession:
        """Give a client's session of a round.

        Raises:
            RoundLost: If there is none.
        """
        session = self._sessions.get(client)
        if session is None or session.round != round:
            raise self.over(client, round)
        return session

    def check_goes_on(self, client: str, round: int) -> None:
        """Check that a round is open, or a late update of it still waited for.

        Raises:
            RoundLost: If it is over for this client.
        """
        behind = self._rounds.current - round
        if self._rounds.phase is not Phase.OPEN or (behind != 0 and self._rounds.lateness(client) != behind):
            if client in self._rounds.members:
                self._rounds.progress(client, self._clock())  # it is there, and can be asked for another round
            raise self.over(client, round)

    def over(self, client: str, round: int) -> RoundLost:
        """Say why a round is over for a client."""
        rounds = self._rounds
        if rounds.has_missed(client, round):
            is_last = round == rounds.rounds
            goes_on = "and it was the last round" if is_last else "and it starts again in the next one that asks for it"
            return RoundLost(
                f"Round {round} was closed without {client!r}, which was late; its update is dropped, {goes_on}."
            )
        if rounds.phase is Phase.OPEN and round == rounds.current:
            return RoundLost(f"Round {round} goes on without this session of {client!r}; wait until it is asked again.")
        return RoundLost(f"Round {round} is not open; {rounds.standing}.")

    async def open(self, client: str, round: int, token: bytes) -> MemberSession:
        """Start a client's round from its beginning, or find the session where its stream broke.

        Args:
            client: The client.
            round: The round that it is at.
            token: What the session is known by; empty: a new one.

        Raises:
            RoundLost: If that round is not open, goes on without this client, or the session is not known.
        """
        session = self._sessions.get(client)
        self.check_goes_on(client, round)
        if self._rounds.has_submitted(client) and round == self._rounds.current:
            raise RoundLost(f"The update of {client!r} for round {round} is already here.")
        if self._rounds.has_left(client):
            raise RoundLost(f"{client!r} left the run; join again.")
        if token:
            if session is None or session.token != token:
                raise RoundLost("The server does not know this session; start the round again.")
            return session
        self._rounds.progress(client, self._clock(), steps=0)
        if not self._rounds.may_start(client):
            raise RoundLost(f"{client!r} has no part in round {round} now; it waits until it is asked.")
        if session is not None and self._trunk_round.restart(session.slot):
            del self._sessions[client]
            await self._engine.empty(session.slot)
        elif session is not None:
            await self._take_out(client)
        return await self._open_new(client, round)

    def give_up(self, client: str) -> MemberSession | None:
        """Wait no longer for a client that leaves.

        Returns:
            Its session, if it had one; the trunk is still to forget it.
        """
        session = self._sessions.pop(client, None)
        self._trunk_round.leave(self._trunk_round.slot(client, b"") if session is None else session.slot)
        return session

    def note_answering(self) -> None:
        """Note that those are at work whose answer is not ready: they wait for the server, not the server for them."""
        for client, session in self._sessions.items():
            if session.is_answering:
                self._rounds.progress(client, self._clock())

    async def go_on_with_joint_steps(self) -> None:
        """Take those out that have lost their place in joint steps, or keep the others waiting for too long.

        That is at two looks one after the other: a server that stood still hears them in between.
        """
        joint = self._trunk_round.joint
        if joint is None:
            return
        seen_slow = set() if self._margin is None else joint.holding_up(self._margin)
        slow, self._slow_before = seen_slow & self._slow_before, seen_slow
        for client in self._rounds.working:
            slot = self._trunk_round.slot(client, b"")
            if slot not in joint.slots and client in self._sessions:
                _log.warning("round %d goes on without %s: it asked what was not due", self._rounds.current, client)
            elif slot in slow and self._rounds.can_spare(client):
                _log.warning("round %d goes on without %s: its joint steps wait for it", self._rounds.current, client)
            else:
                continue
            if not await self._take_out(client, is_silent=slot in joint.slots):
                return
        if self._rounds.begin_again_where_it_must(self._clock()):
            await self._begun_again()

    async def end_lost_parts(self) -> None:
        """End the sessions of those that had a part in this round and lost it; others wait for them no longer."""
        if self._variant.averages_trunk:
            return
        for client, session in list(self._sessions.items()):
            is_over = not self._rounds.may_start(client) and not self._rounds.is_counted(client, session.round)
            if is_over or client not in self._rounds.present:
                await self._end(session)
        if self._trunk_round.joint is not None:
            for client in set(self._rounds.members) - set(self._rounds.working):
                self._trunk_round.leave(self._trunk_round.slot(client, b""))

    async def _open_new(self, client: str, round: int) -> MemberSession:
        trunk_round, token = self._trunk_round, new_token()
        slot = trunk_round.slot(client, token)
        try:
            calls = await trunk_round.open(client, slot, self._rounds.working, blocks=self._devices[client].blocks)
        except RoundLost:
            await self._take_out(client)
            raise
        session = MemberSession(
            client,
            round,
            calls,
            self._codecs,
            self._limits,
            self._worker,
            on_progress=lambda: self._rounds.progress(client, self._clock()),
            slot=slot,
            token=token,
        )
        session.why_over = lambda: None if self.is_current(session) else self.over(client, round)
        session.on_steps = lambda steps: self._rounds.progress(client, self._clock(), steps=steps)
        session.on_refused = lambda: self._refused(session)
        if not self._rounds.may_start(client):  # it left meanwhile
            await self._end(session)
            raise self.over(client, round)
        self._sessions[client] = session
        self._rounds.progress(client, self._clock())
        return session

    async def _end(self, session: MemberSession) -> None:
        """Forget a session, and what the trunk has of it."""
        if self.is_current(session):
            del self._sessions[session.client]
        self._trunk_round.leave(session.slot)
        await self._engine.empty(session.slot)

    async def _refused(self, session: MemberSession) -> None:
        """Let others wait no longer for what a member asks wrongly; the next tick takes it out of joint steps."""
        if self._variant.shares_adapter and self.is_current(session):
            self._trunk_round.leave(session.slot)

    async def _take_out(self, client: str, *, is_silent: bool = False) -> bool:
        """Go on without a client whose place in the round's joint steps is lost.

        Args:
            client: The client.
            is_silent: The others wait for it.

        Returns:
            False if too few are left: the round has begun again, for everyone.
        """
        session = self._sessions.get(client)
        if session is not None:
            await self._end(session)
        goes_on = self._rounds.take_out(client, self._clock(), is_silent=is_silent)
        if not goes_on:
            await self._begun_again()
        await self._tell()
        return goes_on

    async def _begun_again(self) -> None:
        """Let everyone go that was at work on the round, which has begun again."""
        _log.warning("round %d begins again: too few are left to finish it", self._rounds.current)
        self._trunk_round.close(RoundLost(f"Round {self._rounds.current} begins again: too few are left in it."))
        for each in self._begin_again():
            await self._engine.empty(each.slot)
