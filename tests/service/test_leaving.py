"""An agent that stops for a reason of its own leaves the run in good order: nobody waits for it."""

import itertools
import json
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitfed.agent.server_calls import ServerCalls
from splitfed.config import AgentPrivacySection, ServerConfig
from splitfed.errors import BudgetExhausted, JoinRefused, NonFiniteLoss, ProtocolError, RoundLost, SplitFedError
from splitfed.privacy import epsilon
from splitfed.server.contribution import Contribution
from splitfed.server.coordinator import Coordinator
from splitfed.training import client_step
from tests.equivalence.in_process import simulate_files
from tests.service.conftest import server_config, write_texts
from tests.service.cutting_proxy import CuttingProxy
from tests.service.daemons import Daemons
from tests.service.local import agent_config, run_agent_here, serving, start_agent, wait_until

DELTA = 1e-5
FAR_BEYOND_THE_TEST_S = 300.0
"""Whoever waits for an agent's timeout fails the test."""
"""What a record is charged for in each use: smashed data, output gradient, gradient of the agent's adapters."""


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path)
    yield daemons
    daemons.end()


def budget(releases: float) -> AgentPrivacySection:
    """A policy whose budget ends after so many releases of a record, or so."""
    spent = epsilon([(1.0, releases)], DELTA)
    return AgentPrivacySection(noise_multiplier=1.0, delta=DELTA, epsilon_budget=spent)


def small_run(folder: Path, agents: int, **training: int) -> ServerConfig:
    return server_config(
        folder, training=training, federation={"agents": agents, "agent_timeout_s": FAR_BEYOND_THE_TEST_S}
    )


def exported(config: ServerConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.directory / "adapter" / "adapter_model.safetensors")


