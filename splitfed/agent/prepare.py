"""What an agent sets up once it knows the run: segments, data, the gate and the trainer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from splitfed.agent.own_run import run_key
from splitfed.agent.policy import refuse_weak_noise
from splitfed.agent.workload import workload_of
from splitfed.config import AgentConfig, PrivacySection, RunConfig
from splitfed.federation import trained_factors
from splitfed.models import (
    TensorIdentity,
    adapter_parameters,
    canonical_config,
    load_residual,
    residual_parameters,
    segment_tensor_names,
    set_trained_factors,
    tensor_hashes,
)
from splitfed.models.factors import factor_of
from splitfed.privacy import Ledger
from splitfed.training.client_step import ClientTrainer
from splitfed.training.data import ExampleSet, load_examples
from splitfed.training.protection import open_gate, settle_clip, settle_noise
from splitfed.training.releases import LedgeredReleases
from splitfed.training.setup import open_bottom_and_top
from splitfed.training.tokenizer import open_tokenizer
from splitfed.transport.adapters import RESIDUAL

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What an agent sets up once, when it knows the run.

    Attributes:
        run: The run's configuration.
        trainer: The client's half of the training.
        gate: What everything passes that leaves.
        train: Examples to train on.
        held_out: Examples to evaluate on; may be empty.
        blocks: Blocks of the trunk.
        config_sha256: Hash of the base model's configuration.
        tensors: Identity of each tensor of the agent's segments.
        privacy: What holds on this device, settled.
        weight: The agent's weight in every mean: with noise on a configured count, because the true one says something.
        personal: Names of its adapter's tensors that it keeps to itself.
    """

    run: RunConfig
    trainer: ClientTrainer
    gate: LedgeredReleases
    train: ExampleSet
    held_out: ExampleSet
    blocks: range
    config_sha256: str
    tensors: dict[str, TensorIdentity]
    privacy: PrivacySection
    weight: int
    personal: frozenset[str] = frozenset()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything that a round starts from, as it comes from the server."""
        named = {name: tensor.shape for name, tensor in self.trainer.adapter_state().items()}
        for segment in self.trainer.segments:
            named |= {f"{RESIDUAL}{name}": tensor.shape for name, tensor in residual_parameters(segment).items()}
        return {name: tuple(shape) for name, shape in named.items()}

    def begin_round(
        self, round: int, start: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Put bottom and top at a round's start; gives the adapters that came from the server.

        Args:
            round: The round, from 1.
            start: What came from the server.
            kept: What this agent kept to itself at its last round's end; None: nothing yet.
        """
        factors = trained_factors(self.run.rule.lora or "factors", round)
        residual = {name.removeprefix(RESIDUAL): tensor for name, tensor in start.items() if name.startswith(RESIDUAL)}
        for segment in self.trainer.segments:
            set_trained_factors(segment, factors)
            if residual:
                load_residual(segment, residual)
        ends = {name: tensor for name, tensor in start.items() if not name.startswith(RESIDUAL)}
        self.trainer.begin_round({**ends, **(kept or {})})
        return ends

    def update(self, start: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        """Give what leaves of bottom and top at a round's end: the gate sees what was trained, and only that.

        Args:
            start: What `begin_round` gave.
            round: The round, from 1.
        """
        factors = trained_factors(self.run.rule.lora or "factors", round)
        after = {
            name: tensor
            for name, tensor in self.trainer.adapter_state().items()
            if factor_of(name) in factors and name not in self.personal
        }
        before = {name: start[name] for name in after}
        return self.trainer.releases.adapter_update(before, after, round=round)

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.run.run.name

    @property
    def run_key(self) -> str:
        """Name of this run and no other, for files that outlive it: its id, and a hash of its configuration."""
        return run_key(self.run)


def prepare(config: AgentConfig, run: RunConfig, privacy: PrivacySection, folder: Path, ledger: Ledger) -> Prepared:
    """Load segments and data for a run, and set the ledger's policy.

    Args:
        config: The agent's configuration.
        run: The run's.
        privacy: What holds on this device.
        folder: The base model, or this agent's side of it.
        ledger: Where releases will be charged.

    Raises:
        WeightsError: If the base model cannot be loaded.
        DataError: If the data cannot be used.
        ConfigError: If the adapter's targets are not in the model, or no noise keeps the epsilon that was asked for.
        JoinRefused: If the noise that was settled on is weaker than the owner allows.
    """
    config_sha256 = canonical_config(folder)
    bottom, top = open_bottom_and_top(folder, run.model, run.lora, seed=run.run.seed, residual_rank=run.residual_rank)
    names = segment_tensor_names(folder, bottom_blocks=run.model.bottom_blocks, top_blocks=run.model.top_blocks)
    tokenizer = open_tokenizer(folder)
    train, held_out = load_examples(
        config.data, tokenizer, max_tokens=run.training.max_tokens, record_hash=ledger.record_hash
    )
    _log.info("examples to train on: %d; held out: %d", len(train), len(held_out))
    workload = workload_of(config, run, train, held_out, bottom, top)
    privacy = settle_noise(settle_clip(privacy, bottom), workload)
    refuse_weak_noise(config.privacy, privacy, run)
    ledger.set_policy(delta=privacy.delta, epsilon_budget=config.privacy.epsilon_budget, relation=privacy.relation)
    gate = open_gate(privacy, ledger, run.run.name, bottom=bottom, top=top, workload=workload)
    trainer = ClientTrainer(
        bottom,
        top,
        run.training,
        gate,
        client=config.agent.name,
        seed=run.run.seed,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
        exchanges=run.federation.merge_ends == "step",
    )
    weight = config.privacy.aggregation_weight
    if weight is None:
        weight = 1 if gate.is_noisy else len(train)
    return Prepared(
        run=run,
        trainer=trainer,
        gate=gate,
        train=train,
        held_out=held_out,
        blocks=range(bottom.blocks.stop, top.blocks.start),
        config_sha256=config_sha256,
        tensors=tensor_hashes(folder, names["bottom"] | names["top"]),
        privacy=privacy,
        weight=weight,
        personal=frozenset(
            name
            for segment in (bottom, top)
            if segment.kind in config.agent.personal
            for name in adapter_parameters(segment)
        ),
    )
