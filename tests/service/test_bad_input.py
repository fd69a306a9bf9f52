"""What a user can get wrong at the command line: one sentence, a non-zero exit, nothing lost."""

import json
import shutil
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import splitfed
from splitfed.agent.server_calls import ServerCalls
from splitfed.cli import main
from splitfed.config import AgentPrivacySection
from splitfed.errors import FingerprintMismatch, JoinRefused, NonFiniteLoss
from splitfed.federation.aggregate import MAX_TOTAL_WEIGHT
from splitfed.models import canonical_config, resolve_base
from tests.service.conftest import server_config, write_texts
from tests.service.daemons import toml
from tests.service.local import agent_config, run_agent_here, serving, start_agent, wait_until

SERVER: dict[str, dict[str, Any]] = {
    "run": {"directory": "run"},
    "model": {"base": "demo"},
    "server": {"address": "127.0.0.1:0"},
}
AGENT: dict[str, dict[str, Any]] = {
    "agent": {"name": "a", "server": "127.0.0.1:1", "state_directory": "a", "retry_for_s": 0.5},
    "data": {"path": "a.jsonl"},
}


def sentence(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, tables: dict[str, dict[str, Any]], *options: str
) -> tuple[int, str]:
    """Run a command; gives its exit status and the one line that it printed of its own."""
    file = folder / f"{command}.toml"
    file.write_text(toml(tables))
    with pytest.raises(SystemExit) as end:
        main([command, "--config", str(file), *options])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("splitfed: ")]
    assert len(lines) == 1, lines
    assert isinstance(end.value.code, int)
    return end.value.code, lines[0]


def changed(tables: dict[str, dict[str, Any]], section: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**tables, section: {**tables.get(section, {}), **values}}


@pytest.mark.parametrize(
    ("section", "values", "status", "words"),
    [
        ("model", {"botom_blocks": 1}, 2, ["botom_blocks", "bottom_blocks"]),
        ("training", {"rounds": "three"}, 2, ["training.rounds", "integer"]),
        ("training", {"batch_size": 8, "micro_batch_size": 3}, 2, ["micro_batch_size", "divide"]),
        ("model", {"bottom_blocks": 4, "top_blocks": 3}, 2, ["bottom_blocks", "6"]),
        ("training", {"max_tokens": 513}, 2, ["max_tokens is 513", "512 positions"]),
        ("run", {"directory": "/proc/none/run"}, 1, ["[run] directory", "/proc/none/run"]),
        ("model", {"base": "no/such folder"}, 2, ["model.base"]),
        ("server", {"address": "192.0.2.1:50151"}, 2, ["192.0.2.1", "--insecure"]),
        ("lora", {"targets": ["nothing"]}, 2, ["nothing", "q_proj"]),
    ],
)
def test_a_server_that_cannot_start_says_why(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    values: dict[str, Any],
    status: int,
    words: list[str],
) -> None:
    code, line = sentence(capsys, tmp_path, "server", changed(SERVER, section, **values))
    assert code == status
    for word in words:
        assert word in line


def test_an_unsupported_family_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    code, line = sentence(capsys, tmp_path, "server", changed(SERVER, "model", base="base"))
    assert code == 1
    assert "mamba" in line


def test_a_port_in_use_is_named_and_the_directory_stays_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = sentence(capsys, tmp_path, "server", changed(SERVER, "server", address=address))
        assert code == 1
        assert address in line
        assert "in use" in line
    with serving(server_config(tmp_path / "other")):
        pass


def test_a_run_directory_with_another_run_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = server_config(tmp_path, training={"rounds": 1})
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(config) as server:
        run_agent_here(agent_config(tmp_path, "a", server.address, data))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    for options in ((), ("--resume",)):
        code, line = sentence(capsys, tmp_path, "server", SERVER, *options)
        assert code == 1
        assert "another run" in line
        assert "in the configuration" in line
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_resuming_a_finished_run_says_where_its_adapter_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = server_config(tmp_path, training={"rounds": 1})
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(config) as server:
        run_agent_here(agent_config(tmp_path, "a", server.address, data))
    from splitfed.server.main import run_server

    with caplog.at_level("INFO", "splitfed"):
        assert run_server(config, resume=True) == 0
    assert "is over; its adapter is in" in caplog.text


