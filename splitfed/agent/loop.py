"""An agent's life: join, train round after round, come back after every interruption, end with the run."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from torch import Tensor

from splitfed.agent.leaving import leave
from splitfed.agent.local_round import LocalRound, check_budget_of_round, evaluate_locally, train_locally
from splitfed.agent.no_server import gave_up, goes_on
from splitfed.agent.own_run import own_run
from splitfed.agent.policy import agree
from splitfed.agent.prepare import Prepared, prepare
from splitfed.agent.progress import Progress
from splitfed.agent.segments import fetch_segments
from splitfed.agent.server_calls import RoundReport, ServerCalls, translated
from splitfed.agent.state import PERSONAL, AgentState
from splitfed.compress import get_codec
from splitfed.config import AgentConfig, RunConfig
from splitfed.errors import LinkError, RoundLost, ServerUnreachable
from splitfed.federation.variants import variant_of
from splitfed.models import resolve_base
from splitfed.privacy import CHANNELS, UNIT, Ledger, witness_folder
from splitfed.proto.v1 import federation_pb2, training_pb2
from splitfed.training.link import Traffic, link_codecs
from splitfed.training.optimiser import without
from splitfed.transport.backoff import Backoff
from splitfed.transport.link import GrpcLink, MeanGradient

_log = logging.getLogger(__name__)

R = TypeVar("R")


class Agent:
    """One agent, from its configuration to the end of the run.

    Args:
        config: The agent's configuration.
        state: Its state directory.
        progress: What a person sees.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        config: AgentConfig,
        state: AgentState,
        progress: Progress,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._state = state
        self._progress = progress
        self._clock = clock
        self._ledger = Ledger(state.ledger_path, witnesses=witness_folder())
        self._prepared: Prepared | None = None
        self._joined: str | None = None
        self._backoff = Backoff(config.agent.retry_for_s)

    def run(self) -> None:
        """Take part in the run until it is over; whatever else ends the agent, the server hears that it stops.

        Raises:
            SplitFedError: What ends the agent before: a refusal, an exhausted budget, a loss that is not finite, a
                server that stays away.
        """
        with ExitStack() as stopping:
            stopping.push(self._leave)
            self._keep_taking_part()

    def _keep_taking_part(self) -> None:
        while True:
            try:
                self._take_part()
                return
            except RoundLost as error:
                _log.info("%s; joining again", str(error).rstrip("."))
                reason: Exception = error
            except ServerUnreachable as error:
                goes_on(self._config.agent, self._backoff.tries, error)
                reason = error
            if not self._backoff.pause():
                raise gave_up(self._config.agent, self._backoff.tries + 1, reason) from reason

    def close(self) -> None:
        """Release the ledger."""
        self._ledger.close()

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._joined is not None:
            leave(self._connect, self._joined, error)

    def _connect(self) -> ServerCalls:
        agent = self._config.agent
        return ServerCalls(
            agent.server, agent.fed_server, self._config.tls, client=agent.name, agent_id=self._state.agent_id
        )

    def _take_part(self) -> None:
        with closing(self._connect()) as calls:
            run = own_run(self._config.agent, calls.describe())
            prepared = self._prepare(run, calls)
            agents, joined = calls.join(
                prepared.run_id,
                prepared.config_sha256,
                prepared.tensors,
                weight=prepared.weight,
                own=prepared.run,
                personal=prepared.personal,
            )
            self._joined = prepared.run_id
            self._backoff.progress()
            here = f"{joined} of {agents}" if joined <= agents else str(joined)
            _log.info("joined the run %s (%s here)", prepared.run_id, here)
            while (opened := self._next_round(calls, prepared)) is not None:
                self._run_round(calls, prepared, opened)
                self._backoff.progress()
        self._progress.finish(prepared.run_id)

    def _next_round(self, calls: ServerCalls, prepared: Prepared) -> federation_pb2.RoundOpened | None:
        """Wait for a round that this agent is asked for and has work in; None when the run is over."""
        for event in calls.watch(prepared.run_id):
            self._backoff.progress()
            what = event.WhichOneof("event")
            if what == "run_finished":
                return None
            opened = event.round_opened
            if what == "round_opened" and opened.is_selected and not opened.is_submitted:
                return opened
            if what == "round_opened" and not opened.is_submitted:
                takes_turns = variant_of(prepared.run.federation.variant).takes_turns
                waits = "not its turn yet" if takes_turns else "not asked yet"
                _log.info("round %d of %d: %s", opened.round, opened.rounds, waits)
            if what == "waiting":
                _log.info("waiting for agents (%d of %d here)", event.waiting.joined, event.waiting.agents)
            if what == "draining":
                break
        raise ServerUnreachable("the server is shutting down")

    def _run_round(self, calls: ServerCalls, prepared: Prepared, opened: federation_pb2.RoundOpened) -> None:
        """Train a round from its beginning and send what came of it."""
        started_s, round = self._clock(), opened.round
        traffic, adapter_traffic = Traffic(), Traffic()
        trainer, training = prepared.trainer, prepared.run.training
        check_budget_of_round(self._ledger, prepared, client=self._config.agent.name, round=round)
        start = self._start_from(calls, prepared, opened, adapter_traffic)
        with self._open_link(calls, prepared, round, traffic) as link:
            local = train_locally(
                link,
                prepared,
                client=self._config.agent.name,
                round=round,
                on_step=lambda step, loss: self._progress.step_is_over(
                    round, training.rounds, step, training.local_steps, loss
                ),
            )
            held_out = evaluate_locally(link, prepared, start, round=round)
        after = trainer.adapter_state()
        kept = trainer.optimiser.state() | {f"{PERSONAL}{name}": after[name] for name in prepared.personal}
        self._state.keep_optimiser(prepared.run_key, round, kept, start=opened.last_counted)
        held_out_loss = None if held_out is None else held_out.own
        refused = self._submit(calls, prepared, round, start, local, held_out_loss, adapter_traffic)
        if refused is not None:
            _log.warning(
                "round %d goes on without this agent, which takes part in the next one: its update is refused. %s",
                round,
                refused,
            )
        privacy = prepared.privacy
        line = {
            "round": round,
            "training_loss": local.loss,
            "step_losses": local.losses,
            "held_out_loss": held_out_loss,
            "held_out_loss_merged": None if held_out is None else held_out.merged,
            "epsilon": {channel: self._ledger.spent(channel) for channel in CHANNELS if channel != "loss"},
            "epsilon_total": self._ledger.spent(None),
            "total": self._ledger.total_statement(),
            "delta": privacy.delta,
            "unit": UNIT,
            "relation": privacy.relation,
            "tokens": local.sent_tokens,
            "bytes_up": traffic.sent_bytes + adapter_traffic.sent_bytes,
            "bytes_down": traffic.received_bytes + adapter_traffic.received_bytes,
            "adapter_bytes_up": adapter_traffic.sent_bytes,
            "adapter_bytes_down": adapter_traffic.received_bytes,
            "seconds": self._clock() - started_s,
            "waiting_seconds": traffic.waited_s + adapter_traffic.waited_s,
        }
        if refused is not None:
            line["refused"] = refused
        self._state.write_metrics(prepared.run_id, line)
        self._progress.round_is_over(line, training.rounds)

    def _start_from(
        self, calls: ServerCalls, prepared: Prepared, opened: federation_pb2.RoundOpened, traffic: Traffic
    ) -> dict[str, Tensor]:
        """Put the adapters at the round's beginning and the optimiser after this agent's last; give those adapters."""
        trainer = prepared.trainer
        codec, shapes = get_codec(prepared.run.codecs.adapter), prepared.shapes
        with traffic.waiting():
            start = self._persistently(
                lambda: calls.fetch_adapter(prepared.run_id, opened.round, shapes, codec, traffic)
            )
        state = self._state.optimiser_after(prepared.run_key, opened.last_counted)
        if state is None:
            _log.warning("the optimiser's state after round %d is not here; it starts afresh", opened.last_counted)
        state = state or {}
        kept = {name.removeprefix(PERSONAL): state[name] for name in state if name.startswith(PERSONAL)}
        ends = prepared.begin_round(opened.round, start, kept)
        moments = {name: moment for name, moment in state.items() if not name.startswith(PERSONAL)}
        if prepared.run.rule.renews_factors:
            moments = without(moments, ends.keys() - prepared.personal)
        trainer.optimiser.load(moments)
        return ends

    def _open_link(self, calls: ServerCalls, prepared: Prepared, round: int, traffic: Traffic) -> GrpcLink:
        opening = training_pb2.OpenRound(
            run_id=prepared.run_id,
            client=self._config.agent.name,
            agent_id=self._state.agent_id,
            round=round,
            first_block=prepared.blocks.start,
            end_block=prepared.blocks.stop,
        )
        return GrpcLink(
            calls.training,
            opening,
            link_codecs(prepared.run.codecs),
            backoff=Backoff(self._config.agent.retry_for_s),
            silence_s=prepared.run.federation.agent_timeout_s,
            is_joint=variant_of(prepared.run.federation.variant).steps_jointly,
            mean_gradient=self._exchange(calls, prepared, round, traffic),
            traffic=traffic,
        )

    def _exchange(self, calls: ServerCalls, prepared: Prepared, round: int, traffic: Traffic) -> MeanGradient | None:
        """Give what merges the gradients of bottom and top at every step, where the run asks for it."""
        if prepared.run.federation.merge_ends == "round":
            return None
        codec = get_codec(prepared.run.codecs.adapter)
        return lambda step, gradients, tokens: self._persistently(
            lambda: calls.mean_gradient(prepared.run_id, round, step, gradients, codec, tokens=tokens, traffic=traffic)
        )

    def _submit(
        self,
        calls: ServerCalls,
        prepared: Prepared,
        round: int,
        start: Mapping[str, Tensor],
        local: LocalRound,
        held_out_loss: float | None,
        traffic: Traffic,
    ) -> str | None:
        """Let the adapters pass the gate, charge a loss that is shared, then send both; gives why they are refused."""
        shares = self._config.agent.share_loss
        if shares:
            self._ledger.charge(
                "loss", noise_multiplier=0, records=[], sequences=1, run=prepared.run_id, round=round, step=0
            )
        report = RoundReport(local.sent_tokens, local.loss if shares else None, held_out_loss if shares else None)
        state = prepared.update(start, round)
        codec = get_codec(prepared.run.codecs.adapter)
        with traffic.waiting():
            return self._persistently(
                lambda: calls.submit_adapter(prepared.run_id, round, state, codec, report, traffic)
            )

    def _persistently(self, call: Callable[[], R]) -> R:
        """Make a call that may be made twice until it is answered: a lost answer must not cost a round."""
        while True:
            try:
                return call()
            except ServerUnreachable:
                if not self._backoff.pause():
                    raise

    def _prepare(self, run: RunConfig, calls: ServerCalls) -> Prepared:
        """Load segments and data for a run, once."""
        if self._prepared is None:
            privacy = agree(self._config.privacy, run)
            self._prepared = prepare(self._config, run, privacy, self._base_folder(run, calls), self._ledger)
            self._progress.policy(self._prepared.privacy, is_training=self._prepared.trainer.is_training)
        if self._prepared.run != run:
            raise LinkError(
                f"The server at {self._config.agent.server} now serves another configuration; start this agent again."
            )
        return self._prepared

    def _base_folder(self, run: RunConfig, calls: ServerCalls) -> Path:
        if self._config.agent.base is not None:
            return resolve_base(self._config.agent.base, run.model.revision)
        with translated():
            return fetch_segments(
                calls.joining, run.run.name, run.model, self._state.base_cache, on_progress=self._progress.fetched
            )
