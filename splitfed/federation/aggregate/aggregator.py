"""What every rule has in common: which updates it takes, and how much of each."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from splitfed.federation.aggregate.fixed_point import check_update
from splitfed.federation.aggregate.refusal import UpdateRefused


@dataclass(frozen=True)
class Turn:
    """One client's turn at an adapter that goes from client to client within a round, and of which no mean is taken.

    Attributes:
        before: What the turn began with, by whole-model key.
        after: What it left, in the same shapes.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one client's round comes to.

    Attributes:
        state: The client's adapter after its round, by whole-model key: all that it, or the trunk on its behalf,
            trained. Floating point, on any device, in the shapes of the round's base; under a rule that averages
            products, A is [r, I] and B is [O, r] with any r up to the base's rank.
        weight: What the update counts for where the rule has weights: its number of examples, or a configured count.
        base: What it started from, in the same shapes, if that is not the round's base: the update is late.
        turn: What else it changed: it is bounded with the rest, and averaged only where ``state`` holds it too.
    """

    state: Mapping[str, Tensor]
    weight: int
    base: Mapping[str, Tensor] | None = None
    turn: Turn | None = None


@dataclass(frozen=True)
class Aggregate:
    """What a round comes to.

    Attributes:
        adapter: What the next round starts from, float32, on the CPU: every key of the base. A key that nobody trained
            keeps its value. Tensors may be the base's own.
        clients: Whose updates are in it, sorted.
        notes: Figures for the metrics: ``clipped``, the updates that norm_bound shortened, and what the rule adds.
    """

    adapter: dict[str, Tensor]
    clients: list[str]
    notes: dict[str, float] = field(default_factory=dict)


class Aggregator(ABC):
    """One run's rule: made once a run, begun once a round.

    A late update counts as if the client had started from the round's base: its own change is put on it.

    Args:
        norm_bound: Largest L2 norm of a client's change, all tensors together; longer changes are scaled down to it,
            up to rounding to float32. None = any length.
        refuse_norm: L2 norm of a change above which the update is refused; None = none is.

    Guarantees:
        * The result is the same to the bit for every order of the updates, on the same machine and thread count.
        * An update that is refused changes nothing: the result is as if it had never come.
        * A client counts once in a round: its second update is refused.
        * What ``state`` gives and ``load`` takes continues a run to the same bits.

    Source: norm_bound is the norm thresholding of Sun, Kairouz, Suresh & McMahan 2019, Can you really backdoor
    federated learning?
    """

    def __init__(self, *, norm_bound: float | None = None, refuse_norm: float | None = None) -> None:
        self._norm_bound = norm_bound
        self._refuse_norm = refuse_norm
        self._base: dict[str, Tensor] = {}
        self._round = 0
        self._clients: set[str] = set()
        self._clipped = 0
        self._aggregate: Aggregate | None = None

    def begin(self, base: Mapping[str, Tensor], round: int) -> None:
        """Open a round; what was added since the last result is forgotten.

        Args:
            base: The adapter that the round starts from, by whole-model key; kept, not copied.
            round: Its number, from 1.

        Raises:
            ValueError: If the rule cannot work on such an adapter.
        """
        self._base, self._round = _float32(base), round
        self._clients, self._clipped, self._aggregate = set(), 0, None
        self._open()

    @property
    def clipped(self) -> int:
        """Updates of this round that norm_bound shortened."""
        return self._clipped

    def add(self, client: str, update: Update) -> Update:
        """Take a client's update.

        Args:
            client: Whose it is.
            update: What it comes to; its tensors may be changed afterwards.

        Returns:
            The update with the change that it is counted with: scaled down, if it was longer than ``norm_bound``.

        Raises:
            UpdateRefused: If a value is NaN, infinite or out of the range of ``FixedPointMean``, or the change is
                longer than ``refuse_norm``.
            ValueError: If the client was counted already, the round has its result, the weight is not a positive
                integer, a key or a shape is not the base's, or the rule does not allow what changed.
        """
        if self._aggregate is not None or not self._base:
            raise ValueError(f"No round is open for the update of {client!r}; begin one first.")
        if client in self._clients:
            raise ValueError(f"The update of {client!r} is counted in round {self._round} already.")
        check_update({**update.state, **(update.turn.after if update.turn else {})}, update.weight)
        self._check_shapes(update)
        given = replace(update, state=_float32(update.state), base=update.base and _float32(update.base))
        taken = self._bounded(given)
        if taken.state:
            self._take(client, self._on_the_base(taken) if taken.base is not None else taken)
        self._clients.add(client)
        self._clipped += taken is not given
        return taken

    def result(self) -> Aggregate:
        """Close the round and give what it comes to; asked again, it gives the same.

        Raises:
            ValueError: If no update was taken, or fewer than the rule needs.
        """
        if self._aggregate is None:
            if not self._clients:
                raise ValueError(f"Round {self._round} has no update to aggregate; add one first.")
            aggregate = self._close()
            notes = {"clipped": float(self._clipped), **aggregate.notes}
            self._aggregate = replace(aggregate, notes=notes)
        return self._aggregate

    def state(self) -> dict[str, Tensor]:
        """Give what has to survive a restart, as it is after the last result."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            ValueError: If it is not of this rule.
        """
        if state:
            raise ValueError(f"This rule keeps no state, and {min(state)!r} is of another; load it with that rule.")

    def residual(self) -> dict[str, Tensor]:
        """Give the frozen adapter beside the trained one, after the last result; empty where the rule has none."""
        return {}

    @abstractmethod
    def _open(self) -> None:
        """Begin anew with ``self._base`` and ``self._round``."""

    @abstractmethod
    def _take(self, client: str, update: Update) -> None:
        """Count an update that passed every check, or refuse it and change nothing."""

    @abstractmethod
    def _close(self) -> Aggregate:
        """Give the result; one client or more was counted."""

    def _start(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give what a client that is not late started from: the base in the shapes of its adapter."""
        return self._base

    def _on_the_base(self, late: Update) -> Update:
        """Put a late change on the round's base; not for a rule that does it in another way."""
        assert late.base is not None
        moved = {
            key: (self._base[key].double() + (tensor.double() - late.base[key].double())).float()
            for key, tensor in late.state.items()
        }
        check_update(moved, late.weight)
        return replace(late, state=moved)

    def _has_right_shape(self, key: str, tensor: Tensor) -> bool:
        return tensor.shape == self._base[key].shape

    def _check_shapes(self, update: Update) -> None:
        for key, tensor in update.state.items():
            if key not in self._base:
                raise ValueError(f"{key!r} is no tensor of this run's adapter; send those that the round began with.")
            if not self._has_right_shape(key, tensor):
                raise ValueError(
                    f"{key!r} has shape {tuple(tensor.shape)} and not {tuple(self._base[key].shape)}; train an adapter "
                    "of the run's rank and targets."
                )
            if update.base is not None and (key not in update.base or update.base[key].shape != tensor.shape):
                raise ValueError(f"{key!r} is not in what the late update started from, or in another shape.")
        if update.base is not None:
            check_update(update.base, update.weight)

    def _bounded(self, update: Update) -> Update:
        """Refuse a change that is too long, or shorten it; the update itself if there is nothing to do."""
        if self._norm_bound is None and self._refuse_norm is None:
            return update
        start = {**(update.base if update.base is not None else self._start(update.state))}
        ends = {**update.state}
        if update.turn is not None:
            start |= update.turn.before
            ends |= update.turn.after
        changes = {key: ends[key].double() - start[key].double() for key in sorted(ends)}
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        if self._refuse_norm is not None and norm > self._refuse_norm:
            raise UpdateRefused(f"The change has an L2 norm of {norm:g}, above refuse_norm = {self._refuse_norm:g}.")
        if self._norm_bound is None or norm <= self._norm_bound:
            return update
        scale = self._norm_bound / norm
        bounded = {key: (start[key].double() + scale * change).float() for key, change in changes.items()}
        state = {key: bounded[key] for key in update.state}
        turn = update.turn and replace(update.turn, after={key: bounded[key] for key in update.turn.after})
        return replace(update, state=state, turn=turn)


def _float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", torch.float32) for key, tensor in state.items()}
