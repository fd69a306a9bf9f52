"""A client of a simulation: its segments, its texts, and its rounds as work that can be interleaved."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from torch import Tensor

from splitfed.config import TrainingSection
from splitfed.federation import at_rank
from splitfed.models import (
    Bottom,
    Segment,
    Top,
    Trunk,
    adapter_state,
    add_adapter,
    load_residual,
    set_trained_factors,
)
from splitfed.models.factors import factor_of
from splitfed.models.lora import LoraSettings
from splitfed.training.client_step import ClientTrainer
from splitfed.training.data import Example
from splitfed.training.link import InProcessLink, LinkCodecs, Traffic
from splitfed.training.order import step_examples
from splitfed.training.releases import Releases
from splitfed.training.sampling import poisson_sample
from splitfed.training.together import TrunkCalls
from splitfed.training.work import Work

S = TypeVar("S", bound=Segment)


def twin(segment: S) -> S:
    """Give a segment of its own modules around the same base parameters.

    Args:
        segment: A segment without an adapter.
    """
    shared = {id(tensor): tensor for tensor in chain(segment.parameters(), segment.buffers())}
    return copy.deepcopy(segment, shared)


@dataclass
class SimulatedClient:
    """One client.

    Attributes:
        name: Its name.
        examples: What it trains on.
        trainer: Its half of the local step.
        trunk: The blocks between its own.
        personal: Names of its adapter that it keeps to itself.
        rank: Rank of its own adapter.
        traffic: What crossed its link.
    """

    name: str
    examples: Sequence[Example]
    trainer: ClientTrainer
    trunk: Trunk
    personal: frozenset[str]
    rank: int
    traffic: Traffic = field(default_factory=Traffic)
    _started: bool = False

    @property
    def shared_names(self) -> frozenset[str]:
        """Names of its own adapter that are merged with those of others."""
        return frozenset(self.trainer.adapter_state()) - self.personal

    @property
    def weight(self) -> int:
        """What its updates count for: its examples, or 1 with noise on, as their number says something about them."""
        return 1 if self.trainer.releases.is_noisy else len(self.examples)

    def begin_round(
        self, adapter: Mapping[str, Tensor], residual: Mapping[str, Tensor], factors: Collection[str]
    ) -> dict[str, Tensor]:
        """Put bottom and top at a round's start; gives the adapter that it starts from.

        Args:
            adapter: The run's.
            residual: The frozen one under it; empty for none.
            factors: Which of "A" and "B" are trained.
        """
        own = self.trainer.adapter_state()
        start = at_rank({name: adapter[name] for name in own}, self.rank) if own else {}
        if self._started:
            start |= {name: own[name] for name in self.personal}
        self._started = True
        for segment in (self.trainer.bottom, self.trainer.top):
            set_trained_factors(segment, factors)
            if residual:
                load_residual(segment, residual)
        self.trainer.begin_round(start)
        return start

    def go_back(self, start: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Undo a round whose update is not counted.

        Args:
            start: What `begin_round` gave.
            moments: What its optimiser knew then.
        """
        self.trainer.load_adapter_state(start)
        self.trainer.optimiser.load(moments)

    def round_work(
        self, calls: TrunkCalls, codecs: LinkCodecs, training: TrainingSection, *, seed: int, round: int
    ) -> Work[list[float]]:
        """Train a round; gives the mean loss per token of each local step."""
        link = InProcessLink(calls, self.name, codecs, self.traffic)
        losses = []
        for step in range(training.local_steps):
            result = yield from self.trainer.step_work(
                link, self._draw(training, seed=seed, round=round, step=step), round=round, step=step
            )
            losses.append(result.loss)
        return losses

    def update(self, start: Mapping[str, Tensor], factors: Collection[str], *, round: int) -> dict[str, Tensor]:
        """Give what leaves of bottom and top at a round's end: the gate sees what was trained, and only that.

        Args:
            start: What `begin_round` gave.
            factors: Which of "A" and "B" were trained.
            round: The round, from 1.
        """
        after = self.trainer.adapter_state()
        trained = [name for name in sorted(self.shared_names) if factor_of(name) in factors]
        return self.trainer.releases.adapter_update(
            {name: start[name] for name in trained}, {name: after[name] for name in trained}, round=round
        )

    def _draw(self, training: TrainingSection, *, seed: int, round: int, step: int) -> list[Example | None]:
        sampling = self.trainer.releases.sampling
        chosen: Sequence[int | None]
        if sampling is not None:
            chosen = poisson_sample(len(self.examples), sample_rate=sampling.sample_rate, capacity=training.batch_size)
        else:
            chosen = step_examples(
                len(self.examples),
                seed=seed,
                client=self.name,
                round=round,
                step=step,
                batch_size=training.batch_size,
                local_steps=training.local_steps,
            )
        return [None if index is None else self.examples[index] for index in chosen]


def make_client(
    name: str,
    bottom: Bottom,
    top: Top,
    trunk: Trunk,
    examples: Sequence[Example],
    releases: Releases,
    *,
    training: TrainingSection,
    lora: LoraSettings,
    residual_rank: int,
    personal: Collection[str],
    exchanges: bool,
    seed: int,
    pad_token_id: int,
) -> SimulatedClient:
    """Put a client's adapter on its bottom and top, and train them.

    Args:
        name: Its name.
        bottom: Its own bottom, without an adapter yet.
        top: Its own top, the same.
        trunk: The blocks between.
        examples: What it trains on.
        releases: The gate.
        training: Batch sizes, length and optimiser settings.
        lora: Size and place of its adapter.
        residual_rank: Rank of the frozen adapter under it; 0 for none.
        personal: "bottom", "top", both or neither: what it keeps to itself.
        exchanges: Gradients of bottom and top are merged at every step.
        seed: The run's seed.
        pad_token_id: Token that fills rows up.
    """
    for segment in (bottom, top):
        add_adapter(segment, lora, seed=seed, residual_rank=residual_rank)
    trainer = ClientTrainer(
        bottom, top, training, releases, client=name, seed=seed, pad_token_id=pad_token_id, exchanges=exchanges
    )
    kept = [segment for segment in (bottom, top) if segment.kind in personal]
    names = frozenset(chain.from_iterable(adapter_state(segment) for segment in kept))
    return SimulatedClient(name, examples, trainer, trunk, names, lora.rank)
