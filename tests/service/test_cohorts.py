"""Runs in which not everyone takes part in every round, or one agent is too slow for it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from splitfed.agent.loop import Agent
from splitfed.config import ServerConfig
from splitfed.federation.cohort import ranked
from splitfed.training import client_step
from tests.service.conftest import server_config, write_texts
from tests.service.daemons import Daemons
from tests.service.local import LocalServer, agent_config, serving, start_agent, wait_until

NAMES = ("a", "b", "c", "d")
FAR_BEYOND_THE_TEST_S = 300.0
"""Whoever waits for an agent's timeout fails the test."""


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path)
    yield daemons
    daemons.end()


def small_run(folder: Path, *, rounds: int, lora: str = "factors", **federation: Any) -> ServerConfig:
    for rows, name in enumerate(NAMES, start=5):
        write_texts(folder / f"{name}.jsonl", name, rows)
    federation = {"agents": 4, "agent_timeout_s": FAR_BEYOND_THE_TEST_S, **federation}
    return server_config(
        folder,
        training={"rounds": rounds, "local_steps": 2},
        federation=federation,
        aggregation={"lora": lora},
    )


def start_all(folder: Path, server: LocalServer) -> list[Any]:
    return [start_agent(agent_config(folder, name, server.address, folder / f"{name}.jsonl")) for name in NAMES]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.service
def test_four_agents_of_which_two_are_asked_for_each_round(daemons: Daemons) -> None:
    rounds, seed = 5, 1
    address = daemons.start_server(
        {
            "run": {"seed": seed},
            "model": {"base": "demo"},
            "training": {"rounds": rounds, "local_steps": 3, "batch_size": 4, "max_tokens": 32},
            "federation": {"agents": 4, "cohort": 2, "straggler_margin": 3.0},
        }
    )
    for rows, name in enumerate(NAMES, start=5):
        file = write_texts(daemons.folder / f"{name}.jsonl", name, rows)
        daemons.start_agent(name, address, {"data": {"path": file.name}, "privacy": {"noise_multiplier": 0.0}})
    daemons.wait_for_all()
    asked = {round: sorted(ranked(NAMES, seed=seed, round=round)[:2]) for round in range(1, rounds + 1)}
    found = daemons.metrics()
    assert {line["round"]: list(line["agents"]) for line in found} == asked
    assert {line["round"]: line["selected"] for line in found} == asked
    assert all(line["agents"][name]["tokens"] > 0 for line in found for name in line["agents"])
    for name in NAMES:
        own = daemons.metrics(name) if (daemons.folder / name / "metrics.jsonl").exists() else []
        assert [line["round"] for line in own] == [round for round, cohort in asked.items() if name in cohort]
        troubles = ("ERROR", "not here", "again")
        assert not [line for line in daemons.log(name).splitlines() if any(words in line for words in troubles)]


def test_a_run_with_a_cohort_ends_with_the_same_bits_whatever_order_agents_come_in(tmp_path: Path) -> None:
    """Each agent's optimiser goes on from the last round that it was asked for."""
    adapters = []
    for order in (NAMES, NAMES[::-1]):
        folder = tmp_path / "".join(order)
        folder.mkdir()
        config = small_run(folder, rounds=5, cohort=2)
        with serving(config) as server:
            ended = []
            for count, name in enumerate(order, start=1):
                ended.append(start_agent(agent_config(folder, name, server.address, folder / f"{name}.jsonl")))
                wait_until(lambda: server.daemon.coordinator.rounds.joined == count)  # noqa: B023 - it is over here
            for future in ended:
                future.result(120)
        adapters.append((config.run.directory / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


class Slow:
    """Holds d in its first round's last step until the round is over, and a in the next one until d is done with that.

    Nobody's time is guessed: d takes exactly as long as the round that is closed without it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server: LocalServer | None = None
        self.is_d_done = threading.Event()
        loss, calls = client_step.ForCausalLMLoss, {"a": 0, "d": 0}

        def hold(*given: Any, **named: Any) -> Any:
            name = threading.current_thread().name
            if name in calls:
                calls[name] += 1
                if (name, calls[name]) == ("d", 2):
                    self._until_committed(1)
                elif (name, calls[name]) == ("a", 3):
                    assert self.is_d_done.wait(60)
            return loss(*given, **named)

        monkeypatch.setattr(client_step, "ForCausalLMLoss", hold)

    def _until_committed(self, round: int) -> None:
        wait_until(lambda: self.server is not None and self.server.daemon.coordinator.rounds.committed >= round)


def test_a_straggler_is_cut_off_comes_back_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(tmp_path, rounds=3, straggler_margin=3.0)
    slow = Slow(monkeypatch)
    take_part = Agent._take_part

    def note(agent: Agent) -> None:
        if agent._joined is not None and agent._config.agent.name == "d":
            slow.is_d_done.set()  # it has lost its round, and joins again
        take_part(agent)

    monkeypatch.setattr(Agent, "_take_part", note)
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        slow.server = server
        for ended in start_all(tmp_path, server):
            ended.result(120)
        server.ended.result(20)
    assert "round 1 waits no longer for d" in caplog.text
    assert "Round 1 was closed without 'd', which was late" in caplog.text
    first, *others = lines(config.run.directory)
    assert (first["late"], first["dropped"], list(first["agents"])) == (["d"], ["d"], ["a", "b", "c"])
    assert [line["round"] for line in others] == [2, 3]
    assert load_file(config.run.directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("lora", ["factors", "flora"])
def test_a_late_update_is_merged_in_the_round_that_it_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    config = small_run(tmp_path, rounds=3, lora=lora, straggler_margin=3.0, late_updates="merge")
    slow = Slow(monkeypatch)
    with serving(config) as server:
        slow.server = server
        futures = start_all(tmp_path, server)
        rounds = server.daemon.coordinator.rounds
        wait_until(lambda: "d" in rounds.merged)
        slow.is_d_done.set()
        for ended in futures:
            ended.result(120)
        server.ended.result(20)
    first, second, third = lines(config.run.directory)
    assert (first["late"], "dropped" in first) == (["d"], False)
    assert second["merged"] == {"d": 1}
    assert {"a", "d"} <= second["agents"].keys()
    assert "d" in third["agents"] or "d" in third["late"]
    assert lines(tmp_path / "d")[0]["round"] == 1
