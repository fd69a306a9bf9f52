"""The main job on real input: real processes, a real pretrained model, real text, a stock check of the result."""

import csv
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from splitfed.config import DataSection, LoraSection, TrainingSection
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import Example, load_examples
from splitfed.training.data import collate as collate_examples
from tests.equivalence.central import central_run
from tests.equivalence.in_process import simulate_files
from tests.service.conftest import write_texts
from tests.service.daemons import Daemons

pytestmark = pytest.mark.service

TRAINING = {"batch_size": 16, "max_tokens": 192, "learning_rate": 3e-3}
LORA = {"rank": 8, "alpha": 16.0}
OPEN = {"smashed": "none", "trunk_output": "none", "output_gradient": "none", "smashed_gradient": "none"}
E2E = {"prompt_column": "mr", "completion_column": "ref"}


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path)
    yield daemons
    daemons.end()


def write_shard(source: Path, target: Path, start: int, rows: int) -> Path:
    """Copy some rows of a CSV file."""
    with source.open(newline="") as file, target.open("w", newline="") as copy:
        writer = csv.writer(copy)
        for number, row in enumerate(csv.reader(file)):
            if number == 0 or start < number <= start + rows:
                writer.writerow(row)
    return target


def examples(file: Path, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> list[Example]:
    data = DataSection(path=str(file), max_rows=rows, **E2E)
    found, _ = load_examples(
        data, tokenizer, max_tokens=TRAINING["max_tokens"], record_hash=lambda content: content.hex()[:8]
    )
    return list(found)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@torch.no_grad()
def held_out_loss(base: Path, adapter: Path | None, dev: list[Example]) -> float:
    """Measure with stock transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(dev), 32):
        batch = collate_examples(dev[start : start + 32], pad_token_id=0)
        total += causal_lm_loss(model(batch.input_ids_BT).logits, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    return total / tokens


def test_three_agents_fine_tune_a_pretrained_model_on_e2e(daemons: Daemons, stories260k: Path, e2e: Path) -> None:
    address = daemons.start_server(
        {
            "model": {"base": str(stories260k), "bottom_blocks": 1, "top_blocks": 1},
            "lora": LORA,
            "training": {**TRAINING, "rounds": 2, "local_steps": 10},
            "federation": {"agents": 3},
            "aggregation": {"lora": "factors"},
            "codecs": OPEN,
        }
    )
    for index, name in enumerate(("north", "south", "west")):
        shard = write_shard(
            e2e / "train.csv", daemons.folder / f"{name}.csv", start=4000 * index, rows=400 + 200 * index
        )
        # One agent has the base model, the others fetch their segments from the server.
        base = str(stories260k) if name == "north" else None
        daemons.start_agent(
            name,
            address,
            {"agent": {"base": base}, "data": {"path": shard.name, **E2E}, "privacy": {"noise_multiplier": 0.0}},
        )
    daemons.wait_for_all()
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    dev = examples(e2e / "dev.csv", tokenizer, rows=200)
    before = held_out_loss(stories260k, None, dev)
    after = [held_out_loss(stories260k, daemons.run / "adapters" / f"round-000{r}", dev) for r in (1, 2)]
    assert 4.0 < before < 4.6
    assert after[0] < before - 1
    assert after[1] < after[0]
    lines = daemons.metrics()
    assert [line["round"] for line in lines] == [1, 2]
    assert {name: share["weight"] for name, share in lines[-1]["agents"].items()} == {
        "north": 400,
        "south": 600,
        "west": 800,
    }
    assert all(share["training_loss"] is None for share in lines[-1]["agents"].values())
    for name in ("north", "south", "west"):
        assert "nothing is guaranteed" in daemons.log(name)
        assert daemons.metrics(name)[-1]["total"].startswith("none: ")


def test_one_agent_has_the_loss_curve_of_central_lora(daemons: Daemons, stories260k: Path, e2e: Path) -> None:
    training = TrainingSection(**TRAINING, rounds=2, local_steps=6, warmup_steps=3)
    address = daemons.start_server(
        {
            "run": {"seed": 11},
            "model": {"base": str(stories260k), "bottom_blocks": 1, "top_blocks": 1},
            "lora": LORA,
            "training": training.model_dump(exclude_none=True),
            "aggregation": {"lora": "factors"},
            "codecs": OPEN,
        }
    )
    shard = write_shard(e2e / "train.csv", daemons.folder / "one.csv", start=100, rows=150)
    daemons.start_agent("one", address, {"data": {"path": shard.name, **E2E}, "privacy": {"noise_multiplier": 0.0}})
    daemons.wait_for_all()
    split = [loss for line in daemons.metrics("one") for loss in line["step_losses"]]
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    central, _ = central_run(
        stories260k, examples(shard, tokenizer), training, LoraSection(**LORA), client="one", seed=11
    )
    assert len(split) == 12
    assert split == pytest.approx(central, abs=1e-5)
    assert central[-1] < central[0] - 1


def test_daemons_that_are_killed_end_with_the_bits_of_an_undisturbed_run(daemons: Daemons) -> None:
    """Undisturbed is the run in one process, which equals a run over gRPC to the bit."""
    port = free_port()
    training = {"rounds": 3, "local_steps": 12, "batch_size": 4, "max_tokens": 48, "learning_rate": 3e-3}
    tables = {
        "run": {"seed": 4},
        "model": {"base": "demo"},
        "training": training,
        "federation": {"agents": 2},
        "aggregation": {"lora": "factors"},
        "server": {"address": f"127.0.0.1:{port}"},
    }
    files = {name: write_texts(daemons.folder / f"{name}.jsonl", name, rows) for name, rows in (("a", 9), ("b", 14))}
    address = daemons.start_server(tables)
    own = {name: {"data": {"path": file.name}, "privacy": {"noise_multiplier": 0.0}} for name, file in files.items()}
    for name, agent in own.items():
        daemons.start_agent(name, address, agent)
    daemons.wait_for_log("a", "round 1 of 3, step 8 of 12")
    assert daemons.kill("a") == -signal.SIGKILL
    daemons.start_agent("a", address, own["a"])
    daemons.wait_for_log("server", "round 1 of 3 is written")
    assert daemons.kill("server") == -signal.SIGKILL
    assert daemons.start_server(tables, "--resume") == address
    daemons.wait_for_log("server", "round 2 of 3 is written")
    assert daemons.kill("server", signal.SIGTERM) == 0
    assert daemons.start_server(tables, "--resume") == address
    daemons.wait_for_all()
    assert [line["round"] for line in daemons.metrics()] == [1, 2, 3]
    simulated = simulate_files(files, TrainingSection(**training), seed=4)
    exported = load_file(daemons.run / "adapter" / "adapter_model.safetensors")
    for name, tensor in simulated.adapter.items():
        assert torch.equal(exported[f"base_model.model.{name}"], tensor), name
