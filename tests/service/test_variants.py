"""Variants over real gRPC, interrupted: the bits of an undisturbed run, and nobody waits for one that is gone."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitfed.config import ServerConfig
from splitfed.errors import LinkError
from splitfed.training import client_step
from tests.service.conftest import server_config, write_texts
from tests.service.cutting_proxy import CuttingProxy
from tests.service.local import LocalServer, agent_config, run_agent_here, serving, start_agent, wait_until

STEPS = 3
TRAINING = {"rounds": 2, "local_steps": STEPS, "micro_batch_size": 2, "max_in_flight": 2, "max_tokens": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "sflv2": {"variant": "sflv2"},
    "parallel": {"variant": "parallel"},
    "parallel, merged at every step": {"variant": "parallel", "merge_ends": "step"},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def small_run(folder: Path, agents: str = "ab", *, timeout_s: float = 60, **federation: Any) -> ServerConfig:
    folder.mkdir(exist_ok=True)
    for rows, name in enumerate(agents, start=6):
        write_texts(folder / f"{name}.jsonl", name, rows)
    return server_config(
        folder, training=TRAINING, federation={"agents": len(agents), "agent_timeout_s": timeout_s, **federation}
    )


def start(folder: Path, name: str, address: str, **agent: Any) -> Future[None]:
    return start_agent(agent_config(folder, name, address, folder / f"{name}.jsonl", **agent))


def adapter(config: ServerConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.directory / "adapter" / "adapter_model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def lines(config: ServerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.directory / "metrics.jsonl").read_text().splitlines()]


def agents_of(config: ServerConfig) -> list[list[str]]:
    return [list(line["agents"]) for line in lines(config)]


class Undisturbed:
    """The result of each run that nothing happens to, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._adapters: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def adapter(self, name: str, agents: str = "ab") -> dict[str, torch.Tensor]:
        if (name, agents) not in self._adapters:
            folder = self._folder / f"{len(self._adapters)}"
            config = small_run(folder, agents, **VARIANTS[name])
            with serving(config) as server:
                for ended in [start(folder, agent, server.address) for agent in agents]:
                    ended.result(60)
            self._adapters[name, agents] = adapter(config)
        return self._adapters[name, agents]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


class Moment:
    """Lets one agent die, or wait, as it computes the loss of a micro-batch that is its so manyth.

    Attributes:
        is_reached: Set once it is there.
        may_go: Unless it dies, it waits for this.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.may_go = threading.Event(), threading.Event()
        self._who, self._left, self._dies = "", 0, False
        loss = client_step.ForCausalLMLoss

        def look(*given: Any, **named: Any) -> Any:
            if threading.current_thread().name == self._who:
                self._left -= 1
                if self._left == 0:
                    self._happen()
            return loss(*given, **named)

        monkeypatch.setattr(client_step, "ForCausalLMLoss", look)

    def dies(self, who: str, *, at: int) -> None:
        self._who, self._left, self._dies = who, at, True

    def waits(self, who: str, *, at: int) -> None:
        self._who, self._left, self._dies = who, at, False

    def _happen(self) -> None:
        self.is_reached.set()
        if self._dies:
            raise Died("The power is gone.")
        assert self.may_go.wait(60)


class Died(Exception):
    """An agent's end; it says no word to the server."""


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moment]:
    monkeypatch.setattr("splitfed.agent.loop.leave", lambda *_: None)
    moment = Moment(monkeypatch)
    yield moment
    moment.may_go.set()


@every_variant
def test_streams_that_break_are_taken_up_where_they_broke(tmp_path: Path, undisturbed: Undisturbed, name: str) -> None:
    config = small_run(tmp_path, **VARIANTS[name])
    with serving(config) as server:
        proxy = CuttingProxy(server.address, cut_after_bytes=60_000, cuts=5)
        for ended in [start(tmp_path, agent, proxy.address) for agent in "ab"]:
            ended.result(60)
        proxy.close()
    assert proxy.cuts_left < 3
    assert_same(adapter(config), undisturbed.adapter(name))
    assert not any("taken_out" in line for line in lines(config))


@every_variant
def test_a_server_that_is_stopped_amid_a_round_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, moment: Moment, name: str
) -> None:
    """It is stopped while b holds up the second round's second step: where steps are joint, a waits for b then."""
    config = small_run(tmp_path, **VARIANTS[name])
    server = LocalServer(config)
    proxy = CuttingProxy(server.address)  # a fixed address in front of servers that come and go
    moment.waits("b", at=2 * STEPS + 3)
    futures = [start(tmp_path, agent, proxy.address) for agent in "ab"]
    assert moment.is_reached.wait(60)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    wait_until(lambda: server.daemon.coordinator.is_draining)
    moment.may_go.set()
    stopping.join(60)
    assert not stopping.is_alive()
    proxy.close()
    assert [line["round"] for line in lines(config)] == [1]
    port = proxy.address.rpartition(":")[2]
    resumed = config.model_copy(update={"server": config.server.model_copy(update={"address": f"127.0.0.1:{port}"})})
    with serving(resumed, resume=True):
        for ended in futures:
            ended.result(60)
    assert_same(adapter(config), undisturbed.adapter(name))
    assert [line["round"] for line in lines(config)] == [1, 2]


