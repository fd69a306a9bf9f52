"""One run of a sweep: train in this process, and measure what came of it the way anyone would."""

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from splitfed.config.run import decided_rule
from splitfed.config.sweep_cells import CellConfig
from splitfed.errors import DataError, SplitFedError
from splitfed.models import Partition, adapter_parameters, adapter_state, partition
from splitfed.privacy import Ledger
from splitfed.study.sweep.data import SweepData, data_hash, deal, load_sweep_data
from splitfed.study.sweep.noise import with_repeatable_noise
from splitfed.study.whole_model import open_whole_model
from splitfed.training.baselines import Burden, adapter_burden, central_burden, central_lora, fed_lora
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import Example, collate
from splitfed.training.protection import Workload, open_gate, settle_clip, settle_noise
from splitfed.training.releases import Releases
from splitfed.training.setup import DTYPES
from splitfed.training.simulate import Simulation, simulate
from splitfed.training.tokenizer import open_tokenizer

Figures = dict[str, float | int | str | None]

_AT_ONCE: Final = 32
_LARGEST_EXPONENT: Final = 700.0


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        cell: Its name.
        config: Its configuration.
        base: Folder of the base model.
        data_sha256: Hash of the data that the sweep began with.
    """

    cell: str
    config: CellConfig
    base: Path
    data_sha256: str


class Bench:
    """Makes runs, one after the other; what they share of the data is read once.

    Guarantees:
        * The figures of a run, but for its seconds, do not depend on the runs before it, nor on the process.
    """

    def __init__(self) -> None:
        self._tokenizers: dict[Path, PreTrainedTokenizerBase] = {}
        self._data: dict[str, SweepData] = {}
        self._base_losses: dict[tuple[Path, str, str], float] = {}

    def outcome(self, job: Job) -> Figures:
        """Make a run; gives its figures, or the sentence of what went wrong in it as ``error``."""
        try:
            return self.run(job)
        except (SplitFedError, ValueError, ArithmeticError, RuntimeError, MemoryError, OSError) as error:
            return {"error": " ".join(str(error).split()) or type(error).__name__}

    def run(self, job: Job) -> Figures:
        """Make a run.

        Raises:
            SplitFedError: If it cannot be made.
            ValueError: If its settings do not go together.
        """
        config, training = job.config, job.config.training
        data = self._data_of(job)
        shards = deal(data, config.data, agents=config.federation.agents, seed=config.seed)
        model = open_whole_model(job.base, dtype=DTYPES[config.model.dtype])
        tokenizer = self._tokenizer(job.base)
        base_loss = self._base_loss(job, model, data.held_out)
        started_s = time.process_time()
        made = _Made.of(job, model, tokenizer, shards)
        took_s = time.process_time() - started_s
        loss = _loss(_with_adapter(made.run, job), data.held_out, tokenizer)
        crossed, privacy = list(made.run.traffic.values()), config.privacy
        in_a_round = config.federation.cohort or config.federation.agents
        return {
            "base_loss": base_loss,
            "held_out_loss": loss,
            "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
            "epsilon": made.epsilon,
            "delta": privacy.delta if privacy.is_on else None,
            "relation": privacy.relation if privacy.is_on else None,
            "activation_up_bytes": _mean(traffic.sent_bytes // training.rounds for traffic in crossed),
            "activation_down_bytes": _mean(traffic.received_bytes // training.rounds for traffic in crossed),
            "adapter_up_bytes": _mean(burden.sent_bytes for burden in made.burdens),
            "adapter_down_bytes": _mean(burden.received_bytes for burden in made.burdens),
            "data_up_bytes": _mean(burden.data_bytes for burden in made.burdens),
            "trainable_parameters": _mean(burden.trainable_parameters for burden in made.burdens),
            "steps": training.rounds * training.local_steps,
            "samples": in_a_round * training.rounds * training.local_steps * training.batch_size,
            "seconds": round(took_s, 2),
        }

    def _tokenizer(self, base: Path) -> PreTrainedTokenizerBase:
        if base not in self._tokenizers:
            self._tokenizers[base] = open_tokenizer(base)
        return self._tokenizers[base]

    def _base_loss(self, job: Job, model: PreTrainedModel, held_out: Sequence[Example]) -> float:
        key = (job.base, job.config.model.dtype, _data_key(job))
        if key not in self._base_losses:
            self._base_losses[key] = _loss(model, held_out, self._tokenizer(job.base))
        return self._base_losses[key]

    def _data_of(self, job: Job) -> SweepData:
        data, max_tokens = job.config.data, job.config.training.max_tokens
        key = _data_key(job)
        if key not in self._data:
            if data_hash(data) != job.data_sha256:
                raise DataError(f"{data.path}: has changed while the sweep ran; start the sweep again")
            self._data[key] = load_sweep_data(data, self._tokenizer(job.base), max_tokens=max_tokens)
        return self._data[key]


@dataclass(frozen=True)
class _Made:
    """A trained adapter and what it asked of each agent."""

    run: Simulation
    burdens: Sequence[Burden]
    epsilon: float | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shards: Mapping[str, list[Example]],
    ) -> "_Made":
        config = job.config
        if config.method == "central":
            joint = config.training.batch_size * config.federation.agents
            training = config.training.model_copy(update={"batch_size": joint})
            run = central_lora(model, tokenizer, shards, training=training, lora=config.lora, seed=config.seed)
            return cls(run, [central_burden(shard) for shard in shards.values()])
        if config.method == "fedlora":
            run = fed_lora(model, tokenizer, shards, training=config.training, lora=config.lora, seed=config.seed)
            return cls(run, [adapter_burden(run.adapter)] * len(shards))
        return cls._split(job, model, tokenizer, shards)

    @classmethod
    def _split(
        cls,
        job: Job,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shards: Mapping[str, list[Example]],
    ) -> "_Made":
        config, training = job.config, job.config.training
        cut = {"bottom_blocks": config.model.bottom_blocks, "top_blocks": config.model.top_blocks}
        parts = partition(model, **cut)
        with ExitStack() as opened:
            gates = _Gates(job, parts, shards, opened) if config.privacy.is_on else None
            run = simulate(
                parts,
                tokenizer,
                shards,
                training=training,
                lora=config.lora,
                codecs=config.codecs,
                federation=config.federation,
                aggregation=config.aggregation,
                seed=config.seed,
                releases=gates,
            )
            epsilon = None if gates is None else gates.epsilon
        rule = decided_rule(config.lora, config.aggregation, config.privacy)
        burden = adapter_burden(
            {**adapter_state(parts.bottom), **adapter_state(parts.top)},
            rule=rule.lora or "factors",
            residual_rank=(rule.flora_rank or config.lora.rank) if rule.lora == "flora" else 0,
            exchanges=training.local_steps if config.federation.merge_ends == "step" else 0,
        )
        return cls(run, [burden] * len(shards), epsilon)


class _Gates:
    """Opens each agent's gate, on a ledger of its own that is kept while the run lasts."""

    def __init__(self, job: Job, parts: Partition, shards: Mapping[str, list[Example]], opened: ExitStack) -> None:
        self._job, self._parts, self._shards, self._opened = job, parts, shards, opened
        self._folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        self._ledgers: list[Ledger] = []

    def __call__(self, client: str) -> Releases:
        config, parts = self._job.config, self._parts
        workload = Workload(
            config.training,
            [example.record for example in self._shards[client]],
            bottom_trains=bool(adapter_parameters(parts.bottom)),
            top_trains=bool(adapter_parameters(parts.top)),
            client=client,
            seed=config.seed,
        )
        privacy = settle_noise(settle_clip(config.privacy, parts.bottom), workload)
        ledger = self._opened.enter_context(Ledger(self._folder / client / "ledger.jsonl"))
        ledger.set_policy(delta=privacy.delta, relation=privacy.relation)
        self._ledgers.append(ledger)
        gate = open_gate(privacy, ledger, "sweep", bottom=parts.bottom, top=parts.top, workload=workload)
        return with_repeatable_noise(gate, self._job.cell, client)

    @property
    def epsilon(self) -> float:
        """What the run has cost the record that is worst off, of all agents'; infinite if nothing is guaranteed."""
        spent = [ledger.spent(None) for ledger in self._ledgers]
        return max(math.inf if each is None else each for each in spent)


def _data_key(job: Job) -> str:
    return f"{job.config.training.max_tokens} {job.config.data.model_dump_json()}"


def _with_adapter(run: Simulation, job: Job) -> torch.nn.Module:
    """Put the exported adapter on the base model, with stock transformers and PEFT."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        run.export(folder, base=job.base)
        model = open_whole_model(job.base, dtype=DTYPES[job.config.model.dtype])
        return PeftModel.from_pretrained(model, folder)


@torch.no_grad()
def _loss(model: torch.nn.Module, held_out: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> float:
    """Measure the mean loss per token in nats, as if nothing were to be trained."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(held_out), _AT_ONCE):
        batch = collate(held_out[start : start + _AT_ONCE], pad_token_id=tokenizer.pad_token_id or 0)
        total += causal_lm_loss(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    return total / max(tokens, 1)


def _mean(values: Iterable[int]) -> int:
    return round(statistics.mean(values))
