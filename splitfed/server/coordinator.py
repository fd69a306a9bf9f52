"""A run on the server: its members, its rounds, its adapters, and what is written at each round's end."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor

from splitfed.config import ServerConfig
from splitfed.errors import ProtocolError, RoundLost, RunDirectoryError, ServerUnreachable
from splitfed.federation import Phase, Rounds, UpdateRefused, merged
from splitfed.federation.pace import WatchedClock
from splitfed.federation.variants import variant_of
from splitfed.server.contribution import Contribution, happenings, here, in_words, metrics_line
from splitfed.server.devices import Device, Devices, shapes_of
from splitfed.server.engine import Engine
from splitfed.server.member_session import MemberSession
from splitfed.server.membership import Membership
from splitfed.server.outlast import outlasting
from splitfed.server.round_figures import RoundFigures
from splitfed.server.round_policy import LONGEST_LOOK_S, round_policy
from splitfed.server.round_sessions import RoundSessions
from splitfed.server.round_updates import RoundUpdates
from splitfed.server.sessions import Limits, TrainSession
from splitfed.server.store import RunState, RunStore
from splitfed.server.trunk_round import TrunkRound
from splitfed.server.watchers import Watchers
from splitfed.training.denoising import FitDenoiser
from splitfed.training.joint_pace import JointPace

_log = logging.getLogger(__name__)

R = TypeVar("R")


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
        figures: What is counted.
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
        self._watched = WatchedClock(LONGEST_LOOK_S)
        self._pace = JointPace()
        self._refusals: dict[str, tuple[int, str]] = {}
        self._closing = asyncio.Lock()
        self.figures = RoundFigures(clock)
        self.rounds.restore(state.weights, clock())
        self._watchers = Watchers(self.rounds, clock)
        self._membership = Membership(config.run_id, self.rounds, state.agent_ids)
        self._updates = RoundUpdates(config.shared(), self.devices, self.rounds.weight, state.aggregator)
        self._sessions = RoundSessions(
            config,
            self.rounds,
            self.devices,
            engine,
            limits=Limits(
                sequences=config.training.batch_size,
                tokens=config.training.max_tokens,
                hidden_size=hidden_size,
                answers=8 * config.training.max_in_flight + 8,
            ),
            worker=worker,
            clock=clock,
            begin_again=self._begin_round,
            tell=self._watchers.tell,
        )
        self._begun = 0
        self._begin_round()

    def start_of_round(self, client: str) -> dict[str, Tensor]:
        """Give what an agent starts the open round from: its adapters, and what the rule keeps frozen under them."""
        return self._updates.start_of(client)

    def update_shapes(self, client: str, round: int) -> dict[str, tuple[int, ...]]:
        """Say what an agent's update of a round holds: the shape of each tensor that was trained in it."""
        return self._updates.shapes(client, round)

    @property
    def state(self) -> RunState:
        """The run at the end of its last whole round."""
        return self._state

    @property
    def has_ended(self) -> bool:
        """The run is over and every member that may still ask knows it."""
        return self._watchers.has_ended

    @property
    def unaware(self) -> list[str]:
        """Members that may still ask, and have not heard that the run is over."""
        return self._watchers.unaware

    @property
    def why_hopeless(self) -> str | None:
        """Why the open round cannot have its quorum although agents are here, and what to do; None if it still can."""
        if not self.rounds.has_refused_too_many(self._clock()):
            return None
        refused = self.rounds.refused
        do = "lower training.learning_rate in a new run"
        if self.config.aggregation.refuse_norm is not None:
            do = f"raise aggregation.refuse_norm and start the server again with --resume, or {do}"
        return (
            f"round {self.rounds.current} cannot have its quorum of {self.rounds.policy.quorum}, for the updates of "
            f"{', '.join(refused)} were refused ({next(iter(refused.values())).rstrip('.')}); {do}"
        )

    @property
    def is_draining(self) -> bool:
        """The server shuts down, and takes no more work."""
        return self._watchers.is_draining

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
        self._membership.admit(client, agent_id, is_proven=is_proven)
        self.devices.put(client, device or self.devices.device())
        was_open = self.rounds.phase is Phase.OPEN
        self.rounds.join(client, weight, self._clock())
        _log.info("%s joined (%s)", client, here(self.rounds.joined, self.rounds.agents))
        self._note_opening(was_open)
        await self._watchers.tell()

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
            "%s left%s (%s)",
            client,
            " for good" if for_good else "",
            here(self.rounds.joined, self.rounds.agents),
        )
        if was_open and not self.rounds.joined and not self.rounds.is_abandoned:
            _log.warning("nobody is here; the run waits for an agent to come back")
        self._note_opening(was_open)
        session = self._sessions.give_up(client)
        await self._watchers.tell()
        if session is not None:
            await outlasting(self._engine.empty(session.slot))  # even if the agent no longer waits for an answer

    def check_member(self, client: str, agent_id: bytes) -> None:
        """Check that a call comes from the agent that joined under this name.

        Raises:
            RoundLost: If nobody has joined under the name.
            JoinRefused: If it was another agent.
        """
        self._membership.check(client, agent_id)

    def check_joined(self, client: str, agent_id: bytes) -> None:
        """Check that a call comes from a member of which it is known what it holds.

        Raises:
            RoundLost: If it has not joined since the server started; what it had begun is lost anyway.
            JoinRefused: If it was another agent.
        """
        self.check_member(client, agent_id)
        if client not in self.devices:
            raise RoundLost(f"{client!r} has not joined since the server started again; join first.")

    def last_counted(self, client: str) -> int:
        """Give the round of this client's last update that is in the run; 0: there is none."""
        return self._updates.counted.get(client, 0)

    def watch(self, client: str) -> AsyncIterator[tuple[Phase, int, bool]]:
        """Yield the run's phase, current round, and whether this client's update is in, at every change.

        A change of whether the client may start counts as one; `Rounds.may_start` says it.
        """
        return self._watchers.watch(client)

    async def open_session(self, client: str, round: int, token: bytes) -> TrainSession:
        """Start a client's round from its beginning, or find the session where its stream broke.

        What was begun is finished even if the client no longer waits for an answer: its next call then finds it.

        Raises:
            RoundLost: If that round is not open, goes on without this client, or the session is not known.
        """
        return await outlasting(self._open_session(client, round, token))

    def is_current(self, session: TrainSession) -> bool:
        """Say whether a session is still its client's own."""
        return self._sessions.is_current(session)

    def note_progress(self, client: str) -> None:
        """Note that a member is at work outside its training stream."""
        self.rounds.progress(client, self._clock())

    async def submit(self, client: str, round: int, ends: Mapping[str, Tensor], contribution: Contribution) -> bool:
        """Take a client's update; once it is counted, the round ends even if the client no longer waits for an answer.

        Returns:
            False if it was here already.

        Raises:
            UpdateRefused: If its numbers are such that it is not counted: the round goes on without it.
            RoundLost: If that round is not open.
            ServerUnreachable: If the round cannot be written; the server ends then.
            ProtocolError: If the client has not run all local steps.
        """
        return await outlasting(self._submit(client, round, ends, contribution))

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
        return await self._sessions.of(client, round).mean_gradient(step, gradients, tokens=tokens)

    async def tick(self) -> None:
        """Look at the clock: leave out members that were silent for too long, or are too slow for the round.

        Raises:
            RunDirectoryError: If a round cannot be written.
        """
        async with self._closing:
            was_open = self.rounds.phase is Phase.OPEN
            self._sessions.note_answering()
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
            await self._sessions.go_on_with_joint_steps()
            self._note_opening(was_open)
            await self._sessions.end_lost_parts()
            await self._close_round_if_complete()
        await self._watchers.tell()

    async def prepare_entrance(self) -> None:
        """Give the trunk what depends on the adapters that the next round starts from, besides these."""
        if residual := self._updates.residual:
            await asyncio.wrap_future(self._engine.submit(lambda trainer: trainer.load_residual(residual)))
        if self._fit_denoiser is None:
            return
        ends = self._state.ends
        denoiser = await asyncio.get_running_loop().run_in_executor(self._worker, self._fit_denoiser, ends)
        await self._engine.denoise_with(denoiser)

    async def drain(self) -> None:
        """Take no more work, and tell everyone who watches."""
        self._watchers.is_draining = True
        self._trunk_round.close(ServerUnreachable("The server is shutting down; come back when it is up again."))
        await self._watchers.tell()

    async def wait_for_end(self) -> None:
        """Wait until the run is over and every member knows."""
        await self._watchers.wait_for_end()

    async def _open_session(self, client: str, round: int, token: bytes) -> TrainSession:
        async with self._closing:
            if self.is_draining:
                raise RoundLost("The server is shutting down; come back when it is up again.")
            return await self._sessions.open(client, round, token)

    def _note_opening(self, was_open: bool) -> None:
        if self.rounds.phase is Phase.OPEN and not was_open:
            self.figures.start_clock()

    def _begin_round(self) -> list[MemberSession]:
        """Begin the current round, whether it was begun before or not; gives the sessions that are over by it."""
        state, number = self._state, self.rounds.current
        self._updates.begin(state, number, late=self._sessions.late_rounds)
        self._trunk_round = TrunkRound(
            variant_of(self.config.federation.variant),
            self._engine,
            self.config.federation,
            adapter=state.trunk,
            optimisers=state.optimisers,
            round=number,
            attempt=self._begun,
            trained=self._updates.trained,
            clock=lambda: self._watched.look(self._clock()),
            pace=self._pace,
        )
        self._begun += 1
        self.figures.begin()
        return self._sessions.begin(self._trunk_round)

    async def _submit(self, client: str, round: int, ends: Mapping[str, Tensor], contribution: Contribution) -> bool:
        async with self._closing:
            if self.rounds.is_counted(client, round):
                return False
            before, why = self._refusals.get(client, (0, ""))
            if before == round:
                raise UpdateRefused(why)
            self._sessions.check_goes_on(client, round)
            self.rounds.progress(client, self._clock())
            session = self._sessions.of(client, round)
            steps = await self._engine.steps_done(session.slot)
            if steps != self.config.training.local_steps:
                raise ProtocolError(
                    f"{client!r} sent its update after {steps} of {self.config.training.local_steps} local steps."
                )
            refusal: UpdateRefused | None = None
            try:
                await self._count(session, ends, contribution)
            except UpdateRefused as error:
                refusal = error
                await self._go_on_without(session, str(error))
            try:
                await self._close_round_if_complete()
            except RunDirectoryError as error:  # the next tick meets it too, and ends the server
                raise ServerUnreachable("The server cannot write the round; come back when it is up again.") from error
        await self._watchers.tell()
        if refusal is not None:
            raise refusal
        return True

    async def _count(self, session: MemberSession, ends: Mapping[str, Tensor], contribution: Contribution) -> None:
        """Count what a session came to, or change nothing."""
        client, round = session.client, session.round
        taken = await self._trunk_round.take(session.slot)
        self._check_expected(session)
        counted = self._updates.take(client, round, taken.adapter, ends, before=taken.before)
        self._trunk_round.keep(client, replace(taken, adapter=counted))
        self.rounds.submit(client, round, self._clock())
        self.figures.count_update(client, contribution)
        if round < self.rounds.current:
            _log.info("round %d: %s submitted late, for round %d", self.rounds.current, client, round)
        else:
            _log.info("round %d: %s submitted", round, client)

    async def _go_on_without(self, session: MemberSession, why: str) -> None:
        """End a member's part in the round, whose update cannot be counted."""
        self._check_expected(session)
        client, round = session.client, session.round
        _log.warning("round %d goes on without %s, whose update is refused: %s", self.rounds.current, client, why)
        self._refusals[client] = round, why
        self.rounds.refuse(client, round, why, self._clock())
        self._sessions.give_up(client)
        await self._engine.empty(session.slot)

    def _check_expected(self, session: MemberSession) -> None:
        """Check that a session's update would be taken now.

        Raises:
            RoundLost: If the round goes on without it.
        """
        if not self.rounds.expects(session.client, session.round) or not self.is_current(session):
            raise self._sessions.over(session.client, session.round)

    async def _close_round_if_complete(self) -> None:
        if not self.rounds.is_complete():
            return
        self.rounds.close()
        self._trunk_round.close(RoundLost(f"Round {self.rounds.current} is over; wait for the next one."))
        shared = await self._trunk_round.result()
        adapter, notes = await self._off_loop(lambda: self._updates.result(shared))
        refused = {**self.rounds.refused, **self._updates.refused}
        state = RunState(
            round=self.rounds.current,
            trunk={name: adapter[name] for name in self._state.trunk},
            ends={name: adapter[name] for name in self._state.ends},
            optimisers={
                owner: dict(self._updates.still_true(moments))
                for owner, moments in self._trunk_round.optimisers.items()
            },
            weights={client: self.rounds.weight(client) for client in self.rounds.members},
            agent_ids=self._membership.agent_ids,
            counted=self._updates.counted,
            aggregator=self._updates.aggregator_state,
        )
        seconds = self.figures.seconds
        counted = {*self.rounds.submitted, *self.rounds.merged} - self._updates.refused.keys()
        happened = happenings(self.rounds, refused=refused, left_out=self._updates.left_out)
        metrics = metrics_line(
            state,
            self.figures.contributions(counted),
            rounds=self.rounds.rounds,
            seconds=seconds,
            happenings=happened,
            aggregation=notes,
            ages=self._trunk_round.ages,
        )
        await self._off_loop(lambda: self._write(state, metrics))
        self._state = state
        if self.rounds.current < self.rounds.rounds:
            await self.prepare_entrance()
        self.rounds.commit(self._clock())
        for session in self._begin_round():
            await self._engine.empty(session.slot)
        _log.info("round %d of %d is written (%.1f s)", state.round, self.rounds.rounds, seconds)
        self.figures.note(happened)
        if happened:
            _log.info("round %d: %s", state.round, in_words(happened))

    async def _off_loop(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _write(self, state: RunState, metrics: Mapping[str, object]) -> None:
        """Write a round's end; the checkpoint comes last, so a crash before it runs the round again."""
        try:
            adapter, residual = {**state.trunk, **state.ends}, self._updates.residual
            self._export(state.round, merged(adapter, residual) if residual else adapter)
            self._store.write_metrics(metrics)
            self._store.publish(state.round)
            self._store.save(state)
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"Round {state.round} cannot be written to {self._store.directory} ({error}); make room and start "
                "the server again with --resume: the round is then run again."
            ) from error
