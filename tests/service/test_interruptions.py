"""Whatever is interrupted, the result is that of an undisturbed run, to the bit (noise off, one machine)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitfed.config import AgentPrivacySection, ServerConfig
from splitfed.errors import LinkError, ServerUnreachable
from splitfed.privacy import read_ledger
from tests.service.conftest import server_config, write_texts
from tests.service.cutting_proxy import CuttingProxy
from tests.service.local import LocalServer, agent_config, run_agent_here, serving, start_agent, wait_until

NAMES = ("a", "b")
ROUNDS = {"rounds": 3, "local_steps": 4, "micro_batch_size": 2, "max_in_flight": 2}


def small_run(folder: Path, **sections: Any) -> ServerConfig:
    folder.mkdir()
    for rows, name in enumerate(NAMES, start=6):
        write_texts(folder / f"{name}.jsonl", name, rows)
    federation = {"agents": 2, "agent_timeout_s": 60, **sections.pop("federation", {})}
    return server_config(folder, training=ROUNDS, federation=federation, **sections)


def agents(folder: Path, address: str, own: Mapping[str, Mapping[str, Any]] = {}) -> list[Any]:
    """Start all agents; ``own`` is what the agents' sections have beside what is the same for all."""
    return [
        start_agent(agent_config(folder, name, address, folder / f"{name}.jsonl", **own.get(name, {})))
        for name in NAMES
    ]


def adapter(config: ServerConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.directory / "adapter" / "adapter_model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_to_the_end(tmp_path_factory.mktemp("undisturbed") / "here")


def run_to_the_end(folder: Path, own: Mapping[str, Mapping[str, Any]] = {}, **sections: Any) -> dict[str, torch.Tensor]:
    """Run without any trouble; gives the adapter."""
    config = small_run(folder, **sections)
    with serving(config) as server:
        for ended in agents(folder, server.address, own):
            ended.result(120)
    return adapter(config)


def run_with_a_restart(
    folder: Path, *, is_silent: bool = False, own: Mapping[str, Mapping[str, Any]] = {}, **sections: Any
) -> ServerConfig:
    """Run with a server that is stopped after the first round, and resumed; a silent one tells nobody."""
    config = small_run(folder, **sections)
    server = LocalServer(config)
    proxy = CuttingProxy(server.address)  # a fixed address in front of servers that come and go
    futures = agents(folder, proxy.address, own)
    wait_until(lambda: (config.run.directory / "checkpoints" / "round-0001").exists())
    if is_silent:
        proxy.close()
    server.stop()
    proxy.close()
    lines = (config.run.directory / "metrics.jsonl").read_text().splitlines()
    assert len(lines) < ROUNDS["rounds"]
    port = int(proxy.address.rpartition(":")[2])
    resumed = config.model_copy(update={"server": config.server.model_copy(update={"address": f"127.0.0.1:{port}"})})
    with serving(resumed, resume=True):
        for ended in futures:
            ended.result(120)
    return config


@pytest.mark.parametrize("cut_after_bytes", [20_000, 150_000, 400_000])
def test_a_stream_that_breaks_is_taken_up_where_it_broke(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], cut_after_bytes: int
) -> None:
    config = small_run(tmp_path / "here")
    with serving(config) as server:
        proxy = CuttingProxy(server.address, cut_after_bytes=cut_after_bytes, cuts=4)
        for ended in agents(tmp_path / "here", proxy.address):
            ended.result(120)
        proxy.close()
    assert proxy.cuts_left < 4
    assert_same(adapter(config), undisturbed)


