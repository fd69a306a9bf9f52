"""The run directory: whole rounds only, one run only."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.config import (
    LoraSection,
    ModelSection,
    RunSection,
    ServerConfig,
    TrainingSection,
    load_server_config,
)
from splitfed.errors import RunDirectoryError
from splitfed.server.store import RunState, RunStore

IDENTITY = {"name": "r", "training": {"rounds": 3}}


def state(round: int) -> RunState:
    return RunState(
        round=round,
        trunk={"model.layers.1.q.lora_A.weight": torch.full((2, 3), float(round))},
        ends={"model.layers.0.q.lora_A.weight": torch.full((2, 3), -float(round))},
        optimisers={"a": {"k/exp_avg": torch.tensor([1.0, 2.0])}, "b": {}},
        weights={"a": 3, "b": 1},
        agent_ids={"a": "00" * 16, "b": "01" * 16},
        counted={"a": round, "b": 1},
    )


OpenStore = Callable[..., RunStore]


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Open stores one after the other, as servers that come and go."""
    stores: list[RunStore] = []

    def open_next(*arguments: Any, **options: Any) -> RunStore:
        for store in stores:
            store.close()
        stores.append(RunStore(*arguments, **options))
        return stores[-1]

    yield open_next
    for store in stores:
        store.close()


def test_a_new_directory_has_no_round(tmp_path: Path, open_store: OpenStore) -> None:
    assert open_store(tmp_path / "run", IDENTITY).load() is None


def test_a_checkpoint_that_does_not_say_whose_update_was_counted_last_counts_everyones(
    tmp_path: Path, open_store: OpenStore
) -> None:
    open_store(tmp_path / "run", IDENTITY).save(state(2))
    facts = tmp_path / "run" / "checkpoints" / "round-0002" / "state.json"
    facts.write_text(json.dumps({k: v for k, v in json.loads(facts.read_text()).items() if k != "counted"}))
    loaded = open_store(tmp_path / "run", IDENTITY, resume=True).load()
    assert loaded is not None
    assert loaded.counted == {"a": 2, "b": 2}


def test_the_last_round_comes_back_as_it_was(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    for round in (1, 2, 3):
        store.save(state(round))
    loaded = open_store(tmp_path / "run", IDENTITY, resume=True).load()
    assert loaded is not None
    wanted = state(3)
    assert (loaded.round, loaded.weights, loaded.agent_ids) == (3, wanted.weights, wanted.agent_ids)
    assert loaded.counted == {"a": 3, "b": 1}
    assert torch.equal(*(s.trunk["model.layers.1.q.lora_A.weight"] for s in (loaded, wanted)))
    assert torch.equal(*(s.ends["model.layers.0.q.lora_A.weight"] for s in (loaded, wanted)))
    assert torch.equal(loaded.optimisers["a"]["k/exp_avg"], torch.tensor([1.0, 2.0]))
    assert loaded.optimisers["b"] == {}


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    for round in range(1, 6):
        store.save(state(round))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["round-0004", "round-0005"]


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    store.save(state(1))
    draft = tmp_path / "run" / "checkpoints" / ".round-0002"
    draft.mkdir()
    (draft / "trunk.safetensors").write_bytes(b"half")
    loaded = store.load()
    assert loaded is not None
    assert loaded.round == 1
    store.save(state(2))
    loaded = store.load()
    assert loaded is not None
    assert loaded.round == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    store.save(state(1))
    (tmp_path / "run" / "checkpoints" / "round-0001" / "ends.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunDirectoryError, match="round-0001 is damaged"):
        store.load()


def test_a_directory_with_a_run_is_refused(tmp_path: Path, open_store: OpenStore) -> None:
    open_store(tmp_path / "run", IDENTITY).save(state(1))
    with pytest.raises(RunDirectoryError, match="already holds the run 'r'; use --resume"):
        open_store(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_another_run_is_refused_with_the_first_difference(
    tmp_path: Path, open_store: OpenStore, options: dict[str, bool]
) -> None:
    open_store(tmp_path / "run", IDENTITY).save(state(1))
    with pytest.raises(RunDirectoryError, match=r"another run: training\.rounds is 3 there and 4 in the configuration"):
        open_store(tmp_path / "run", {**IDENTITY, "training": {"rounds": 4}}, **options)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"\[run\] directory .* cannot be written to"):
        RunStore(tmp_path / "file" / "run", IDENTITY)


def test_overwriting_removes_what_is_ours_and_nothing_else(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    store.save(state(1))
    store.write_metrics({"round": 1})
    (tmp_path / "run" / "notes.txt").write_text("mine")
    store = open_store(tmp_path / "run", {"name": "other"}, overwrite=True)
    assert store.load() is None
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_directory_with_other_things_is_refused(
    tmp_path: Path, open_store: OpenStore, options: dict[str, bool]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        open_store(tmp_path, IDENTITY, **options)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path, open_store: OpenStore) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is a file"):
        open_store(tmp_path / "run", IDENTITY)


def test_the_configuration_is_kept_in_a_form_that_loads(tmp_path: Path, open_store: OpenStore) -> None:
    config = ServerConfig(
        run=RunSection(name="r", directory=tmp_path / "run"),
        model=ModelSection(base="demo"),
        lora=LoraSection(targets=["q_proj"], alpha=16.0),
        training=TrainingSection(learning_rate=1e-3),
    )
    open_store(tmp_path / "run", IDENTITY).write_config(config)
    assert load_server_config(tmp_path / "run" / "run.toml") == config


def test_metrics_of_a_round_that_is_run_again_are_replaced(tmp_path: Path, open_store: OpenStore) -> None:
    store = open_store(tmp_path / "run", IDENTITY)
    for round in (1, 2, 3):
        store.write_metrics({"round": round, "try": 1})
    store.write_metrics({"round": 2, "try": 2})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"round": 1, "try": 1}, {"round": 2, "try": 2}]


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    first = RunStore(tmp_path / "run", IDENTITY)
    with pytest.raises(RunDirectoryError, match="Another server is at work"):
        RunStore(tmp_path / "run", IDENTITY, overwrite=True)
    first.close()
    RunStore(tmp_path / "run", IDENTITY).close()


def test_a_run_without_a_finished_round_is_simply_started_again(tmp_path: Path, open_store: OpenStore) -> None:
    open_store(tmp_path / "run", IDENTITY)
    assert open_store(tmp_path / "run", IDENTITY).load() is None


def test_a_corrected_configuration_takes_over_a_run_without_a_finished_round(
    tmp_path: Path, open_store: OpenStore
) -> None:
    open_store(tmp_path / "run", IDENTITY)
    corrected = {**IDENTITY, "seed": 1}
    open_store(tmp_path / "run", corrected).save(state(1))
    loaded = open_store(tmp_path / "run", corrected, resume=True).load()
    assert loaded is not None
    assert loaded.round == 1
