"""A whole run in one process: the same client step, the same trunk step, the link without a wire."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.config.aggregation import AggregationSection
from splitfed.federation import Aggregator, Update, make_aggregator, merged, trained_factors
from splitfed.federation.cohort import ranked
from splitfed.federation.variants import Staleness, Variant, variant_of
from splitfed.models import (
    Partition,
    Trunk,
    adapter_parameters,
    adapter_state,
    add_adapter,
    export_adapter,
    load_adapter_state,
    load_residual,
)
from splitfed.models.factors import factor_of
from splitfed.training.data import Example
from splitfed.training.interleave import interleave
from splitfed.training.link import Traffic, link_codecs
from splitfed.training.objective import Objective
from splitfed.training.optimiser import without
from splitfed.training.releases import OpenReleases, Releases
from splitfed.training.setup import lora_settings
from splitfed.training.simulated_client import SimulatedClient, make_client, twin
from splitfed.training.together import FreeCalls, JointCalls, OwnCalls, TrunkCalls, at_once
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.training.work import Work, done

_SHARED = "shared"


@dataclass
class Simulation:
    """What came of a run.

    Attributes:
        lora: Size and place of the adapter.
        adapter: The whole model's adapter, by whole-model name.
        losses: Mean loss per token of every local step, by client, over all rounds it took part in.
        traffic: What crossed each client's link, without the adapters.
        personal: What clients kept to themselves of their adapters, by client.
        notes: Figures of each round's aggregation.
        oldest_step: Largest number of others' steps between the forward of a step and itself ("async").
    """

    lora: LoraSection
    adapter: dict[str, Tensor]
    losses: dict[str, list[float]] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    personal: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[dict[str, float]] = field(default_factory=list)
    oldest_step: int = 0

    def export(self, folder: str | Path, *, base: str | Path) -> None:
        """Write the adapter as one that ``PeftModel.from_pretrained(base, folder)`` loads.

        Args:
            folder: Where to write it; it may exist.
            base: Folder of the base model.
        """
        export_adapter(
            Path(folder), self.adapter, lora_settings(self.lora), base_folder=Path(base), base_name=str(base)
        )


def simulate(
    parts: Partition | Mapping[str, Partition],
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None = None,
    lora: LoraSection | None = None,
    codecs: CodecSection | None = None,
    federation: FederationSection | None = None,
    aggregation: AggregationSection | None = None,
    trunk: Trunk | None = None,
    ranks: Mapping[str, int] | None = None,
    personal: Collection[str] = (),
    seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    releases: Callable[[str], Releases] | None = None,
    on_round: Callable[[int, Mapping[str, Tensor]], None] | None = None,
) -> Simulation:
    """Fine-tune a partitioned model over clients in this process.

    Segments that are given get an adapter, in place, and end with the run's result.

    Args:
        parts: The segments, without an adapter yet; or those of each client, cut from one model.
        tokenizer: The model's tokenizer.
        shards: Each client's texts, or its examples.
        training: Rounds, steps, batch size, optimiser; the defaults of a run file where left out.
        lora: Size and place of the adapter; as above.
        codecs: Codec of each direction; as above.
        federation: Variant and cohort; as above, save that every client takes part.
        aggregation: What becomes of a round's updates; as above.
        trunk: The server's, without an adapter yet, where no client's trunk has the blocks of all others.
        ranks: Rank of a client's own adapter, where it is less than the run's.
        personal: "bottom", "top", both or neither: whose adapter every client keeps to itself.
        seconds: Virtual seconds that an answer takes each client ("async"); left out = all are as fast.
        seed: Seed of adapters, data order, cohorts and dropout.
        releases: Gives each client's gate; none: everything leaves as it is.
        on_round: Told the round and the run's adapter after each.

    Returns:
        The adapter and the losses.

    Raises:
        ValueError: If a client has nothing to train on, or settings do not go together.
    """
    return _Run(
        parts,
        tokenizer,
        shards,
        training=training or TrainingSection(),
        lora=lora or LoraSection(),
        codecs=codecs or CodecSection(),
        federation=federation or FederationSection(agents=len(shards)),
        aggregation=aggregation or AggregationSection(),
        trunk=trunk,
        ranks=ranks or {},
        personal=personal,
        seconds=seconds,
        seed=seed,
        releases=releases or (lambda client: OpenReleases()),
    ).run(on_round or (lambda round, adapter: None))


class _Run:
    def __init__(
        self,
        parts: Partition | Mapping[str, Partition],
        tokenizer: PreTrainedTokenizerBase,
        shards: Mapping[str, Sequence[str] | Sequence[Example]],
        *,
        training: TrainingSection,
        lora: LoraSection,
        codecs: CodecSection,
        federation: FederationSection,
        aggregation: AggregationSection,
        trunk: Trunk | None,
        ranks: Mapping[str, int],
        personal: Collection[str],
        seconds: Mapping[str, float] | None,
        seed: int,
        releases: Callable[[str], Releases],
    ) -> None:
        self._training, self._federation, self._seed, self._seconds = training, federation, seed, seconds
        self._variant: Variant = variant_of(federation.variant)
        of_client = {client: parts if isinstance(parts, Partition) else parts[client] for client in shards}
        own = {client: (twin(each.bottom), twin(each.top)) for client, each in of_client.items()}
        self._parts = {id(each): each for each in of_client.values()}.values()
        self._segments = [segment for each in self._parts for segment in each] + ([] if trunk is None else [trunk])
        residual_rank = (aggregation.flora_rank or lora.rank) if aggregation.lora == "flora" else 0
        settings = lora_settings(lora)
        for segment in self._segments:  # a gate may look at what is trained
            add_adapter(segment, settings, seed=seed, residual_rank=residual_rank)
        gates = {client: releases(client) for client in shards}
        self._rule = aggregation.decided(
            has_unlike_ranks=any(rank != lora.rank for rank in ranks.values()),
            is_noised=any(gate.noises_adapter for gate in gates.values()),
        )
        self._aggregator: Aggregator = make_aggregator(self._rule, lora.rank)
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._clients = {
            client: make_client(
                client,
                *own[client],
                of_client[client].trunk,
                _examples(client, shard, tokenizer, training.max_tokens),
                gates[client],
                training=training,
                lora=settings.at_rank(ranks.get(client, lora.rank)),
                residual_rank=residual_rank,
                personal=personal,
                exchanges=federation.merge_ends == "step",
                seed=seed,
                pad_token_id=pad_token_id,
            )
            for client, shard in shards.items()
        }
        self._trunk = TrunkTrainer(_widest([each.trunk for each in self._parts], trunk), training, seed=seed)
        self._codecs = link_codecs(codecs)
        self._optimisers: dict[str, dict[str, Tensor]] = {}
        adapter = {name: tensor for segment in self._segments for name, tensor in adapter_state(segment).items()}
        self._result = Simulation(lora, adapter, {client: [] for client in shards})

    def run(self, on_round: Callable[[int, Mapping[str, Tensor]], None]) -> Simulation:
        """Run all rounds."""
        result = self._result
        for round in range(1, self._training.rounds + 1):
            self._round(round)
            on_round(round, self._exported())
        result.adapter = self._exported()
        result.traffic = {name: client.traffic for name, client in self._clients.items()}
        result.personal = {
            name: {key: client.trainer.adapter_state()[key] for key in client.personal}
            for name, client in self._clients.items()
        }
        if not self._aggregator.residual():
            for segment in self._segments:
                load_adapter_state(segment, result.adapter)
        return result

    def _round(self, round: int) -> None:
        """Train a round and merge what came of it."""
        adapter, factors = self._result.adapter, trained_factors(self._rule.lora or "factors", round)
        order = ranked(self._clients, seed=self._seed, round=round)[: self._federation.cohort]
        cohort = {client: self._clients[client] for client in order}
        residual = self._aggregator.residual()
        for segment in self._segments if residual else []:
            load_residual(segment, residual)
        starts = {name: client.begin_round(adapter, residual, factors) for name, client in cohort.items()}
        trunks = self._train(cohort, round, frozenset(name for name in adapter if factor_of(name) in factors))
        merged_names = set(adapter) if self._variant.averages_trunk else self._end_names
        of_trunks = _merged(trunks.values())
        if merged_names:
            self._aggregator.begin(adapter, round)
            for name, client in sorted(cohort.items()):
                state = {key: tensor for key, tensor in trunks[name].items() if key in merged_names}
                state |= client.update(starts[name], factors, round=round)
                self._aggregator.add(name, Update(state, len(client.examples)))
            aggregate = self._aggregator.result()
            self._result.notes.append(aggregate.notes)
            adapter = aggregate.adapter
            if self._rule.renews_factors:
                self._forget_moments(merged_names)
        self._result.adapter = adapter | {key: of_trunks[key] for key in of_trunks.keys() - merged_names}

    def _forget_moments(self, names: Collection[str]) -> None:
        """Let optimisers start afresh on tensors that are no longer what they were."""
        self._optimisers = {owner: without(state, names) for owner, state in self._optimisers.items()}
        for client in self._clients.values():
            optimiser = client.trainer.optimiser
            optimiser.load(without(optimiser.state(), set(names) - client.personal))

    def _train(
        self, cohort: Mapping[str, SimulatedClient], round: int, trained: frozenset[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Train the cohort; gives, for each client, what the trunk has trained on its behalf."""
        if self._variant.shares_adapter:
            return self._train_one_adapter(cohort, round, trained)
        takes_turns, adapter = self._variant.takes_turns, self._result.adapter
        trunks: dict[str, dict[str, Tensor]] = {}
        for name, client in cohort.items():
            owner = _SHARED if takes_turns else name
            start = {**adapter, **_merged(trunks.values())} if takes_turns else adapter
            optimiser = self._optimisers.get(owner, {})
            self._trunk.open_round(name, round, start, optimiser, blocks=client.trunk.blocks, trained=trained)
            self._result.losses[name] += done(self._work(client, OwnCalls(at_once(self._trunk)), round))
            trunks[name], state = self._trunk.result(name)
            self._optimisers[owner] = {**optimiser, **state}
            self._trunk.close(name)
        return trunks

    def _train_one_adapter(
        self, cohort: Mapping[str, SimulatedClient], round: int, trained: frozenset[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Train an adapter that the cohort shares, in joint steps or as they come."""
        submit, is_joint = at_once(self._trunk), self._variant.steps_jointly
        self._trunk.open_shared(_SHARED, self._result.adapter, self._optimisers.get(_SHARED, {}), trained=trained)
        for name, client in cohort.items():
            self._trunk.open_round(name, round, blocks=client.trunk.blocks, shared=_SHARED, joint=is_joint)
        free = None if is_joint else FreeCalls(submit, self._staleness(len(cohort)))
        calls: TrunkCalls = JointCalls(cohort, submit) if free is None else free
        works = {name: self._work(client, calls, round) for name, client in cohort.items()}
        for name, losses in interleave(works, None if is_joint else self._seconds).items():
            self._result.losses[name] += losses
            self._trunk.close(name)
        if free is not None:
            self._result.oldest_step = max(self._result.oldest_step, *free.ages)
        adapter, self._optimisers[_SHARED] = self._trunk.shared_result(_SHARED)
        return {name: _of_blocks(adapter, client.trunk) for name, client in cohort.items()}

    def _staleness(self, clients: int) -> Staleness:
        most = self._federation.max_staleness
        return Staleness(4 * clients if most is None else most, clients, self._federation.staleness_exponent)

    def _work(self, client: SimulatedClient, calls: TrunkCalls, round: int) -> Work[list[float]]:
        return client.round_work(calls, self._codecs, self._training, seed=self._seed, round=round)

    @property
    def _end_names(self) -> set[str]:
        """Names that some client trains itself and does not keep."""
        return {name for client in self._clients.values() for name in client.shared_names}

    def _exported(self) -> dict[str, Tensor]:
        residual = self._aggregator.residual()
        return merged(self._result.adapter, residual) if residual else dict(self._result.adapter)


def examples_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[Example]:
    """Cut texts into examples of at most ``max_tokens`` tokens; a text's place in the list is its record.

    Args:
        texts: Plain texts.
        tokenizer: The base model's tokenizer.
        max_tokens: The run's T.
    """
    rows = Objective("text", ("text",), "texts").sequences(
        [(text,) for text in texts], tokenizer, max_tokens=max_tokens
    )
    return [
        Example(sequence.input_ids, sequence.labels, record=str(number))
        for number, sequences in enumerate(rows)
        for sequence in sequences
    ]


def _examples(
    client: str, shard: Sequence[str] | Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Sequence[Example]:
    examples = [example for example in shard if isinstance(example, Example)]
    if texts := [text for text in shard if isinstance(text, str)]:
        examples += examples_of(texts, tokenizer, max_tokens=max_tokens)
    if not examples:
        raise ValueError(f"The client {client!r} has nothing to train on; give it a text of 2 tokens or more.")
    return examples


def _widest(trunks: Sequence[Trunk], servers: Trunk | None) -> Trunk:
    """Give the trunk that every client's is a slice of."""
    widest = servers or max(trunks, key=lambda trunk: len(trunk.blocks))
    if any(not set(trunk.blocks) <= set(widest.blocks) for trunk in trunks):
        raise ValueError("No client's trunk has the blocks of all others; give the trunk of a partition that has.")
    return widest


def _of_blocks(state: Mapping[str, Tensor], trunk: Trunk) -> dict[str, Tensor]:
    """Take what belongs to a trunk's adapter: its tensors, or the optimiser's moments of them."""
    names = adapter_parameters(trunk).keys()
    return {key: tensor for key, tensor in state.items() if key.rpartition("/")[0] in names or key in names}


def _merged(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for state in states for name, tensor in state.items()}
