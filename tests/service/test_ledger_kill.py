"""The ledger never under-counts: an agent is killed at any instant, and no more has left it than it has charged."""

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from splitfed.agent.main import run_agent
from splitfed.config import AgentConfig, AgentPrivacySection, DataSection
from splitfed.privacy import read_ledger
from splitfed.privacy.ledger_rows import Row
from splitfed.proto.v1 import training_pb2
from splitfed.server import daemon
from splitfed.server.services import TrainingService
from splitfed.server.services import training as training_service
from splitfed.server.sessions import Operation
from tests.service.conftest import server_config, write_texts
from tests.service.daemons import warm_context
from tests.service.local import agent_config, serving, wait_until

KILLS = 5
ROUNDS, STEPS, BATCH, MICRO_BATCH = KILLS + 1, 2, 4, 2  # no life is long enough for the whole run
OPERATIONS = STEPS * (2 * (BATCH // MICRO_BATCH) + 1) + 1
"""What an agent sends in a round: a forward and a backward of each micro-batch, every step, one evaluation."""
LATEST_S = 0.05

Tally = Counter[tuple[str, str, int]]
"""Sequences by channel, purpose and local step."""


class Wire:
    """What has come to the server, counted as soon as it is whole, and an agent that is killed for it.

    Attributes:
        received: Sequences that came in the agent's present life.
        streams: Streams that are being read.
    """

    def __init__(self) -> None:
        self.received: Tally = Counter()
        self.streams = 0
        self.is_over = threading.Event()
        self._left = 0

    def begin_life(self, operations: int) -> None:
        """Count from nothing, and set `is_over` when so many operations have come."""
        self.received = Counter()
        self._left = operations
        self.is_over.clear()

    def take(self, request: training_pb2.TrainRequest) -> None:
        """Count an operation."""
        if request.HasField("forward"):
            kind = "train" if request.forward.kind == training_pb2.KIND_TRAIN else "evaluate"
            self.received["smashed", kind, request.forward.step] += request.forward.smashed.shape[0]
        elif request.HasField("backward"):
            gradient = request.backward.output_gradient
            self.received["output_gradient", "train", request.backward.step] += gradient.shape[0]
        self._left -= 1
        if self._left == 0:
            self.is_over.set()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """A tap on every server of this test, in front of its sessions and its engine."""
    wire = Wire()

    class Tapped(Operation):
        is_counted = False

        @property
        def is_complete(self) -> bool:
            is_complete = super().is_complete
            if is_complete and not self.is_counted:
                self.is_counted = True
                wire.take(self.request)
            return is_complete

    class Service(TrainingService):
        async def _read(self, requests: AsyncIterator[training_pb2.TrainRequest], *others: Any) -> None:
            wire.streams += 1
            try:
                await super()._read(requests, *others)
            finally:
                wire.streams -= 1

    monkeypatch.setattr(training_service, "Operation", Tapped)
    monkeypatch.setattr(daemon, "TrainingService", Service)
    return wire


def charged(rows: Sequence[Row]) -> Tally:
    tally: Tally = Counter()
    for row in rows:
        tally[row.channel, row.kind, row.step] += row.sequences
    return tally


def start(config: AgentConfig) -> ForkServerProcess:
    """Start an agent in a process of its own, forked off one that has imported everything."""
    context = warm_context()
    process = context.Process(target=run_agent, args=(config,), daemon=True)
    process.start()
    return process


@pytest.mark.service
def test_a_killed_agent_has_charged_whatever_the_server_has_received(tmp_path: Path, wire: Wire) -> None:
    """Each life of the agent ends at a random instant of its round; the last one finishes the run."""
    draw = random.Random(2024)
    data = write_texts(tmp_path / "a.jsonl", "a", 40)  # some are held out, whatever the salt
    run = server_config(
        tmp_path,
        training={"rounds": ROUNDS, "local_steps": STEPS, "batch_size": BATCH, "micro_batch_size": MICRO_BATCH},
    )
    ledger = tmp_path / "a" / "ledger.jsonl"
    rows: list[Row] = []

    def assert_nothing_left_uncharged() -> None:
        """Compare what came in this life with the rows that this life has added."""
        nonlocal rows
        earlier, rows = rows, read_ledger(ledger).rows
        assert rows[: len(earlier)] == earlier
        assert wire.received
        assert wire.received - charged(rows[len(earlier) :]) == Counter()

    with serving(run) as server:
        config = agent_config(tmp_path, "a", server.address, data, privacy=AgentPrivacySection(noise_multiplier=0.5))
        config = config.model_copy(update={"data": DataSection(path=str(data), held_out_fraction=0.3)})
        for _ in range(KILLS):
            wire.begin_life(draw.randint(1, OPERATIONS))
            agent = start(config)
            assert agent.pid is not None
            assert wire.is_over.wait(120)
            threading.Event().wait(draw.uniform(0, LATEST_S))
            os.kill(agent.pid, signal.SIGKILL)
            agent.join(60)
            assert agent.exitcode == -signal.SIGKILL
            wait_until(lambda: wire.streams == 0)
            assert_nothing_left_uncharged()
        wire.begin_life(0)
        agent = start(config)
        agent.join(120)
        assert agent.exitcode == 0
        server.ended.result(60)
    assert_nothing_left_uncharged()
    for round in range(1, ROUNDS + 1):  # what the adapter of a round is made of is charged step by step
        steps = {row.step for row in rows if (row.channel, row.round) == ("adapter", round)}
        assert steps == set(range(STEPS))