def undisturbed(config: ServerConfig, **files: Path) -> dict[str, torch.Tensor]:
    """The adapter of a run in this process, which equals a run over gRPC to the bit."""
    simulated = simulate_files(files, config.training, seed=config.run.seed, lora=config.lora, codecs=config.codecs)
    return {f"base_model.model.{name}": tensor for name, tensor in simulated.adapter.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_others_finish_at_once_without_an_agent_whose_budget_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its budget allows the first round, not the second: each adapter is the mean of those who were in its round."""
    updates: dict[int, dict[str, Mapping[str, torch.Tensor]]] = {1: {}, 2: {}}
    submit = Coordinator.submit

    async def note(
        self: Coordinator, client: str, round: int, ends: Mapping[str, torch.Tensor], contribution: Contribution
    ) -> bool:
        updates[round][client] = ends
        return await submit(self, client, round, ends, contribution)

    monkeypatch.setattr(Coordinator, "submit", note)
    config = small_run(tmp_path, 3)
    steps, batch = config.training.local_steps, config.training.batch_size
    releases_of_a_round = steps * (2 * batch + batch**2)  # of the only record: its rows, and its sum of gradients
    policy = budget(1.5 * releases_of_a_round)
    files = {name: write_texts(tmp_path / f"{name}.jsonl", name, rows) for name, rows in (("a", 6), ("b", 8), ("c", 1))}
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        steady = [start_agent(agent_config(tmp_path, name, server.address, files[name])) for name in "ab"]
        with pytest.raises(BudgetExhausted, match="epsilon budget of"):
            run_agent_here(agent_config(tmp_path, "c", server.address, files["c"], privacy=policy))
        for ended in steady:
            ended.result(120)
        server.ended.result(20)
    assert "c left for good (2 of 3 here)" in caplog.text
    assert {round: sorted(names) for round, names in updates.items()} == {1: ["a", "b", "c"], 2: ["a", "b"]}
    for line in map(json.loads, (config.run.directory / "metrics.jsonl").read_text().splitlines()):
        weights = {client: share["weight"] for client, share in line["agents"].items()}
        adapter = load_file(config.run.directory / line["adapter"] / "adapter_model.safetensors")
        ends = updates[line["round"]]
        for name in ends["a"]:
            mean = sum(weights[client] * ends[client][name] for client in weights) / sum(weights.values())
            torch.testing.assert_close(adapter[f"base_model.model.{name}"], mean, rtol=0, atol=1e-6)


def test_an_agent_that_leaves_in_the_middle_of_a_round_leaves_no_trace_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes of it is to the bit what the two come to without the third."""
    loss, losses_of_c = client_step.ForCausalLMLoss, itertools.count(1)

    def lose(*given: Any, **named: Any) -> Any:
        is_last = threading.current_thread().name == "c" and next(losses_of_c) == 2
        return loss(*given, **named) * (float("nan") if is_last else 1.0)

    monkeypatch.setattr(client_step, "ForCausalLMLoss", lose)
    files = {name: write_texts(tmp_path / f"{name}.jsonl", name, rows) for name, rows in (("a", 6), ("b", 8), ("c", 5))}
    config = small_run(tmp_path, 3)
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        ended = {name: start_agent(agent_config(tmp_path, name, server.address, file)) for name, file in files.items()}
        with pytest.raises(NonFiniteLoss):
            ended["c"].result(120)
        for name in "ab":
            ended[name].result(120)
        server.ended.result(20)
    monkeypatch.undo()
    assert "c left for good (2 of 3 here)" in caplog.text
    assert_same(exported(config), undisturbed(config, a=files["a"], b=files["b"]))


def test_a_run_that_every_agent_left_for_good_ends_after_its_last_whole_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = client_step.ForCausalLMLoss
    config = small_run(tmp_path, 1)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(config) as server:
        rounds = server.daemon.coordinator.rounds
        monkeypatch.setattr(
            client_step,
            "ForCausalLMLoss",
            lambda *given, **named: loss(*given, **named) * (1.0 if rounds.committed == 0 else float("nan")),
        )
        with pytest.raises(NonFiniteLoss):
            run_agent_here(agent_config(tmp_path, "a", server.address, data))
        server.ended.result(20)
    assert caplog.records[-1].getMessage() == (
        "every agent left the run for good after round 1 of 2; --resume goes on from there with those that come back"
    )
    monkeypatch.undo()
    with serving(config, resume=True) as server:
        run_agent_here(agent_config(tmp_path, "a", server.address, data))
    assert_same(exported(config), undisturbed(config, a=data))


def test_a_server_that_cannot_be_told_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(small_run(tmp_path, 1)) as server:
        proxy = CuttingProxy(server.address)

        def lose(logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            proxy.close()
            return logits.sum() * float("nan")

        monkeypatch.setattr(client_step, "ForCausalLMLoss", lose)
        with pytest.raises(NonFiniteLoss):
            run_agent_here(agent_config(tmp_path, "a", proxy.address, data))
        assert server.daemon.coordinator.rounds.joined == 1


def test_nobody_else_can_take_an_agents_leave(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(small_run(tmp_path, 2)) as server:
        rounds = server.daemon.coordinator.rounds
        proxy = CuttingProxy(server.address)
        waiting = start_agent(agent_config(tmp_path, "a", proxy.address, data, retry_for_s=0))
        wait_until(lambda: rounds.joined == 1)
        strangers: list[tuple[str, bytes, str, type[SplitFedError]]] = [
            ("a", secrets.token_bytes(16), "small", JoinRefused),
            ("b", secrets.token_bytes(16), "small", RoundLost),
            ("a", bytes.fromhex((tmp_path / "a" / "agent-id").read_text()), "large", ProtocolError),
        ]
        for client, agent_id, run_id, refusal in strangers:
            calls = ServerCalls(server.address, None, None, client=client, agent_id=agent_id)
            with closing(calls), pytest.raises(refusal):
                calls.leave(run_id, for_good=True)
        assert rounds.joined == 1
        proxy.close()
        with pytest.raises(SplitFedError):
            waiting.result(60)


@pytest.mark.service
def test_an_agent_that_is_asked_to_stop_leaves_at_once_and_comes_back(tmp_path: Path, daemons: Daemons) -> None:
    config = small_run(tmp_path, 1, local_steps=15)
    data = write_texts(tmp_path / "a.jsonl", "a", 9)
    tables = {"data": {"path": data.name}, "privacy": {"noise_multiplier": 0.0}}
    with serving(config) as server:
        rounds = server.daemon.coordinator.rounds
        daemons.start_agent("a", server.address, tables)
        daemons.wait_for_log("a", "round 1 of 2, step 6")
        assert daemons.kill("a", signal.SIGTERM) == 0
        assert "stopped by SIGTERM: the open round goes on without this agent" in daemons.log("a").splitlines()[-1]
        assert rounds.joined == 0
        daemons.start_agent("a", server.address, tables)
        assert daemons.wait("a") == 0
    assert_same(exported(config), undisturbed(config, a=data))


@pytest.mark.service
def test_daemons_of_a_run_whose_budget_ends_say_so_last(daemons: Daemons) -> None:
    file = write_texts(daemons.folder / "a.jsonl", "a", 3)
    address = daemons.start_server(
        {"model": {"base": "demo"}, "training": {"batch_size": 4, "max_tokens": 32, "local_steps": 6}}
    )
    policy = budget(5).model_dump(include={"noise_multiplier", "delta", "epsilon_budget"})
    daemons.start_agent("a", address, {"data": {"path": file.name}, "privacy": policy})
    assert daemons.wait("a") == 3
    assert daemons.wait("server") == 3
    last = daemons.log("a").splitlines()[-1]
    assert last.startswith("splitfed: ")
    assert "epsilon budget" in last
    assert "every agent left the run for good after round 0 of 3" in daemons.log("server").splitlines()[-1]
