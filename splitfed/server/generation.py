"""Sequences that members of the run generate: with what adapter, how many at a time, and how long each may wait."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from splitfed.config import ServerConfig
from splitfed.errors import JoinRefused, RoundLost, ServerUnreachable
from splitfed.federation import at_rank, make_aggregator
from splitfed.server.devices import Device
from splitfed.server.engine import Engine
from splitfed.server.store import RunState
from splitfed.training.generation import TrunkSequence
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.transport.adapters import RESIDUAL

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WholeRound:
    """What a round that is over has left.

    Attributes:
        number: The round; 0 before the first.
        adapter: The adapter of the whole model, by whole-model name.
        residual: The frozen one beside it; empty where the rule has none.
    """

    number: int
    adapter: Mapping[str, Tensor]
    residual: Mapping[str, Tensor]

    @classmethod
    def of(cls, state: RunState, config: ServerConfig) -> "WholeRound":
        """Take it from the state that was written, never from what a round in progress works with."""
        rule = make_aggregator(config.shared().rule, config.lora.rank)
        adapter = {**state.trunk, **state.ends}
        rule.load(state.aggregator)
        rule.begin(adapter, state.round + 1)
        return cls(state.round, adapter, rule.residual())

    def ends_of(self, device: Device, rank: int) -> dict[str, Tensor]:
        """Give the adapters of a device's bottom and top, and the residual beside them."""
        own = {name: self.adapter[name] for name in device.own}
        frozen = {f"{RESIDUAL}{name}": self.residual[name] for name in own if self.residual}
        return {**(own if device.rank == rank else at_rank(own, device.rank)), **frozen}


@dataclass(eq=False)
class OpenSequence:
    """A sequence that is being generated.

    Attributes:
        client: Whose it is.
        whole: The round whose adapter it is generated with.
        blocks: The blocks of its trunk.
        max_tokens: Most rows.
        over: Set when it has to make way for the same client's next one, or the server shuts down.
    """

    client: str
    whole: WholeRound
    blocks: range
    max_tokens: int
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _trunk: TrunkSequence | None = None

    @property
    def left(self) -> int:
        """Rows that may still come."""
        return self.max_tokens - (0 if self._trunk is None else self._trunk.rows)

    def forward(self, trainer: TrunkTrainer, smashed_1TD: Tensor) -> Tensor:
        """Run the next rows, in the thread that owns the trunk; the first ones make its cache."""
        if self._trunk is None:
            trunk = trainer.trunk_over(self.blocks)
            whole = self.whole
            self._trunk = TrunkSequence(trunk, whole.adapter, whole.residual, max_tokens=self.max_tokens)
        return self._trunk.forward(smashed_1TD)


class Run(Protocol):
    """What generation asks of the run."""

    @property
    def config(self) -> ServerConfig:
        """The server's configuration."""

    @property
    def state(self) -> RunState:
        """The run at the end of its last whole round."""

    @property
    def is_draining(self) -> bool:
        """The server shuts down."""


class Generations:
    """The sequences of a run's members. All methods run on the event loop.

    Args:
        run: The run.
        engine: Where the trunk runs.

    Guarantees:
        * A sequence is computed with the adapter of one whole round from its first row to its last.
        * At most ``[generation] max_streams`` sequences are open, one a client.
        * One forward at a time waits for the engine, so that training waits for one at most.
    """

    def __init__(self, run: Run, engine: Engine) -> None:
        self.config = run.config.generation
        self.max_tokens = self.config.max_tokens or run.config.training.max_tokens
        self._run = run
        self._engine = engine
        self._fetched: dict[str, WholeRound] = {}
        self._open: dict[str, OpenSequence] = {}
        self._turn = asyncio.Lock()

    def check_enabled(self) -> None:
        """Refuse where the operator has not allowed it.

        Raises:
            JoinRefused: If this server does not generate.
        """
        if not self.config.enabled:
            raise JoinRefused(
                f"The server of the run {self._run.config.run_id!r} does not generate text; its operator can allow it "
                "with [generation] enabled = true, and start it again with --resume."
            )

    def last_round(self, client: str) -> WholeRound:
        """Give what the last whole round left, and keep it for this client until it asks again."""
        state, fetched = self._run.state, self._fetched.get(client)
        if fetched is None or fetched.number != state.round:
            same = (each for each in self._fetched.values() if each.number == state.round)
            self._fetched[client] = next(same, None) or WholeRound.of(state, self._run.config)
        return self._fetched[client]

    def open(self, client: str, round: int, *, blocks: range, max_tokens: int) -> OpenSequence:
        """Begin a sequence; one of the same client that is still open ends.

        Args:
            client: Whose it is.
            round: The round that the client has the adapters of.
            blocks: The blocks of its trunk.
            max_tokens: Most rows.

        Raises:
            JoinRefused: If it would be longer than the server allows.
            RoundLost: If that round's adapter is no longer here.
            ServerUnreachable: If all places are taken, or the server shuts down.
        """
        self.check_draining()
        if not 1 <= max_tokens <= self.max_tokens:
            raise JoinRefused(
                f"A sequence of {max_tokens} tokens was asked for, but this server generates {self.max_tokens} at most "
                "(prompt included); lower --max-tokens, or ask its operator to raise [generation] max_tokens."
            )
        whole = self._fetched.get(client)
        if whole is None or whole.number != round:  # the server was started again since
            whole = WholeRound.of(self._run.state, self._run.config)
        if whole.number != round:
            raise RoundLost(
                f"The adapter of round {round} is no longer here, the run is at round {whole.number}; generate again."
            )
        if (older := self._open.pop(client, None)) is not None:
            older.over.set()
        if len(self._open) >= self.config.max_streams:
            raise ServerUnreachable(f"{len(self._open)} agents generate already; come back later.")
        self._open[client] = sequence = OpenSequence(client, whole, blocks, max_tokens)
        _log.info("%s generates a sequence of up to %d tokens with round %d", client, max_tokens, round)
        return sequence

    def close(self, sequence: OpenSequence) -> None:
        """Give a sequence's place and cache up."""
        if self._open.get(sequence.client) is sequence:
            del self._open[sequence.client]

    def drain(self) -> None:
        """Let no sequence wait for its next row: the server shuts down."""
        for sequence in self._open.values():
            sequence.over.set()

    def check_draining(self) -> None:
        """Send away whoever can come back.

        Raises:
            ServerUnreachable: If the server shuts down.
        """
        if self._run.is_draining:
            raise ServerUnreachable("The server is shutting down; come back when it is up again.")

    async def forward(self, sequence: OpenSequence, smashed_1TD: Tensor) -> Tensor:
        """Run a sequence's next rows through the trunk.

        Args:
            sequence: The sequence.
            smashed_1TD: The rows, shape [1, T, D].

        Returns:
            The trunk output, shape [1, T, D].

        Raises:
            ProtocolError: If rows are too many; nothing was done then.
            ServerUnreachable: If the server shuts down.
        """
        async with self._turn:
            self.check_draining()
            return await asyncio.wrap_future(
                self._engine.submit(lambda trainer: sequence.forward(trainer, smashed_1TD))
            )
