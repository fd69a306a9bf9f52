"""The rounds of a simulated run: who trains, what is counted, what the next round starts from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from splitfed.config import AggregationSection, CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.federation import Aggregator, Turn, Update, UpdateRefused, make_aggregator, merged, trained_factors
from splitfed.federation.cohort import ranked
from splitfed.federation.variants import Staleness, Variant, variant_of
from splitfed.models import (
    Partition,
    Trunk,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    load_residual,
    remove_adapter,
)
from splitfed.models.factors import factor_of
from splitfed.training.data import Example
from splitfed.training.interleave import interleave
from splitfed.training.link import link_codecs
from splitfed.training.optimiser import without
from splitfed.training.releases import Releases
from splitfed.training.setup import lora_settings
from splitfed.training.simulated_client import SimulatedClient, make_client, twin
from splitfed.training.simulated_plan import check_rule
from splitfed.training.simulation import Simulation
from splitfed.training.together import FreeCalls, JointCalls, OwnCalls, TrunkCalls, at_once
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.training.work import Work, done

_SHARED = "shared"
_State = dict[str, Tensor]
_Take = Callable[[str, Turn], Turn | None]


@dataclass(frozen=True)
class _Part:
    """A client of a round, the adapter that it starts from, and what its optimiser knows then."""

    client: SimulatedClient
    start: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


class SimulatedRun:
    """One run: made, run once, and given up.

    Args:
        parts: Each client's segments; several may have the same.
        examples: What each client trains on.
        training: Rounds, steps, batch size, optimiser.
        lora: Size and place of the adapter.
        codecs: Codec of each direction.
        federation: Who takes part, and how.
        aggregation: What becomes of a round's updates.
        trunk: The server's; None: the widest of the clients'.
        ranks: Rank of a client's own adapter, where it is not the run's.
        personal: Segments whose adapter every client keeps to itself.
        seconds: Virtual seconds that an answer takes each client; None: all are as fast.
        seed: Seed of adapters, data order, cohorts and dropout.
        pad_token_id: Token that fills rows up.
        releases: Gives each client's gate.

    Raises:
        ValueError: If no trunk has the blocks of all others, or the rule is nothing for such rounds.
    """

    def __init__(
        self,
        parts: Mapping[str, Partition],
        examples: Mapping[str, Sequence[Example]],
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
        pad_token_id: int,
        releases: Callable[[str], Releases],
    ) -> None:
        self._training, self._federation, self._seed, self._seconds = training, federation, seed, seconds
        self._variant: Variant = variant_of(federation.variant)
        self._parts = {id(each): each for each in parts.values()}.values()
        self._segments = [segment for each in self._parts for segment in each] + ([] if trunk is None else [trunk])
        for segment in self._segments:
            remove_adapter(segment)
        own = {client: (twin(each.bottom), twin(each.top)) for client, each in parts.items()}
        residual_rank = (aggregation.flora_rank or lora.rank) if aggregation.lora == "flora" else 0
        settings = lora_settings(lora)
        for segment in self._segments:  # a gate may look at what is trained
            add_adapter(segment, settings, seed=seed, residual_rank=residual_rank)
        gates = {client: releases(client) for client in parts}
        self._rule = aggregation.decided(
            has_unlike_ranks=lora.has_unlike_ranks or any(rank != lora.rank for rank in ranks.values()),
            is_noised=any(gate.noises_adapter for gate in gates.values()),
        )
        check_rule(self._rule, federation)
        self._aggregator: Aggregator = make_aggregator(self._rule, lora.rank)
        self._clients = {
            client: make_client(
                client,
                *own[client],
                parts[client].trunk,
                shard,
                gates[client],
                training=training,
                lora=settings.at_rank(ranks.get(client, lora.rank)),
                residual_rank=residual_rank,
                personal=personal,
                exchanges=federation.merge_ends == "step",
                seed=seed,
                pad_token_id=pad_token_id,
            )
            for client, shard in examples.items()
        }
        self._trunk = TrunkTrainer(_widest([each.trunk for each in self._parts], trunk), training, seed=seed)
        self._codecs = link_codecs(codecs)
        self._optimisers: dict[str, dict[str, Tensor]] = {}
        adapter = {name: tensor for segment in self._segments for name, tensor in adapter_state(segment).items()}
        self._result = Simulation(lora, adapter, {client: [] for client in examples})

    def run(self, on_round: Callable[[int, Mapping[str, Tensor]], None]) -> Simulation:
        """Run all rounds."""
        result = self._result
        for round in range(1, self._training.rounds + 1):
            self._round(round)
            on_round(round, self._exported())
        residual = self._aggregator.residual()
        for segment in self._segments:
            load_adapter_state(segment, result.adapter)
            if residual:
                load_residual(segment, residual)
        result.adapter = self._exported()
        result.traffic = {name: client.traffic for name, client in self._clients.items()}
        result.personal = {
            name: {key: client.trainer.adapter_state()[key] for key in client.personal}
            for name, client in self._clients.items()
        }
        return result

    def _round(self, round: int) -> None:
        """Train a round and merge what came of it."""
        adapter, factors = self._result.adapter, trained_factors(self._rule.lora or "factors", round)
        order = ranked(self._clients, seed=self._seed, round=round)[: self._federation.cohort]
        cohort = {client: self._clients[client] for client in order}
        residual = self._aggregator.residual()
        for segment in self._segments if residual else []:
            load_residual(segment, residual)
        merged_names = set(adapter) if self._variant.averages_trunk else self._end_names
        self._aggregator.begin(adapter, round)
        parts = {
            name: _Part(client, client.begin_round(adapter, residual, factors), client.trainer.optimiser.state())
            for name, client in cohort.items()
        }
        trained = frozenset(name for name in adapter if factor_of(name) in factors)
        train = self._train_one_adapter if self._variant.shares_adapter else self._train_each
        of_trunk = train(parts, round, trained, lambda name, turn: self._take(parts[name], turn, merged_names, round))
        refused = self._result.refused.get(round, {})
        if len(cohort) - len(refused) < self._federation.quorum:
            reasons = " ".join(f"{name!r}: {reason}" for name, reason in sorted(refused.items()))
            raise ValueError(
                f"Round {round} has {len(cohort) - len(refused)} updates, fewer than federation.quorum = "
                f"{self._federation.quorum}; refused were {reasons}"
            )
        if merged_names:
            aggregate = self._aggregator.result()
            self._result.notes.append(aggregate.notes)
            adapter = aggregate.adapter
            if self._rule.renews_factors:
                self._forget_moments(merged_names)
        self._result.adapter = adapter | {key: of_trunk[key] for key in of_trunk.keys() - merged_names}

    def _take(self, part: "_Part", turn: Turn, merged_names: Collection[str], round: int) -> Turn | None:
        """Count a client's update, or note why it is refused and undo what it trained.

        Args:
            part: The client and what it started from.
            turn: The trunk adapter that it began with, and what the trunk has trained on its behalf.
            merged_names: Names that are merged at the round's end.
            round: The round, from 1.

        Returns:
            Its turn as it is counted; None if the update is refused.
        """
        client, factors = part.client, trained_factors(self._rule.lora or "factors", round)
        try:
            state = {key: tensor for key, tensor in turn.after.items() if key in merged_names}
            state |= client.update(part.start, factors, round=round)
            own = turn if self._variant.takes_turns else None
            if state or own:
                update = self._aggregator.add(client.name, Update(state, client.weight, turn=own))
                turn = update.turn or turn
        except UpdateRefused as error:
            self._result.refused.setdefault(round, {})[client.name] = str(error)
            client.go_back(part.start, part.moments)
            return None
        return turn

    def _forget_moments(self, names: Collection[str]) -> None:
        """Let optimisers start afresh on tensors that are no longer what they were."""
        self._optimisers = {owner: without(state, names) for owner, state in self._optimisers.items()}
        for client in self._clients.values():
            optimiser = client.trainer.optimiser
            optimiser.load(without(optimiser.state(), set(names) - client.personal))

    def _train_each(self, parts: Mapping[str, "_Part"], round: int, trained: frozenset[str], take: _Take) -> _State:
        """Train a trunk adapter for each client, or one that goes from client to client.

        Args:
            parts: The cohort, in its order.
            round: The round, from 1.
            trained: Names that are trained in it.
            take: Given each client's turn as soon as it is through; gives it as it is counted, if it is.

        Returns:
            The trunk adapter that the round leaves, where clients take turns.
        """
        takes_turns, left = self._variant.takes_turns, dict[str, Tensor]()
        for name, part in parts.items():
            owner = _SHARED if takes_turns else name
            optimiser = self._optimisers.get(owner, {})
            blocks, before = part.client.trunk.blocks, {**self._result.adapter, **left}
            self._trunk.open_round(name, round, before, optimiser, blocks=blocks, trained=trained)
            self._result.losses[name] += done(self._work(part.client, OwnCalls(at_once(self._trunk)), round))
            trunk, state = self._trunk.result(name)
            self._trunk.close(name)
            if (turn := take(name, Turn({key: before[key] for key in trunk}, trunk))) is not None:
                self._optimisers[owner] = {**optimiser, **state}
                left |= turn.after if takes_turns else {}
        return left

    def _train_one_adapter(
        self, parts: Mapping[str, "_Part"], round: int, trained: frozenset[str], take: _Take
    ) -> _State:
        """Train an adapter that the cohort shares, in joint steps or as they come; the arguments are those above."""
        submit, is_joint = at_once(self._trunk), self._variant.steps_jointly
        self._trunk.open_shared(_SHARED, self._result.adapter, self._optimisers.get(_SHARED, {}), trained=trained)
        for name, part in parts.items():
            self._trunk.open_round(name, round, blocks=part.client.trunk.blocks, shared=_SHARED, joint=is_joint)
        free = None if is_joint else FreeCalls(submit, self._staleness(len(parts)))
        calls: TrunkCalls = JointCalls(parts, submit) if free is None else free
        works = {name: self._work(part.client, calls, round) for name, part in parts.items()}
        for name, losses in interleave(works, None if is_joint else self._seconds).items():
            self._result.losses[name] += losses
            self._trunk.close(name)
        if free is not None:
            self._result.oldest_step = max(self._result.oldest_step, *free.ages)
        adapter, self._optimisers[_SHARED] = self._trunk.shared_result(_SHARED)
        for name, part in parts.items():
            before = _of_blocks(self._result.adapter, part.client.trunk)
            take(name, Turn(before, _of_blocks(adapter, part.client.trunk)))
        trained_by_any = [_of_blocks(adapter, part.client.trunk) for part in parts.values()]
        return {name: tensor for state in trained_by_any for name, tensor in state.items()}

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