@pytest.mark.parametrize(
    ("section", "values", "status", "words"),
    [
        ("agent", {"nam": "x"}, 2, ["nam", "name"]),
        ("privacy", {"noise_multiplier": -1.0}, 2, ["noise_multiplier"]),
        ("agent", {"server": "192.0.2.1:50151"}, 2, ["192.0.2.1", "--insecure"]),
    ],
)
def test_an_agent_that_cannot_start_says_why(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    values: dict[str, Any],
    status: int,
    words: list[str],
) -> None:
    code, line = sentence(capsys, tmp_path, "agent", changed(AGENT, section, **values))
    assert code == status
    for word in words:
        assert word in line


def test_a_server_that_does_not_answer_is_named_with_what_was_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "a.jsonl", "a", 3)
    code, line = sentence(capsys, tmp_path, "agent", AGENT)
    assert code == 1
    assert "127.0.0.1:1" in line
    assert "tries" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["a.jsonl", "no such file"]),
        ("", ["a.jsonl", "empty"]),
        ('{"txt": "x"}\n', ["a.jsonl", "'text'", "txt"]),
        ('{"text": "x y z"}\n{"text": 3}\n', ["a.jsonl", "row 2", "'text'"]),
    ],
)
def test_a_data_file_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with serving(server_config(tmp_path)) as server:
        code, line = sentence(capsys, tmp_path, "agent", changed(AGENT, "agent", server=server.address))
    assert code == 1
    for word in words:
        assert word in line


def test_another_base_model_is_refused_at_join_and_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(splitfed.base_model_folder(), base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    data = write_texts(tmp_path / "a.jsonl", "a", 3)
    with (
        serving(server_config(tmp_path)) as server,
        pytest.raises(FingerprintMismatch, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"),
    ):
        run_agent_here(agent_config(tmp_path, "a", server.address, data, base=str(base)))


def test_a_second_agent_of_the_same_name_is_refused(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", 3)
    (tmp_path / "second").mkdir()
    with serving(server_config(tmp_path, training={"rounds": 1}, federation={"agents": 2})) as server:
        first = start_agent(agent_config(tmp_path, "a", server.address, data))
        wait_until(lambda: server.daemon.coordinator.rounds.members == ["a"])
        with pytest.raises(JoinRefused, match="Another agent is called 'a'"):
            run_agent_here(agent_config(tmp_path / "second", "a", server.address, data))
        run_agent_here(agent_config(tmp_path, "b", server.address, data))
        first.result(60)


def test_a_weight_of_which_a_round_could_not_hold_as_many_as_there_are_agents_is_refused(tmp_path: Path) -> None:
    """Otherwise one agent's weight would leave others no room in the sum, whoever comes last."""
    most = MAX_TOTAL_WEIGHT // 3
    config = server_config(tmp_path, federation={"agents": 2, "population": 3})
    with (
        serving(config) as server,
        closing(ServerCalls(server.address, None, None, client="a", agent_id=bytes(16))) as calls,
    ):
        for weight in (0, most + 1):
            with pytest.raises(JoinRefused, match=rf"weight is {weight}, and in this run it lies between 1 and {most}"):
                calls.join("small", canonical_config(resolve_base("demo")), {}, weight=weight)
        calls.join("small", canonical_config(resolve_base("demo")), {}, weight=most)


def test_a_loss_that_is_not_finite_stops_the_agent_before_the_gradient_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitfed.training import client_step
    from splitfed.transport.link import GrpcLink

    sent: list[object] = []
    backward = GrpcLink.backward
    monkeypatch.setattr(GrpcLink, "backward", lambda *arguments: sent.append(arguments) or backward(*arguments))
    monkeypatch.setattr(
        client_step, "ForCausalLMLoss", lambda logits, *_, **__: logits.sum() * float("nan"), raising=True
    )
    data = write_texts(tmp_path / "a.jsonl", "a", 3)
    with serving(server_config(tmp_path)) as server, pytest.raises(NonFiniteLoss, match="nothing was sent back"):
        run_agent_here(agent_config(tmp_path, "a", server.address, data))
    assert sent == []


def test_an_exhausted_budget_stops_the_agent_before_the_release(tmp_path: Path) -> None:
    from splitfed.errors import BudgetExhausted

    data = write_texts(tmp_path / "a.jsonl", "a", 3)
    policy = AgentPrivacySection(noise_multiplier=1.0, epsilon_budget=12.0)
    with serving(server_config(tmp_path)) as server, pytest.raises(BudgetExhausted, match="budget of 12"):
        run_agent_here(agent_config(tmp_path, "a", server.address, data, privacy=policy))
