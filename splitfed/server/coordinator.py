"""A run on the server: its members, its rounds, its adapters, and what is written at each round's end."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from splitfed.config import ServerConfig
from splitfed.errors import JoinRefused, ProtocolError, RoundLost, RunDirectoryError, ServerUnreachable
from splitfed.federation import Phase, RoundPolicy, Rounds, Update, at_rank, make_aggregator, merged, trained_factors
from splitfed.federation.pace import WatchedClock
from splitfed.federation.variants import variant_of
from splitfed.models.factors import factor_of
from splitfed.server.contribution import Contribution, happenings, metrics_line
from splitfed.server.devices import Device, Devices, shapes_of
from splitfed.server.engine import Engine
from splitfed.server.member_session import MemberSession
from splitfed.server.sessions import Limits, TrainSession, new_token
from splitfed.server.store import RunState, RunStore
from splitfed.server.trunk_round import TrunkRound
from splitfed.training.denoising import FitDenoiser
from splitfed.training.link import link_codecs
from splitfed.training.optimiser import without
from splitfed.transport.adapters import RESIDUAL

_log = logging.getLogger(__name__)

R = TypeVar("R")

_View = tuple[Phase, int, bool, bool, bool]
"""What a member sees: the phase, the round, whether its update is in, whether it may start, whether the server drains.
"""

_LONGEST_LOOK_S = 2.0
"""Twice the time between two ticks: what passes beyond it has passed while nobody was served."""


class Coordinator:
    """Owner of a run's state. All methods run on the event loop; nothing else changes the state.

    Args:
        config: The server's configuration.
        state: Where the run stands: the initial adapters, or the last round's end.
        engine: Where the trunk runs.
        store: Where rounds are written.
        export: Writes the PEFT adapter of all keys into the folder of a round.
        worker: Where blocking work goes.
        hidden_size: Size of a hidden vector.
        clock: Monotonic seconds.
        fit_denoiser: Fits what the trunk takes noise away with to the adapters that a round starts from; None = the
            trunk takes what comes.
        devices: What agents may hold; None: what the run says, all the same.

    Attributes:
        devices: What each agent holds.
    """

    def __init__(
        self,
        config: ServerConfig,
        state: RunState,
        engine: Engine,
        store: RunStore,
        *,
        export: Callable[[int, Mapping[str, Tensor]], None],
        worker: Executor,
        hidden_size: int,
        clock: Callable[[], float] = time.monotonic,
        fit_denoiser: FitDenoiser | None = None,
        devices: Devices | None = None,
    ) -> None:
        self._fit_denoiser = fit_denoiser
        self.config = config
        self.rounds = Rounds(
            config.federation.agents,
            config.training.rounds,
            config.federation.agent_timeout_s,
            committed=state.round,
            population=config.federation.population,
            policy=round_policy(config),
        )
        self.devices = devices or Devices(config.shared(), shapes_of(state.ends), {})
        self._state = state
        self._engine = engine
        self._store = store
        self._export = export
        self._worker = worker
        self._clock = clock
        self._watched = WatchedClock(_LONGEST_LOOK_S)
        self._sessions: dict[str, MemberSession] = {}
        self._late_bases: dict[str, dict[str, Tensor]] = {}
        self._contributions: dict[str, Contribution] = {}
        self._round_started_s = clock()
        self._changed = asyncio.Condition()
        self._closing = asyncio.Lock()
        self._told_end: set[str] = set()
        self.wire_bytes: Counter[tuple[str, str]] = Counter()
        self.happened: Counter[str] = Counter()
        self.is_draining = False
        self.rounds.restore(state.weights, clock())
        self._agent_ids = dict(state.agent_ids)
        self._counted = dict(state.counted)
        self._variant = variant_of(config.federation.variant)
        self._rule = config.shared().rule
        self._aggregator = make_aggregator(self._rule, config.lora.rank)
        self._aggregator.load(state.aggregator)
        self._begun = 0
        self._begin_round()
        self._limits = Limits(
            sequences=config.training.batch_size,
            tokens=config.training.max_tokens,
            hidden_size=hidden_size,
            answers=8 * config.training.max_in_flight + 8,
        )
        self._codecs = link_codecs(config.codecs)

    def start_of_round(self, client: str) -> dict[str, Tensor]:
        """Give what an agent starts the open round from: its adapters, and what the rule keeps frozen under them."""
        device, residual = self.devices[client], self._aggregator.residual()
        whole = {**self._state.trunk, **self._state.ends}
        own = {name: whole[name] for name in device.own}
        frozen = {f"{RESIDUAL}{name}": residual[name] for name in own if residual}
        return {**(own if device.rank == self.config.lora.rank else at_rank(own, device.rank)), **frozen}

    def update_shapes(self, client: str, round: int) -> dict[str, tuple[int, ...]]:
        """Say what an agent's update of a round holds: the shape of each tensor that was trained in it."""
        factors = trained_factors(self._rule.lora or "factors", round)
        return {name: shape for name, shape in self.devices[client].shared.items() if factor_of(name) in factors}

    @property
    def has_ended(self) -> bool:
        """The run is over and every member that may still ask knows it."""
        asks = {client for client in self.rounds.members if not self.rounds.has_left_for_good(client)}
        return self.rounds.phase is Phase.FINISHED and self._told_end >= asks

    async def join(
        self, client: str, agent_id: bytes, weight: int, *, device: Device | None = None, is_proven: bool = False
    ) -> None:
        """Take an agent into the run.

        Args:
            client: Its name.
            agent_id: Its own id.
            weight: Its weight in every mean.
            device: What it holds; None: what the run says.
            is_proven: The name is its certificate's: a device that lost its id is then known all the same.

        Raises:
            JoinRefused: If the name belongs to another agent, the run is full, or this agent left it for good.
            ServerUnreachable: If the server shuts down.
        """
        if self.is_draining:
            raise ServerUnreachable("The server is shutting down; come back when it is up again.")
        known = self._agent_ids.get(client)
        if known is not None and known != agent_id.hex() and not is_proven:
            raise JoinRefused(
                f"Another agent is called {client!r} in this run; choose another [agent] name, or give this one back "
                "the file agent-id of its state directory."
            )
        if not self.rounds.can_join(client):
            raise JoinRefused(
                f"The run {self.config.run_id!r} has all its agents already ({', '.join(self.rounds.members)}); "
                f"raise [federation] population to let {client!r} in."
            )
        if self.rounds.has_left_for_good(client):
            raise JoinRefused(
                f"{client!r} left the run {self.config.run_id!r} for good; to take it in again, start the server again "
                "with --resume."
            )
        self._agent_ids[client] = agent_id.hex()
        self.devices.put(client, device or self.devices.device())
        was_open = self.rounds.phase is Phase.OPEN
        self.rounds.join(client, weight, self._clock())
        _log.info("%s joined (%d of %d here)", client, self.rounds.joined, self.rounds.agents)
        self._note_opening(was_open)
        await self._tell()

    async def leave(self, client: str, *, for_good: bool = False) -> None:
        """Let a member go: the run goes on without it, from the next tick on.

        What it has submitted stays counted, what it has not is lost. Leaving twice is leaving once.

        Args:
            client: Its name.
            for_good: It will not come back.
        """
        was_open = self.rounds.phase is Phase.OPEN
        if not self.rounds.leave(client, self._clock(), for_good=for_good):
            return
        _log.info(
            "%s left%s (%d of %d here)",
            client,
            " for good" if for_good else "",
            self.rounds.joined,
            self.rounds.agents,
        )
        if was_open and not self.rounds.joined and not self.rounds.is_abandoned:
            _log.warning("nobody is here; the run waits for an agent to come back")
        self._note_opening(was_open)
        session = self._sessions.pop(client, None)
        self._trunk_round.leave(self._trunk_round.slot(client, b"") if session is None else session.slot)
        await self._tell()
        if session is not None:
            await asyncio.shield(self._engine.empty(session.slot))  # even if the agent no longer waits for an answer

    def check_member(self, client: str, agent_id: bytes) -> None:
        """Check that a call comes from the agent that joined under this name.

        Raises:
            RoundLost: If nobody has joined under the name since the server started.
            JoinRefused: If it was another agent.
        """
        known = self._agent_ids.get(client)
        if known is None:
            raise RoundLost(f"{client!r} has not joined this run; join first.")
        if known != agent_id.hex():
            raise JoinRefused(f"Another agent is called {client!r} in this run.")

    def last_counted(self, client: str) -> int:
        """Give the round of this client's last update that is in the run; 0: there is none."""
        return self._counted.get(client, 0)

    async def watch(self, client: str) -> AsyncIterator[tuple[Phase, int, bool]]:
        """Yield the run's phase, current round, and whether this client's update is in, at every change.

        A change of whether the client may start counts as one; `Rounds.may_start` says it.
        """
        view: _View | None = None
        while True:
            view = await self._next_view(client, view)
            if view[0] is Phase.OPEN and not view[2]:  # who watches is there, and waits to be asked
                self.rounds.progress(client, self._clock())
                view = self._view(client)
            phase, round, is_submitted, _, _ = view
            yield phase, round, is_submitted
            if phase is Phase.FINISHED:
                self._told_end.add(client)
                await self._tell()
                return
            if self.is_draining:
                return

    async def open_session(self, client: str, round: int, token: bytes) -> TrainSession:
        """Start a client's round from its beginning, or find the session where its stream broke.

        What was begun is finished even if the client no longer waits for an answer: its next call then finds it.

        Raises:
            RoundLost: If that round is not open, goes on without this client, or the session is not known.
        """
        return await asyncio.shield(self._open_session(client, round, token))

    def is_current(self, session: TrainSession) -> bool:
        """Say whether a session is still its client's own."""
        return self._sessions.get(session.client) is session

    def count_bytes(self, client: str, *, up: int = 0, down: int = 0) -> None:
        """Add to a client's traffic in this round."""
        contribution = self._contributions.setdefault(client, Contribution())
        contribution.bytes_up += up
        contribution.bytes_down += down
        self.wire_bytes[client, "up"] += up
        self.wire_bytes[client, "down"] += down

    def note_progress(self, client: str) -> None:
        """Note that a member is at work outside its training stream."""
        self.rounds.progress(client, self._clock())

    async def submit(self, client: str, round: int, ends: Mapping[str, Tensor], contribution: Contribution) -> bool:
        """Take a client's update; once it is counted, the round ends even if the client no longer waits for an answer.

        Returns:
            False if it was here already.

        Raises:
            RoundLost: If that round is not open.
            ServerUnreachable: If the round cannot be written; the server ends then.
            ProtocolError: If the client has not run all local steps, or its numbers cannot be averaged.
        """
        return await asyncio.shield(self._submit(client, round, ends, contribution))

    async def mean_gradient(
        self, client: str, round: int, step: int, gradients: Mapping[str, Tensor], *, tokens: int
    ) -> dict[str, Tensor]:
        """Wait for the cohort's gradients of bottom and top, and give their mean, weighted by tokens.

        Raises:
            RoundLost: If the round goes on without this client.
            ProtocolError: If gradients are not merged at every step in this run, or these are not finite.
        """
        if self.config.federation.merge_ends != "step":
            raise ProtocolError("This run does not merge bottom and top at every step.")
        session = self._sessions.get(client)
        if session is None or session.round != round:
            raise self._over(client, round)
        if not 0 < tokens <= self._limits.sequences * self._limits.tokens:
            raise ProtocolError(f"Gradients of {tokens} tokens do not come from one of this run's steps.")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            raise ProtocolError(f"The gradients of {client!r} are not finite; lower the learning rate.")
        return await session.mean_gradient(step, gradients, tokens=tokens)

    async def tick(self) -> None:
        """Look at the clock: leave out members that were silent for too long, or are too slow for the round.

        Raises:
            RunDirectoryError: If a round cannot be written.
        """
        async with self._closing:
            was_open = self.rounds.phase is Phase.OPEN
            for client, session in self._sessions.items():
                if session.is_answering:  # it waits for the server, not the server for it
                    self.rounds.progress(client, self._clock())
            for client in self.rounds.leave_out_silent(self._clock()):
                _log.warning(
                    "round %d goes on without %s: no progress for %.0f s",
                    self.rounds.current,
                    client,
                    self.config.federation.agent_timeout_s,
                )
            for client in self.rounds.cut_off_stragglers(self._clock()):
                _log.warning(
                    "round %d waits no longer for %s: it takes more than %g times as long as the median agent",
                    self.rounds.current,
                    client,
                    self.config.federation.straggler_margin,
                )
            await self._go_on_with_joint_steps()
            self._note_opening(was_open)
            await self._end_lost_parts()
            await self._close_round_if_complete()
        await self._tell()

    async def prepare_entrance(self) -> None:
        """Give the trunk what depends on the adapters that the next round starts from, besides these."""
        if residual := self._aggregator.residual():
            await asyncio.wrap_future(self._engine.submit(lambda trainer: trainer.load_residual(residual)))
        if self._fit_denoiser is None:
            return
        ends = self._state.ends
        denoiser = await asyncio.get_running_loop().run_in_executor(self._worker, self._fit_denoiser, ends)
        await self._engine.denoise_with(denoiser)

    async def drain(self) -> None:
        """Take no more work, and tell everyone who watches."""
        self.is_draining = True
        self._trunk_round.close(ServerUnreachable("The server is shutting down; come back when it is up again."))
        await self._tell()

    async def wait_for_end(self) -> None:
        """Wait until the run is over and every member knows."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.has_ended)

    async def _open_session(self, client: str, round: int, token: bytes) -> TrainSession:
        async with self._closing:
            session = self._sessions.get(client)
            if self.is_draining:
                raise RoundLost("The server is shutting down; come back when it is up again.")
            if not self._goes_on(client, round):
                raise self._over(client, round)
            if self.rounds.has_submitted(client) and round == self.rounds.current:
                raise RoundLost(f"The update of {client!r} for round {round} is already here.")
            if self.rounds.has_left(client):
                raise RoundLost(f"{client!r} left the run; join again.")
            if token:
                if session is None or session.token != token:
                    raise RoundLost("The server does not know this session; start the round again.")
                return session
            self.rounds.progress(client, self._clock(), steps=0)
            if not self.rounds.may_start(client):
                raise RoundLost(f"{client!r} has no part in round {round} now; it waits until it is asked.")
            if session is not None and self._trunk_round.restart(session.slot):
                del self._sessions[client]
                await self._engine.empty(session.slot)
            elif session is not None:
                await self._take_out(client)
            return await self._new_session(client, round)

    async def _new_session(self, client: str, round: int) -> MemberSession:
        trunk_round, token = self._trunk_round, new_token()
        slot = trunk_round.slot(client, token)
        try:
            calls = await trunk_round.open(client, slot, self.rounds.working, blocks=self.devices[client].blocks)
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
            on_progress=lambda: self.rounds.progress(client, self._clock()),
            slot=slot,
            token=token,
        )
        session.why_over = lambda: None if self.is_current(session) else self._over(client, round)
        session.on_steps = lambda steps: self.rounds.progress(client, self._clock(), steps=steps)
        session.on_refused = lambda: self._refused(session)
        if not self.rounds.may_start(client):  # it left meanwhile
            await self._end(session)
            raise self._over(client, round)
        self._sessions[client] = session
        self.rounds.progress(client, self._clock())
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

    async def _take_out(self, client: str) -> bool:
        """Go on without a client whose place in the round's joint steps is lost.

        Returns:
            False if too few are left: the round has begun again, for everyone.
        """
        session = self._sessions.get(client)
        if session is not None:
            await self._end(session)
        goes_on = self.rounds.take_out(client, self._clock())
        if not goes_on:
            _log.warning("round %d begins again: too few are left to finish it", self.rounds.current)
            self._trunk_round.close(RoundLost(f"Round {self.rounds.current} begins again: too few are left in it."))
            before = list(self._sessions.values())
            self._begin_round()
            for each in before:
                await self._engine.empty(each.slot)
        await self._tell()
        return goes_on

    async def _go_on_with_joint_steps(self) -> None:
        """Take those out that have lost their place in joint steps, or keep the others waiting for too long."""
        joint, margin = self._trunk_round.joint, self.config.federation.straggler_margin
        if joint is None:
            return
        slow = set() if margin is None else joint.holding_up(margin)
        for client in self.rounds.working:
            slot = self._trunk_round.slot(client, b"")
            if slot not in joint.slots and client in self._sessions:
                _log.warning("round %d goes on without %s: it asked what was not due", self.rounds.current, client)
            elif slot in slow and self.rounds.can_spare(client):
                _log.warning("round %d goes on without %s: its joint steps wait for it", self.rounds.current, client)
            else:
                continue
            if not await self._take_out(client):
                return

    def _goes_on(self, client: str, round: int) -> bool:
        """Say whether a round is open, or a late update of it is still waited for."""
        if self.rounds.phase is not Phase.OPEN:
            return False
        return round == self.rounds.current or self.rounds.lateness(client) == self.rounds.current - round

    def _over(self, client: str, round: int) -> RoundLost:
        """Say why a round is over for a client."""
        if self.rounds.has_missed(client, round):
            return RoundLost(
                f"Round {round} was closed without {client!r}, which was late; its update is dropped, and it starts "
                "again in the next round that it is asked for."
            )
        if self.rounds.phase is Phase.OPEN and round == self.rounds.current:
            return RoundLost(f"Round {round} goes on without this session of {client!r}; wait until it is asked again.")
        return RoundLost(
            f"Round {round} is not open; the run is at round {self.rounds.current} ({self.rounds.phase.value})."
        )

    async def _end_lost_parts(self) -> None:
        """End the sessions of those that had a part in this round and lost it; others wait for them no longer."""
        if self._variant.averages_trunk:
            return
        for client, session in list(self._sessions.items()):
            is_over = not self.rounds.may_start(client) and not self.rounds.is_counted(client, session.round)
            if is_over or client not in self.rounds.present:
                await self._end(session)
        if self._trunk_round.joint is not None:
            for client in set(self.rounds.members) - set(self.rounds.working):
                self._trunk_round.leave(self._trunk_round.slot(client, b""))

    def _note_opening(self, was_open: bool) -> None:
        if self.rounds.phase is Phase.OPEN and not was_open:
            self._round_started_s = self._clock()

    def _begin_round(self) -> None:
        base, number = {**self._state.trunk, **self._state.ends}, self.rounds.current
        factors = trained_factors(self._rule.lora or "factors", number)
        self._trunk_round = TrunkRound(
            self._variant,
            self._engine,
            self.config.federation,
            adapter=self._state.trunk,
            optimisers={owner: self._still_true(state) for owner, state in self._state.optimisers.items()},
            round=number,
            attempt=self._begun,
            trained=frozenset(name for name in base if factor_of(name) in factors),
            clock=lambda: self._watched.look(self._clock()),
        )
        self._begun += 1
        self._held: dict[str, Mapping[str, Tensor]] = {}
        self._aggregator.begin(base, number)
        self._contributions = {}
        self._counted = dict(self._state.counted)
        self._sessions = {c: session for c, session in self._sessions.items() if self.rounds.lateness(c) is not None}
        self._late_bases = {client: self._late_bases[client] for client in self._sessions}
        self._round_started_s = self._clock()

    def _still_true(self, optimiser: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Leave out the moments of tensors that the last round's end has replaced."""
        if not self._rule.renews_factors:
            return optimiser
        return {} if self._variant.averages_trunk else without(optimiser, self.devices.contested)

    async def _submit(self, client: str, round: int, ends: Mapping[str, Tensor], contribution: Contribution) -> bool:
        async with self._closing:
            if self.rounds.is_counted(client, round):
                return False
            if not self._goes_on(client, round):
                raise self._over(client, round)
            self.rounds.progress(client, self._clock())
            session = self._sessions.get(client)
            if session is None or session.round != round:
                raise self._over(client, round)
            steps = await self._engine.steps_done(session.slot)
            if steps != self.config.training.local_steps:
                raise ProtocolError(
                    f"{client!r} sent its update after {steps} of {self.config.training.local_steps} local steps."
                )
            taken = await self._trunk_round.take(client, session.slot)
            if not self.rounds.expects(client, round) or not self.is_current(session):
                raise self._over(client, round)
            own_base = self._late_bases[client] if round < self.rounds.current else None
            self._hold_or_add(client, taken.adapter, ends, own_base)
            self._trunk_round.keep(client, taken)
            self.rounds.submit(client, round, self._clock())
            self._counted[client] = round
            counted = self._contributions.setdefault(client, Contribution())
            self._contributions[client] = replace(
                contribution, bytes_up=counted.bytes_up, bytes_down=counted.bytes_down
            )
            if round < self.rounds.current:
                _log.info("round %d: %s submitted late, for round %d", self.rounds.current, client, round)
            else:
                _log.info("round %d: %s submitted", round, client)
            try:
                await self._close_round_if_complete()
            except RunDirectoryError as error:  # the next tick meets it too, and ends the server
                raise ServerUnreachable("The server cannot write the round; come back when it is up again.") from error
        await self._tell()
        return True

    async def _close_round_if_complete(self) -> None:
        if not self.rounds.is_complete():
            return
        self.rounds.close()
        self._trunk_round.close(RoundLost(f"Round {self.rounds.current} is over; wait for the next one."))
        shared = await self._trunk_round.result()
        adapter, notes = await self._off_loop(lambda: self._aggregated(shared))
        state = RunState(
            round=self.rounds.current,
            trunk={name: adapter[name] for name in self._state.trunk},
            ends={name: adapter[name] for name in self._state.ends},
            optimisers=self._trunk_round.optimisers,
            weights={client: self.rounds.weight(client) for client in self.rounds.members},
            agent_ids=self._agent_ids,
            counted=dict(self._counted),
            aggregator=self._aggregator.state(),
        )
        seconds = self._clock() - self._round_started_s
        taken = {client: self._contributions[client] for client in {*self.rounds.submitted, *self.rounds.merged}}
        happened = happenings(self.rounds)
        metrics = metrics_line(
            state, taken, rounds=self.rounds.rounds, seconds=seconds, happenings=happened, aggregation=notes
        )
        await self._off_loop(lambda: self._write(state, metrics))
        base, self._state = {**self._state.trunk, **self._state.ends}, state
        if self.rounds.current < self.rounds.rounds:
            await self.prepare_entrance()
        self.rounds.commit(self._clock())
        before = dict(self._sessions)
        self._late_bases = {client: self._late_bases.get(client, base) for client in before}
        self._begin_round()
        for client, session in before.items():
            if self._sessions.get(client) is not session:
                await self._engine.empty(session.slot)
        _log.info("round %d of %d is written (%.1f s)", state.round, self.rounds.rounds, seconds)
        for what, who in happened.items():
            self.happened[what] += len(who)
        if happened:
            _log.info("round %d: %s", state.round, json.dumps(happened))

    def _hold_or_add(
        self,
        client: str,
        trunk: Mapping[str, Tensor],
        ends: Mapping[str, Tensor],
        own_base: Mapping[str, Tensor] | None,
    ) -> None:
        """Count a client's update, or keep it until it is known what the shared trunk has trained on its behalf.

        Raises:
            ProtocolError: If it cannot be averaged; what is kept is tried as well, as its client would not hear later.
        """
        counted = trunk.keys() if self._variant.averages_trunk else trunk.keys() & self.devices.contested
        of_trunk = {name: trunk[name] for name in counted}
        try:
            if self._variant.shares_adapter:
                self._try(client, ends)
                self._held[client] = ends
            elif of_trunk or ends:
                update = Update({**of_trunk, **ends}, self.rounds.weight(client), own_base)
                self._aggregator.add(client, update)
        except ValueError as error:
            raise ProtocolError(f"The update of {client!r} cannot be averaged: {error}") from error

    def _try(self, client: str, ends: Mapping[str, Tensor]) -> None:
        """Check an update by the run's rule, and count nothing."""
        if ends:
            trial = make_aggregator(self._rule, self.config.lora.rank)
            trial.begin({**self._state.trunk, **self._state.ends}, self.rounds.current)
            trial.add(client, Update(ends, self.rounds.weight(client)))

    def _aggregated(self, shared: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Give what the round's updates come to.

        Args:
            shared: The trunk adapter that the round leaves, where it is no mean of copies.
        """
        contested = self.devices.contested
        held, self._held = self._held, {}
        for client, ends in sorted(held.items()):
            own = self.devices[client].own
            of_trunk = {name: shared[name] for name in contested & shared.keys() if name not in own}
            try:
                if of_trunk or ends:
                    self._aggregator.add(client, Update({**of_trunk, **ends}, self.rounds.weight(client)))
            except ValueError as error:
                _log.warning("the update of %s is left out: %s", client, error)
        kept = {name: tensor for name, tensor in shared.items() if name not in contested}
        if not contested and not self._variant.averages_trunk:
            return {**self._state.ends, **kept}, {}
        aggregate = self._aggregator.result()
        notes = {name: figure for name, figure in aggregate.notes.items() if figure}
        return {**aggregate.adapter, **kept}, notes

    async def _off_loop(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _write(self, state: RunState, metrics: Mapping[str, object]) -> None:
        """Write a round's end; the checkpoint comes last, so a crash before it runs the round again."""
        try:
            adapter, residual = {**state.trunk, **state.ends}, self._aggregator.residual()
            self._export(state.round, merged(adapter, residual) if residual else adapter)
            self._store.write_metrics(metrics)
            self._store.publish(state.round)
            self._store.save(state)
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"Round {state.round} cannot be written to {self._store.directory} ({error}); make room and start "
                "the server again with --resume: the round is then run again."
            ) from error

    async def _next_view(self, client: str, seen: _View | None) -> _View:
        async with self._changed:
            await self._changed.wait_for(lambda: self._view(client) != seen)
            return self._view(client)

    def _view(self, client: str) -> _View:
        rounds = self.rounds
        is_submitted = rounds.has_submitted(client)
        return rounds.phase, rounds.current, is_submitted, rounds.may_start(client), self.is_draining

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def round_policy(config: ServerConfig) -> RoundPolicy:
    """Give a run's policy of who is asked to take part in a round, and when it is over."""
    federation = config.federation
    return RoundPolicy(
        cohort=federation.cohort,
        over_selection=federation.over_selection,
        quorum=federation.quorum,
        straggler_margin=federation.straggler_margin,
        merges_late=federation.late_updates == "merge",
        takes_turns=variant_of(federation.variant).takes_turns,
        local_steps=config.training.local_steps,
        seed=config.run.seed,
        longest_look_s=_LONGEST_LOOK_S,
    )
