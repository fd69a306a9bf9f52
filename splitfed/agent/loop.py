"""An agent's life: join, train round after round, come back after every interruption, end with the run."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from splitfed.agent.gate import open_gate
from splitfed.agent.progress import Progress
from splitfed.agent.segments import fetch_segments
from splitfed.agent.server_calls import RoundReport, ServerCalls, translated
from splitfed.agent.state import AgentState
from splitfed.agent.tokenizer import open_tokenizer
from splitfed.compress import get_codec
from splitfed.config import AgentConfig, RunConfig
from splitfed.errors import JoinRefused, RoundLost, ServerUnreachable
from splitfed.models import (
    TensorIdentity,
    adapter_state,
    canonical_config,
    load_adapter_state,
    resolve_base,
    segment_tensor_names,
    tensor_hashes,
)
from splitfed.privacy import RELATION, UNIT, Ledger, epsilon
from splitfed.proto.v1 import training_pb2
from splitfed.training.client_step import ClientTrainer
from splitfed.training.data import ExampleSet, load_examples
from splitfed.training.evaluation import evaluate
from splitfed.training.link import Link, Traffic, link_codecs
from splitfed.training.order import step_examples
from splitfed.training.setup import open_bottom_and_top
from splitfed.transport.backoff import Backoff
from splitfed.transport.link import GrpcLink

_log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Prepared:
    """What an agent sets up once, when it knows the run.

    Attributes:
        run: The run's configuration.
        trainer: The client's half of the training.
        train: Examples to train on.
        held_out: Examples to evaluate on; may be empty.
        blocks: Blocks of the trunk.
        config_sha256: Hash of the base model's configuration.
        tensors: Identity of each tensor of the agent's segments.
    """

    run: RunConfig
    trainer: ClientTrainer
    train: ExampleSet
    held_out: ExampleSet
    blocks: range
    config_sha256: str
    tensors: dict[str, TensorIdentity]

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.run.run.name


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
        self._ledger = Ledger(state.ledger_path)
        self._prepared: Prepared | None = None
        self._backoff = Backoff(config.agent.retry_for_s)

    def run(self) -> None:
        """Take part in the run until it is over.

        Raises:
            SplitFedError: What ends the agent before: a refusal, an exhausted budget, a loss that is not finite, a
                server that stays away.
        """
        while True:
            try:
                self._take_part()
                return
            except RoundLost as error:
                _log.info("%s; joining again", error)
                reason: Exception = error
            except ServerUnreachable as error:
                if self._backoff.tries == 0:
                    _log.warning("no server at %s (%s); trying again", self._config.agent.server, error)
                reason = error
            if not self._backoff.pause():
                raise ServerUnreachable(
                    f"No server answered at {self._config.agent.server} in {self._backoff.tries + 1} tries over "
                    f"{self._config.agent.retry_for_s:.0f} s; start it, or check [agent] server and retry_for_s "
                    f"(last reason: {reason})."
                ) from reason

    def close(self) -> None:
        """Release the ledger."""
        self._ledger.close()

    def _take_part(self) -> None:
        agent = self._config.agent
        calls = ServerCalls(
            agent.server, agent.fed_server, self._config.tls, client=agent.name, agent_id=self._state.agent_id
        )
        with closing(calls):
            run = calls.describe()
            prepared = self._prepare(run, calls)
            agents, joined = calls.join(
                prepared.run_id, prepared.config_sha256, prepared.tensors, self._weight(prepared)
            )
            self._backoff.progress()
            _log.info("joined the run %s (%d of %d agents are here)", prepared.run_id, joined, agents)
            while (opened := self._next_round(calls, prepared)) is not None:
                self._run_round(calls, prepared, opened)
                self._backoff.progress()
        self._progress.finish(prepared.run_id)

    def _next_round(self, calls: ServerCalls, prepared: Prepared) -> int | None:
        """Wait for a round that this agent has work in; None when the run is over."""
        for event in calls.watch(prepared.run_id):
            self._backoff.progress()
            what = event.WhichOneof("event")
            if what == "run_finished":
                return None
            if what == "round_opened" and not event.round_opened.is_submitted:
                return int(event.round_opened.round)
            if what == "waiting":
                _log.info("waiting: %d of %d agents are here", event.waiting.joined, event.waiting.agents)
            if what == "draining":
                break
        raise ServerUnreachable("the server is shutting down")

    def _run_round(self, calls: ServerCalls, prepared: Prepared, round: int) -> None:
        """Train a round from its beginning and send what came of it."""
        trainer, run = prepared.trainer, prepared.run
        started_s = self._clock()
        traffic = Traffic()
        adapter_codec = get_codec(run.codecs.adapter)
        ends = {**adapter_state(trainer.bottom), **adapter_state(trainer.top)}
        shapes = {name: tuple(tensor.shape) for name, tensor in ends.items()}
        ends = self._persistently(lambda: calls.fetch_adapter(prepared.run_id, round, shapes, adapter_codec, traffic))
        load_adapter_state(trainer.bottom, ends)
        load_adapter_state(trainer.top, ends)
        self._load_optimiser(prepared, round)
        opening = training_pb2.OpenRound(
            run_id=prepared.run_id,
            client=self._config.agent.name,
            agent_id=self._state.agent_id,
            round=round,
            first_block=prepared.blocks.start,
            end_block=prepared.blocks.stop,
        )
        codecs = link_codecs({name: get_codec(codec) for name, codec in run.codecs.model_dump().items()})
        silence_s = run.federation.agent_timeout_s
        link = GrpcLink(
            calls.training,
            opening,
            codecs,
            backoff=Backoff(self._config.agent.retry_for_s),
            silence_s=silence_s,
            traffic=traffic,
        )
        with link:
            losses, loss, tokens = self._train(link, prepared, round)
            held_out_loss = self._evaluate(link, prepared, round)
        shares = self._config.agent.share_loss
        report = RoundReport(tokens, loss if shares else None, held_out_loss if shares else None)
        ends = {**adapter_state(trainer.bottom), **adapter_state(trainer.top)}
        self._state.keep_optimiser(prepared.run_id, round, trainer.optimiser.state())
        if trainer.is_training:
            self._ledger.charge(
                "adapter", noise_multiplier=0, records=[], sequences=1, run=prepared.run_id, round=round, step=0
            )
        self._persistently(lambda: calls.submit_adapter(prepared.run_id, round, ends, adapter_codec, report, traffic))
        delta = self._config.privacy.delta
        line = {
            "round": round,
            "training_loss": loss,
            "step_losses": losses,
            "held_out_loss": held_out_loss,
            "epsilon": {channel: self._ledger.spent(channel, delta) for channel in ("smashed", "output_gradient")},
            "epsilon_per_release": epsilon([(self._config.privacy.noise_multiplier, 1)], delta),
            "total": self._ledger.total_statement(),
            "delta": delta,
            "unit": UNIT,
            "relation": RELATION,
            "tokens": tokens,
            "bytes_up": traffic.sent_bytes,
            "bytes_down": traffic.received_bytes,
            "seconds": self._clock() - started_s,
        }
        self._state.write_metrics(prepared.run_id, line)
        self._progress.round_is_over(line, run.training.rounds)

    def _persistently(self, call: Callable[[], R]) -> R:
        """Make a call that may be made twice until it is answered: a lost answer must not cost a round."""
        while True:
            try:
                return call()
            except ServerUnreachable:
                if not self._backoff.pause():
                    raise

    def _train(self, link: Link, prepared: Prepared, round: int) -> tuple[list[float], float, int]:
        """Run the round's local steps; gives the loss of each, their mean per token, and the rows that were sent."""
        training = prepared.run.training
        losses: list[float] = []
        loss_sum, label_tokens, sent_tokens = 0.0, 0, 0
        for step in range(training.local_steps):
            chosen = step_examples(
                len(prepared.train),
                seed=prepared.run.run.seed,
                client=self._config.agent.name,
                round=round,
                step=step,
                batch_size=training.batch_size,
                local_steps=training.local_steps,
            )
            result = prepared.trainer.step(link, [prepared.train[i] for i in chosen], round=round, step=step)
            losses.append(result.loss)
            loss_sum += result.loss_sum
            label_tokens += result.label_tokens
            sent_tokens += result.sent_tokens
            self._progress.step_is_over(round, training.rounds, step, training.local_steps, result.loss)
        return losses, loss_sum / max(label_tokens, 1), sent_tokens

    def _evaluate(self, link: Link, prepared: Prepared, round: int) -> float | None:
        """Measure this client's model at the end of its local training."""
        if not prepared.held_out:
            return None
        trainer, training = prepared.trainer, prepared.run.training
        return evaluate(
            link,
            trainer.bottom,
            trainer.top,
            trainer.releases,
            prepared.held_out,
            batch_size=training.micro_batch_size or training.batch_size,
            max_tokens=training.max_tokens,
            pad_token_id=trainer.pad_token_id,
            round=round,
        )

    def _prepare(self, run: RunConfig, calls: ServerCalls) -> Prepared:
        """Load segments and data for a run, once."""
        if self._prepared is not None:
            if self._prepared.run != run:
                raise JoinRefused(
                    f"The server at {self._config.agent.server} now serves another configuration; start this agent "
                    "again."
                )
            return self._prepared
        folder = self._base_folder(run, calls)
        config_sha256 = canonical_config(folder)
        bottom, top = open_bottom_and_top(folder, run.model, run.lora, seed=run.run.seed)
        names = segment_tensor_names(folder, bottom_blocks=run.model.bottom_blocks, top_blocks=run.model.top_blocks)
        tokenizer = open_tokenizer(folder)
        train, held_out = load_examples(
            self._config.data, tokenizer, max_tokens=run.training.max_tokens, record_hash=self._ledger.record_hash
        )
        _log.info("%d examples to train on, %d held out", len(train), len(held_out))
        gate = open_gate(self._config.privacy, self._ledger, run.run.name)
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        trainer = ClientTrainer(
            bottom,
            top,
            run.training,
            gate,
            client=self._config.agent.name,
            seed=run.run.seed,
            pad_token_id=pad_token_id,
        )
        self._ledger.set_policy(
            coupled=trainer.is_training,
            delta=self._config.privacy.delta,
            epsilon_budget=self._config.privacy.epsilon_budget,
        )
        self._progress.policy(self._config.privacy, is_training=trainer.is_training)
        blocks = range(len(bottom.blocks), top.blocks.start)
        tensors = tensor_hashes(folder, names["bottom"] | names["top"])
        self._prepared = Prepared(run, trainer, train, held_out, blocks, config_sha256, tensors)
        return self._prepared

    def _base_folder(self, run: RunConfig, calls: ServerCalls) -> Path:
        if self._config.agent.base is not None:
            return resolve_base(self._config.agent.base, run.model.revision)
        with translated():
            return fetch_segments(
                calls.joining, run.run.name, self._state.base_cache, on_progress=self._progress.fetched
            )

    def _weight(self, prepared: Prepared) -> int:
        """Give this agent's weight: with noise on a configured count, because the true one says something."""
        if self._config.privacy.aggregation_weight is not None:
            return self._config.privacy.aggregation_weight
        return 1 if prepared.trainer.releases.is_noisy else len(prepared.train)

    def _load_optimiser(self, prepared: Prepared, round: int) -> None:
        optimiser = prepared.trainer.optimiser
        optimiser.clear_gradients()
        state = self._state.optimiser_after(prepared.run_id, round - 1)
        if state is None:
            _log.warning("the optimiser's state after round %d is not here; it starts afresh", round - 1)
        optimiser.load(state or {})
