"""What an agent finds again after a restart, and what it does when something is lost."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from splitfed.agent.state import AgentState
from splitfed.errors import ConfigError, StateError


@pytest.fixture
def state(tmp_path: Path) -> Iterator[AgentState]:
    state = AgentState(tmp_path / "a")
    yield state
    state.close()


def reopened(directory: Path) -> AgentState:
    """Open a directory as the next process would."""
    state = AgentState(directory)
    state.close()
    return state


def moments(round: int) -> dict[str, torch.Tensor]:
    return {"model.layers.0.q.lora_A.weight/exp_avg": torch.full((2, 3), float(round))}


def lines(state: AgentState) -> list[dict[str, object]]:
    return [json.loads(text) for text in (state.directory / "metrics.jsonl").read_text().splitlines()]


def test_an_agent_keeps_its_id_over_restarts(tmp_path: Path) -> None:
    first = reopened(tmp_path / "a")
    assert len(first.agent_id) == 16
    assert reopened(tmp_path / "a").agent_id == first.agent_id


def test_two_agents_have_two_ids(tmp_path: Path) -> None:
    assert reopened(tmp_path / "a").agent_id != reopened(tmp_path / "b").agent_id


@pytest.mark.parametrize("content", ["", "not hexadecimal", "0011"])
def test_a_damaged_id_is_replaced_by_one_that_lasts(tmp_path: Path, content: str) -> None:
    (tmp_path / "agent-id").write_text(content)
    fresh = reopened(tmp_path)
    assert len(fresh.agent_id) == 16
    assert reopened(tmp_path).agent_id == fresh.agent_id


def test_a_directory_in_use_is_refused_until_it_is_free(state: AgentState) -> None:
    with pytest.raises(ConfigError, match=f"Another agent uses .* {state.directory}"):
        AgentState(state.directory)
    state.close()
    assert reopened(state.directory).agent_id == state.agent_id


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'a'} cannot be used"):
        AgentState(tmp_path / "a")


def test_a_run_starts_with_an_empty_optimiser(state: AgentState) -> None:
    assert state.optimiser_after("run", 0) == {}


def test_the_optimiser_comes_back_after_the_last_round_and_the_one_before(state: AgentState) -> None:
    for round in range(1, 5):
        state.keep_optimiser("run", round, moments(round))
    for round in (3, 4):
        found = state.optimiser_after("run", round)
        assert found is not None
        assert found.keys() == moments(round).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in moments(round).items())
    assert state.optimiser_after("run", 2) is None


def test_the_optimiser_that_a_round_started_from_is_kept_however_long_ago_that_was(state: AgentState) -> None:
    state.keep_optimiser("run", 3, moments(3), start=0)
    for dropped in (5, 8):
        state.keep_optimiser("run", dropped, moments(dropped), start=3)
        assert state.optimiser_after("run", 3) is not None
    state.keep_optimiser("run", 9, moments(9), start=8)
    assert state.optimiser_after("run", 3) is None


def test_the_optimiser_of_another_run_is_left_alone(state: AgentState) -> None:
    state.keep_optimiser("first", 1, moments(1))
    for round in (1, 2, 3):
        state.keep_optimiser("second", round, moments(round))
    assert state.optimiser_after("first", 1) is not None


def test_an_optimiser_that_was_never_kept_is_none(state: AgentState) -> None:
    assert state.optimiser_after("run", 1) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_damaged_optimiser_is_none(state: AgentState, content: bytes) -> None:
    state.keep_optimiser("run", 1, moments(1))
    (kept,) = state.directory.glob("state/run/*.safetensors")
    kept.write_bytes(content)
    assert state.optimiser_after("run", 1) is None


def test_a_write_that_was_interrupted_leaves_the_round_before(state: AgentState) -> None:
    state.keep_optimiser("run", 1, moments(1))
    (state.directory / "state" / "run" / ".after-round").write_bytes(b"half")
    found = state.optimiser_after("run", 1)
    assert found is not None
    assert torch.equal(*(values["model.layers.0.q.lora_A.weight/exp_avg"] for values in (found, moments(1))))
    state.keep_optimiser("run", 2, moments(2))
    assert state.optimiser_after("run", 2) is not None


def test_metrics_of_a_round_that_is_run_again_are_replaced(state: AgentState) -> None:
    for round in (1, 2, 3):
        state.write_metrics("run", {"round": round, "try": 1})
    state.write_metrics("run", {"round": 2, "try": 2})
    assert lines(state) == [{"run": "run", "round": 1, "try": 1}, {"run": "run", "round": 2, "try": 2}]


def test_metrics_of_another_run_are_kept(state: AgentState) -> None:
    state.write_metrics("first", {"round": 5})
    state.write_metrics("second", {"round": 1})
    assert lines(state) == [{"run": "first", "round": 5}, {"run": "second", "round": 1}]


@pytest.mark.parametrize("damage", ["{half a li", "[1, 2]", '{"round": 1}', "7"])
def test_a_damaged_line_of_metrics_is_dropped(state: AgentState, damage: str) -> None:
    state.write_metrics("run", {"round": 1})
    with (state.directory / "metrics.jsonl").open("a") as file:
        file.write(damage + "\n")
    state.write_metrics("run", {"round": 2})
    assert lines(state) == [{"run": "run", "round": 1}, {"run": "run", "round": 2}]


# What cannot be written


def no_room(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_one_sentence_says_what_could_not_be_written(
    state: AgentState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.keep_optimiser("run", 1, moments(1))
    state.write_metrics("run", {"round": 1})

    def no_room_in_rust(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr("splitfed.agent.state.save_file", no_room_in_rust)
        with pytest.raises(StateError, match=r"the optimiser's state cannot be written \(.*No space left.*make room"):
            state.keep_optimiser("run", 2, moments(2))
        full.setattr(Path, "rename", no_room)
        with pytest.raises(StateError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
            state.write_metrics("run", {"round": 2})
        (state.directory / "agent-id").unlink()
        state.close()
        with pytest.raises(StateError, match=r"agent-id cannot be written \(No space left on device\); make room"):
            AgentState(state.directory)
    reopened(state.directory)  # it was released
    assert lines(state) == [{"run": "run", "round": 1}]
    assert state.optimiser_after("run", 1) is not None


def test_what_an_agent_keeps_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        state = AgentState(tmp_path / "a")
        state.write_metrics("run", {"round": 1})
        state.close()
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in (".", "agent-id", "metrics.jsonl")}
    assert modes == {".": 0o700, "agent-id": 0o600, "metrics.jsonl": 0o600}
