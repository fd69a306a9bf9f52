"""The trunk's part in one round: whose adapter a client trains, what runs its calls, and what is left at the end."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from splitfed.config import FederationSection
from splitfed.errors import LinkError, RoundLost
from splitfed.federation.variants import ASYNC, Staleness, Variant
from splitfed.server.engine import Engine
from splitfed.training.joint_pace import JointPace
from splitfed.training.together import FreeCalls, JointCalls, OwnCalls, TrunkCalls

SHARED: Final = "(shared)"
"""Owner of an adapter and an optimiser that belong to no client; no client can have this name."""


@dataclass(frozen=True)
class Taken:
    """What the trunk has trained on a client's behalf, and nobody else has yet.

    Attributes:
        adapter: The trunk adapter that it leaves; empty where clients share one.
        optimiser: Its optimiser's state.
        before: The trunk adapter that it began with.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    optimiser: dict[str, Tensor] = field(default_factory=dict)
    before: Mapping[str, Tensor] = field(default_factory=dict)


class TrunkRound:
    """One round's trunk adapters, by the run's variant. All methods run on the event loop.

    Args:
        variant: How clients share the trunk's adapter.
        engine: Where the trunk runs.
        federation: Bounds on staleness, and how many clients a round has.
        adapter: What the round starts from, by whole-model name.
        optimisers: Optimiser state of each owner.
        round: The round, from 1.
        attempt: How often the round was begun before; slots of an earlier attempt are others.
        trained: Names that are trained in this round.
        clock: Monotonic seconds.
        pace: What joint steps took in the rounds before; None: nothing is known.

    Attributes:
        optimisers: Optimiser state of each owner, as far as updates are in.
    """

    def __init__(
        self,
        variant: Variant,
        engine: Engine,
        federation: FederationSection,
        *,
        adapter: Mapping[str, Tensor],
        optimisers: Mapping[str, Mapping[str, Tensor]],
        round: int,
        attempt: int = 0,
        trained: frozenset[str],
        clock: Callable[[], float] = time.monotonic,
        pace: JointPace | None = None,
    ) -> None:
        self.optimisers = {owner: dict(state) for owner, state in optimisers.items()}
        self._variant = variant
        self._engine = engine
        self._adapter = dict(adapter)
        self._round = round
        self._attempt = attempt
        self._trained = trained
        self._clock = clock
        self._pace = pace
        self._staleness = staleness_of(federation) if variant.name == ASYNC.name else None
        self._calls: TrunkCalls | None = None
        self._opening = asyncio.Lock()

    def slot(self, client: str, token: bytes) -> str:
        """Name the slot of a client's session: its place in joint steps, otherwise the session's alone."""
        return f"{self._round}.{self._attempt}/{client}" if self._variant.steps_jointly else token.hex()

    @property
    def joint(self) -> JointCalls | None:
        """What gathers joint steps, once the round has begun; None in other variants."""
        return self._calls if isinstance(self._calls, JointCalls) else None

    @property
    def ages(self) -> Mapping[int, int]:
        """How many steps were applied at each age, where clients step as they come; empty in other variants."""
        return self._calls.ages if isinstance(self._calls, FreeCalls) else {}

    async def open(self, client: str, slot: str, members: Iterable[str], *, blocks: range | None = None) -> TrunkCalls:
        """Fill a client's slot at the round's start.

        Args:
            client: The client.
            slot: What `slot` gave.
            members: Clients that the round's joint steps are made of, if they have not begun yet.
            blocks: Blocks that it asks for; None: all of the trunk's.

        Raises:
            RoundLost: If joint steps have begun without this client.
        """
        async with self._opening:
            if self._calls is None:
                self._calls = await self._begin(members)
        if self.joint is not None and slot not in self.joint.slots:
            raise RoundLost(f"Round {self._round} has begun without {client!r}; it takes part in the next one.")
        owner = SHARED if self._variant.takes_turns else client
        await self._engine.open_round(
            slot,
            client,
            self._round,
            self._adapter,
            self.optimisers.get(owner, {}),
            shared=SHARED if self._variant.shares_adapter else None,
            joint=self._variant.steps_jointly,
            trained=self._trained,
            blocks=blocks,
        )
        return self._calls

    def restart(self, slot: str) -> bool:
        """Take back what was asked for a slot that is to be filled anew; False if its place in joint steps is lost."""
        return self._calls is None or self._calls.restart(slot)

    def leave(self, slot: str) -> None:
        """Wait for a slot no longer."""
        if self._calls is not None:
            self._calls.leave(slot)

    def close(self, error: LinkError) -> None:
        """Let nobody wait for anybody any more: the round is over, begins again, or the server shuts down."""
        if self._calls is not None:
            self._calls.close(error)

    async def take(self, slot: str) -> Taken:
        """Copy what the trunk has trained on behalf of a slot's client; until it is kept, nothing comes of it."""
        if self._variant.shares_adapter:
            return Taken()
        adapter, optimiser = await self._engine.snapshot(slot)
        return Taken(adapter, optimiser, {name: self._adapter[name] for name in adapter})

    def keep(self, client: str, taken: Taken) -> None:
        """Go on from what was taken of a client whose update is counted, with the adapter that it is counted with."""
        if self._variant.takes_turns:
            self._adapter |= taken.adapter
            self.optimisers.setdefault(SHARED, {}).update(taken.optimiser)
        elif not self._variant.shares_adapter:
            self.optimisers[client] = taken.optimiser

    async def result(self) -> dict[str, Tensor]:
        """Give the trunk adapter that the round leaves, where it is not a mean of copies; empty where it is."""
        if self._variant.averages_trunk:
            return {}
        if self._variant.shares_adapter and self._calls is not None:
            self._adapter, self.optimisers[SHARED] = await self._engine.shared_snapshot(SHARED)
        return dict(self._adapter)

    async def _begin(self, members: Iterable[str]) -> TrunkCalls:
        if not self._variant.shares_adapter:
            return OwnCalls(self._engine.submit)
        optimiser = self.optimisers.get(SHARED, {})
        await self._engine.open_shared(SHARED, self._adapter, optimiser, trained=self._trained)
        if self._variant.steps_jointly:
            slots = [self.slot(member, b"") for member in members]
            return JointCalls(slots, self._engine.submit, clock=self._clock, pace=self._pace)
        assert self._staleness is not None
        return FreeCalls(self._engine.submit, self._staleness)


def staleness_of(federation: FederationSection) -> Staleness:
    """Give a run's bound on the age of a step, and what an old one counts for."""
    clients, most = federation.most_at_work, federation.max_staleness
    return Staleness(4 * clients if most is None else most, clients, federation.staleness_exponent)
