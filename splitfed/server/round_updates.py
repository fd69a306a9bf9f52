"""The updates of a round: what an agent starts from, what it then sends, and what all of that comes to."""

import logging
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from splitfed.config import RunConfig
from splitfed.errors import ProtocolError
from splitfed.federation import Turn, Update, UpdateRefused, at_rank, make_aggregator, trained_factors
from splitfed.federation.variants import variant_of
from splitfed.models.factors import factor_of
from splitfed.server.devices import Devices
from splitfed.server.store import RunState
from splitfed.training.optimiser import without
from splitfed.transport.adapters import RESIDUAL

_log = logging.getLogger(__name__)


class RoundUpdates:
    """What becomes of the updates of one round after the other, by the run's rule. Knows no clock and no wire.

    Where clients share one trunk adapter, what it has trained on their behalf is known at the round's end only: until
    then their updates are held.

    Args:
        run: The run's configuration.
        devices: What each agent holds.
        weight: Gives a member's weight in every mean.
        aggregator: What the rule keeps from round to round.

    Attributes:
        refused: Whose update the last result is without although it was held, and why.
        left_out: Whose update the rule has left out of the last result, in the order of names.

    Guarantees:
        * An update that is refused changes nothing.
        * A late update counts by its change from what it started from.
    """

    def __init__(
        self, run: RunConfig, devices: Devices, weight: Callable[[str], int], aggregator: Mapping[str, Tensor]
    ) -> None:
        self._devices = devices
        self._weight = weight
        self._rank = run.lora.rank
        self._rule = run.rule
        self._variant = variant_of(run.federation.variant)
        self._aggregator = make_aggregator(self._rule, self._rank)
        self._aggregator.load(aggregator)
        self._base: dict[str, Tensor] = {}
        self._bases: dict[int, dict[str, Tensor]] = {}
        self.refused: dict[str, str] = {}
        self.left_out: list[str] = []

    def begin(self, state: RunState, round: int, *, late: Collection[int] = ()) -> None:
        """Open a round; what came since the last result is forgotten.

        Args:
            state: What it starts from.
            round: The round, from 1.
            late: Earlier rounds of which an update is still waited for.
        """
        self._base, self._round = {**state.trunk, **state.ends}, round
        self._bases = {**{number: self._bases[number] for number in late}, round: self._base}
        self._counted_before, self._counted = dict(state.counted), dict(state.counted)
        self._added: set[str] = set()
        self.refused, self.left_out = {}, []
        self._held: dict[str, Mapping[str, Tensor]] = {}
        self._contested = self._devices.contested
        self._turns: dict[str, tuple[Mapping[str, Tensor], Turn]] = {}
        self._aggregator.begin(self._base, round)

    @property
    def trained(self) -> frozenset[str]:
        """Names that are trained in this round."""
        factors = self._trained_factors(self._round)
        return frozenset(name for name in self._base if factor_of(name) in factors)

    @property
    def counted(self) -> dict[str, int]:
        """The round of each client's last update that is in the run."""
        return dict(self._counted)

    @property
    def residual(self) -> dict[str, Tensor]:
        """The frozen adapter under the trained one, after the last result; empty where the rule has none."""
        return self._aggregator.residual()

    @property
    def aggregator_state(self) -> dict[str, Tensor]:
        """What the rule keeps from round to round, after the last result."""
        return self._aggregator.state()

    def start_of(self, client: str) -> dict[str, Tensor]:
        """Give what an agent starts the round from: its adapters, and what the rule keeps frozen under them."""
        own, residual = self._at_own_rank(client, self._base), self.residual
        return {**own, **{f"{RESIDUAL}{name}": residual[name] for name in own if residual}}

    def still_true(self, optimiser: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Leave out the moments of tensors that the last result replaces."""
        if not self._rule.renews_factors:
            return optimiser
        return {} if self._variant.averages_trunk else without(optimiser, self._contested)

    def shapes(self, client: str, round: int) -> dict[str, tuple[int, ...]]:
        """Say what an agent's update of a round holds: the shape of each tensor that was trained in it."""
        factors = self._trained_factors(round)
        return {name: shape for name, shape in self._devices[client].shared.items() if factor_of(name) in factors}

    def take(
        self,
        client: str,
        round: int,
        trunk: Mapping[str, Tensor],
        ends: Mapping[str, Tensor],
        *,
        before: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """Count a client's update, or hold it until it is known what the shared trunk has trained on its behalf.

        Args:
            client: Whose it is.
            round: The round that it was made in: this one, or an earlier one that it is late for.
            trunk: The trunk adapter that was trained on its behalf; empty where clients share one.
            ends: What it sent, by whole-model name.
            before: The trunk adapter that this was trained from; left out = what the round began with.

        Returns:
            The trunk adapter that the next one in turn goes on from: ``trunk``, or less of its change if that, with the
            change of the ends, was longer than the run allows.

        Raises:
            UpdateRefused: If its numbers are such that it is not counted; what is held is tried as well, as its client
                would not hear later.
            ProtocolError: If it is no update of this round.
        """
        merged = trunk.keys() if self._variant.averages_trunk else trunk.keys() & self._contested
        of_trunk = {name: trunk[name] for name in merged}
        own_base = None
        if round < self._round:
            base = self._bases[round]
            own_base = {**base, **self._at_own_rank(client, base)}
        try:
            if self._variant.shares_adapter:
                self._try(client, ends)
                self._held[client] = ends
            else:
                start = before or self._base
                turn = Turn({name: start[name] for name in trunk}, trunk) if self._variant.takes_turns else None
                counted = self._add(client, {**of_trunk, **ends}, own_base, turn)
                trunk = trunk if counted is None else counted.after
                if turn is not None and self._devices.allows_own_cuts:
                    self._turns[client] = ends, turn
        except UpdateRefused:
            raise
        except ValueError as error:
            raise ProtocolError(f"The update of {client!r} cannot be averaged: {error}") from error
        self._counted[client] = round
        return trunk

    def result(self, shared: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Give what the round's updates come to: the adapter of all keys, and the rule's figures.

        Args:
            shared: The trunk adapter that the round leaves, where it is no mean of copies.
        """
        self._go_by_who_holds_what()
        contested = self._contested
        held, self._held = self._held, {}
        for client, ends in sorted(held.items()):
            own = self._devices[client].own
            of_trunk = {name: shared[name] for name in contested & shared.keys() if name not in own}
            try:
                self._add(client, {**of_trunk, **ends})
            except ValueError as error:
                self._leave_out(client, str(error))
        kept = {name: tensor for name, tensor in shared.items() if name not in contested}
        if len(self._added) < self._rule.least_updates:  # others were refused, or keep all that they train
            for client in sorted(self._added - self.refused.keys()):
                self._leave_out(
                    client,
                    f"Only {len(self._added)} updates can be merged, and {self._rule.needs} needs "
                    f"{self._rule.least_updates}.",
                )
            return {**self._base, **kept}, _told({"clipped": self._aggregator.clipped})
        aggregate = self._aggregator.result()
        self.left_out = sorted(self._added - set(aggregate.clients))
        return {**aggregate.adapter, **kept}, _told(aggregate.notes)

    def _add(
        self,
        client: str,
        state: Mapping[str, Tensor],
        base: Mapping[str, Tensor] | None = None,
        turn: Turn | None = None,
    ) -> Turn | None:
        """Count what a client trained, if it trained anything; gives its turn as it is counted."""
        if not state and (turn is None or not turn.after):
            return turn
        counted = self._aggregator.add(client, Update(state, self._weight(client), base, turn))
        if state:
            self._added.add(client)
        return counted.turn

    def _go_by_who_holds_what(self) -> None:
        """Count turns anew if an agent that has joined since holds what was the trunk's alone, or does so no more."""
        contested = self._devices.contested
        if contested == self._contested:
            return
        self._contested, self._added = contested, self._added - self._turns.keys()
        if self._turns:
            self._aggregator.begin(self._base, self._round)
        for client, (ends, turn) in self._turns.items():
            of_trunk = {name: turn.after[name] for name in turn.after.keys() & self._contested}
            self._add(client, {**of_trunk, **ends}, None, turn)

    def _leave_out(self, client: str, why: str) -> None:
        """Go on without an update: its client's optimiser goes on from where it would without this round."""
        _log.warning("the round is without the update of %s: %s", client, why)
        self.refused[client] = why
        before = self._counted_before.get(client)
        if before is None:
            del self._counted[client]
        else:
            self._counted[client] = before

    def _at_own_rank(self, client: str, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give a client's bottom and top of an adapter, as it trains them."""
        device = self._devices[client]
        own = {name: adapter[name] for name in device.own}
        return own if device.rank == self._rank else at_rank(own, device.rank)

    def _try(self, client: str, ends: Mapping[str, Tensor]) -> None:
        """Check an update by the run's rule, and count nothing."""
        if ends:
            trial = make_aggregator(self._rule, self._rank)
            trial.begin(self._base, self._round)
            trial.add(client, Update(ends, self._weight(client)))

    def _trained_factors(self, round: int) -> frozenset[str]:
        return trained_factors(self._rule.lora or "factors", round)


def _told(notes: Mapping[str, float]) -> dict[str, float]:
    """Leave out figures that have nothing to say."""
    return {name: figure for name, figure in notes.items() if figure}
