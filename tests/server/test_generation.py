"""Which adapter a sequence is generated with, and who has a place."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.config import ServerConfig
from splitfed.errors import RoundLost, ServerUnreachable
from splitfed.models import adapter_state, resolve_base
from splitfed.server.devices import Device
from splitfed.server.engine import LocalEngine
from splitfed.server.generation import Generations, WholeRound
from splitfed.server.store import RunState
from splitfed.training.setup import open_trunk, start_of_run
from splitfed.training.trunk_step import TrunkTrainer
from tests.service.conftest import server_config

MOST = 8


@dataclass
class Run:
    """A run that goes on to the next round when it is told to."""

    config: ServerConfig
    trunk: Any
    ends: dict[str, torch.Tensor]
    is_draining: bool = False
    state: RunState = field(init=False)

    def go_to(self, round: int) -> None:
        adapter = {
            name: torch.full_like(tensor, 0.01 * (round + 1)) for name, tensor in adapter_state(self.trunk).items()
        }
        self.state = RunState(round, adapter, {name: t + round for name, t in self.ends.items()})


@pytest.fixture(scope="module")
def trunk() -> Any:
    cut, lora = server_config(Path("unused")).model, server_config(Path("unused")).lora
    return open_trunk(resolve_base("demo"), cut, lora, seed=0)


@pytest.fixture
def run(tmp_path: Path, trunk: Any) -> Run:
    config = server_config(tmp_path, generation={"enabled": True, "max_tokens": MOST, "max_streams": 2})
    ends = start_of_run(resolve_base("demo"), config.lora, adapter_state(trunk), seed=0)
    found = Run(config, trunk, ends)
    found.go_to(1)
    return found


@pytest.fixture
def engine(run: Run) -> Iterator[LocalEngine]:
    engine = LocalEngine(TrunkTrainer(run.trunk, run.config.training, seed=0))
    yield engine
    engine.close()


def hidden(run: Run, rows: int) -> torch.Tensor:
    return torch.randn(1, rows, run.trunk.hidden_size, generator=torch.Generator().manual_seed(rows))


async def test_a_sequence_keeps_its_round_when_the_run_goes_on(run: Run, engine: LocalEngine) -> None:
    generations = Generations(run, engine)
    assert generations.last_round("a").number == 1
    found = []
    for goes_on in (False, True):
        sequence = generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST)
        first = await generations.forward(sequence, hidden(run, 3))
        if goes_on:
            run.go_to(2)
        found.append(torch.cat([first, await generations.forward(sequence, hidden(run, 2))], dim=1))
    assert torch.equal(*found)
    sequence = generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST)  # opened once the run has gone on
    assert torch.equal(await generations.forward(sequence, hidden(run, 3)), found[0][:, :3])
    with pytest.raises(RoundLost, match="The adapter of round 1 is no longer here, the run is at round 2"):
        generations.open("b", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    assert generations.last_round("a").number == 2
    sequence = generations.open("a", 2, blocks=run.trunk.blocks, max_tokens=MOST)
    assert not torch.allclose(await generations.forward(sequence, hidden(run, 3)), found[0][:, :3])


async def test_clients_of_one_round_share_what_is_kept_of_it(run: Run, engine: LocalEngine) -> None:
    generations = Generations(run, engine)
    assert generations.last_round("a") is generations.last_round("b")
    run.go_to(2)
    assert generations.last_round("b").number == 2
    assert generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST).whole.number == 1


async def test_places_are_bounded_and_one_a_client(run: Run, engine: LocalEngine) -> None:
    generations = Generations(run, engine)
    first = generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    second = generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    assert (first.over.is_set(), second.over.is_set()) == (True, False)
    generations.close(first)  # which has no place any more: the second one keeps its own
    generations.open("b", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    with pytest.raises(ServerUnreachable, match="2 agents generate already; come back later"):
        generations.open("c", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    generations.close(second)
    generations.open("c", 1, blocks=run.trunk.blocks, max_tokens=MOST)


async def test_training_waits_for_one_forward_at_most(run: Run, engine: LocalEngine) -> None:
    generations = Generations(run, engine)
    order: list[str] = []
    sequences = [generations.open(client, 1, blocks=run.trunk.blocks, max_tokens=MOST) for client in ("a", "b")]

    async def generate(sequence: Any) -> None:
        await generations.forward(sequence, hidden(run, 1))
        order.append("row")

    rows = [asyncio.create_task(generate(sequence)) for sequence in sequences]
    await asyncio.sleep(0)
    training = asyncio.wrap_future(engine.submit(lambda trainer: order.append("training")))
    await asyncio.gather(training, *rows)
    assert order.index("training") <= 1


async def test_a_server_that_shuts_down_computes_no_more_rows(run: Run, engine: LocalEngine) -> None:
    generations = Generations(run, engine)
    sequence = generations.open("a", 1, blocks=run.trunk.blocks, max_tokens=MOST)
    run.is_draining = True
    with pytest.raises(ServerUnreachable, match="shutting down"):
        await generations.forward(sequence, hidden(run, 1))
    with pytest.raises(ServerUnreachable, match="shutting down"):
        generations.open("b", 1, blocks=run.trunk.blocks, max_tokens=MOST)


def test_an_agent_gets_its_own_ends_at_its_own_rank(run: Run) -> None:
    whole = WholeRound.of(run.state, run.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in run.state.ends.items()}
    same = whole.ends_of(Device(None, 4, shapes), 4)
    assert same.keys() == shapes.keys()
    assert all(torch.equal(same[name], run.state.ends[name]) for name in shapes)
    smaller = whole.ends_of(Device(None, 2, shapes), 4)
    assert {min(tensor.shape) for tensor in smaller.values()} == {2}