def test_a_server_that_is_stopped_and_resumed_ends_with_the_same_adapter(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    config = run_with_a_restart(tmp_path / "here")
    assert_same(adapter(config), undisturbed)
    rounds = [json.loads(line)["round"] for line in (config.run.directory / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3]


@pytest.mark.parametrize(
    "aggregation", [{"lora": "flora"}, {"lora": "factors", "server_optimiser": "fedadam"}], ids=["flora", "fedadam"]
)
def test_what_a_rule_keeps_from_round_to_round_survives_a_restart(tmp_path: Path, aggregation: dict[str, Any]) -> None:
    """The residual under the adapter, in the trunk and on the agents, and the moments of the server's optimiser."""
    config = run_with_a_restart(tmp_path / "here", aggregation=aggregation)
    assert_same(adapter(config), run_to_the_end(tmp_path / "undisturbed", aggregation=aggregation))


@pytest.mark.parametrize("variant", ["sflv1", "sflv2"])
def test_agents_with_parts_and_ranks_of_their_own_outlast_a_server_that_crashes(tmp_path: Path, variant: str) -> None:
    """A stream that is taken up at a server that does not know yet what its agent holds begins its round again."""
    run: dict[str, Any] = {
        "own": {"a": {"bottom_blocks": 2, "rank": 2, "personal": ["top"]}, "b": {"bottom_blocks": 0, "top_blocks": 2}},
        "model": {"least_bottom_blocks": 0},
        "lora": {"least_rank": 2},
        "federation": {"variant": variant},
        "aggregation": {},
    }
    config = run_with_a_restart(tmp_path / "here", is_silent=True, **run)
    assert_same(adapter(config), run_to_the_end(tmp_path / "undisturbed", **run))


def test_an_agent_that_stops_and_comes_back_runs_its_round_again(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "here"
    config = small_run(folder)
    with serving(config) as server:
        steady = start_agent(agent_config(folder, "b", server.address, folder / "b.jsonl"))
        proxy = CuttingProxy(server.address, cut_after_bytes=300_000, cuts=1)
        lost = agent_config(folder, "a", proxy.address, folder / "a.jsonl", retry_for_s=0)
        with pytest.raises((ServerUnreachable, LinkError)):
            run_agent_here(lost)
        run_agent_here(agent_config(folder, "a", server.address, folder / "a.jsonl"))
        steady.result(120)
        proxy.close()
    assert_same(adapter(config), undisturbed)


def test_the_round_goes_on_without_an_agent_that_stays_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "splitfed.server")
    folder = tmp_path / "here"
    folder.mkdir()
    for name in NAMES:
        write_texts(folder / f"{name}.jsonl", name, 6)
    config = server_config(folder, training=ROUNDS, federation={"agents": 2, "agent_timeout_s": 3})
    with serving(config) as server:
        proxy = CuttingProxy(server.address, cut_after_bytes=150_000, cuts=1)
        steady = start_agent(agent_config(folder, "b", server.address, folder / "b.jsonl"))
        with pytest.raises((ServerUnreachable, LinkError)):
            run_agent_here(agent_config(folder, "a", proxy.address, folder / "a.jsonl", retry_for_s=0))
        steady.result(120)
        wait_until(lambda: "waiting up to 30 s for a to hear that the run is over" in caplog.text)
        proxy.close()
    lines = [json.loads(line) for line in (config.run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert list(lines[-1]["agents"]) == ["b"]


def test_a_resend_is_the_same_release_and_is_charged_once(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    write_texts(folder / "a.jsonl", "a", 6)
    config = server_config(folder, training=ROUNDS)
    with serving(config) as server:
        proxy = CuttingProxy(server.address, cut_after_bytes=150_000, cuts=2)
        run_agent_here(
            agent_config(
                folder, "a", proxy.address, folder / "a.jsonl", privacy=AgentPrivacySection(noise_multiplier=0.5)
            )
        )
        proxy.close()
    assert proxy.cuts_left == 0
    training = config.training
    sequences = training.rounds * training.local_steps * training.batch_size
    counts = released(folder / "a" / "ledger.jsonl")
    assert {channel: counts[channel] for channel in ("smashed", "output_gradient")} == {
        "smashed": sequences,
        "output_gradient": sequences,
    }
    steps = [
        (row.round, row.step) for row in read_ledger(folder / "a" / "ledger.jsonl").rows if row.channel == "adapter"
    ]
    assert steps == [(r, s) for r in range(1, training.rounds + 1) for s in range(training.local_steps)]


def test_a_loss_that_is_shared_reaches_the_server_and_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    write_texts(folder / "a.jsonl", "a", 6)
    config = server_config(folder, training={"rounds": 1})
    with serving(config) as server:
        run_agent_here(agent_config(folder, "a", server.address, folder / "a.jsonl", share_loss=True))
    own = json.loads((folder / "a" / "metrics.jsonl").read_text())
    line = json.loads((config.run.directory / "metrics.jsonl").read_text())
    assert line["agents"]["a"]["training_loss"] == own["training_loss"]
    assert released(folder / "a" / "ledger.jsonl")["loss"] == 1
    assert "the shared loss" in own["total"]


def released(ledger: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for charge in read_ledger(ledger).rows:
        counts[charge.channel] = counts.get(charge.channel, 0) + charge.sequences
    return counts