@pytest.mark.parametrize("merge_ends", ["round", "step"])
def test_the_others_finish_a_joint_round_without_an_agent_that_dies_and_comes_back(
    tmp_path: Path, moment: Moment, merge_ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(tmp_path, "abc", variant="parallel", merge_ends=merge_ends)
    moment.dies("b", at=3)
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        lost, *others = [start(tmp_path, agent, server.address) for agent in "bac"]
        with pytest.raises(Died):
            lost.result(60)
        others.append(start(tmp_path, "b", server.address))
        for ended in others:
            ended.result(60)
    assert agents_of(config) == [["a", "c"], ["a", "b", "c"]]
    assert lines(config)[0]["taken_out"] == ["b"]
    assert "begins again" not in caplog.text
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter(config).values())


@pytest.mark.parametrize("name", ["parallel", "parallel, merged at every step"])
def test_an_agent_alone_that_dies_begins_the_round_again_and_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, moment: Moment, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(tmp_path, "a", **VARIANTS[name])
    moment.dies("a", at=2 * STEPS + 3)
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        with pytest.raises(Died):
            start(tmp_path, "a", server.address).result(60)
        run_agent_here(agent_config(tmp_path, "a", server.address, tmp_path / "a.jsonl"))
    assert "round 2 begins again: too few are left to finish it" in caplog.text
    assert_same(adapter(config), undisturbed.adapter(name, "a"))


def test_a_joint_round_that_too_few_are_left_in_begins_again_for_all_with_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, moment: Moment
) -> None:
    config = small_run(tmp_path, "ab", variant="parallel", quorum=2)
    moment.dies("b", at=2 * STEPS + 3)
    with serving(config) as server:
        steady, lost = [start(tmp_path, agent, server.address) for agent in "ab"]
        with pytest.raises(Died):
            lost.result(60)
        for ended in (steady, start(tmp_path, "b", server.address)):
            ended.result(60)
    assert agents_of(config) == [["a", "b"], ["a", "b"]]
    assert_same(adapter(config), undisturbed.adapter("parallel"))


def test_an_agent_that_dies_in_its_turn_and_comes_back_runs_it_again_with_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, moment: Moment
) -> None:
    config = small_run(tmp_path, **VARIANTS["sflv2"])
    moment.dies("a", at=2 * STEPS + 3)
    with serving(config) as server:
        lost, steady = [start(tmp_path, agent, server.address) for agent in "ab"]
        with pytest.raises(Died):
            lost.result(60)
        for ended in (steady, start(tmp_path, "a", server.address)):
            ended.result(60)
    assert_same(adapter(config), undisturbed.adapter("sflv2"))


def test_the_next_turn_goes_on_from_the_last_finished_one_where_an_agent_stays_away(
    tmp_path: Path, undisturbed: Undisturbed, moment: Moment
) -> None:
    """Of one that dies in its first turn nothing is left: the run is that of the other one alone."""
    config = small_run(tmp_path, "ab", timeout_s=3, variant="sflv2")
    moment.dies("b", at=3)
    with serving(config) as server:
        steady, lost = [start(tmp_path, agent, server.address) for agent in "ab"]
        with pytest.raises(Died):
            lost.result(60)
        steady.result(60)
    assert agents_of(config) == [["a"], ["a"]]
    assert_same(adapter(config), undisturbed.adapter("sflv2", "a"))


def test_free_steps_go_on_without_an_agent_that_dies_and_with_it_once_it_is_back(
    tmp_path: Path, moment: Moment
) -> None:
    config = small_run(tmp_path, "abc", variant="async", max_staleness=2)
    moment.dies("b", at=3)
    with serving(config) as server:
        lost, *others = [start(tmp_path, agent, server.address) for agent in "bac"]
        with pytest.raises(Died):
            lost.result(60)
        others.append(start(tmp_path, "b", server.address))
        for ended in others:
            ended.result(60)
    assert agents_of(config) == [["a", "b", "c"]] * 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter(config).values())


def test_free_steps_outlive_streams_that_break(tmp_path: Path) -> None:
    config = small_run(tmp_path, "ab", variant="async")
    with serving(config) as server:
        proxy = CuttingProxy(server.address, cut_after_bytes=60_000, cuts=3)
        for ended in [start(tmp_path, agent, proxy.address) for agent in "ab"]:
            ended.result(60)
        proxy.close()
    assert proxy.cuts_left == 0
    assert agents_of(config) == [["a", "b"]] * 2


def test_an_agent_that_stops_for_good_amid_a_joint_round_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the agent's timeout fails the test."""
    config = small_run(tmp_path, "ab", timeout_s=300, variant="parallel")
    moment = Moment(monkeypatch)
    moment.dies("b", at=3)
    with serving(config) as server:
        steady, lost = [start(tmp_path, agent, server.address) for agent in "ab"]
        with pytest.raises((Died, LinkError)):
            lost.result(60)
        steady.result(60)
    assert agents_of(config) == [["a"], ["a"]]
