"""Every variant and rule over gRPC gives the bits of one process, and with one agent the losses of central LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import splitfed
from splitfed.config import ServerConfig
from tests.equivalence.central import central_run
from tests.equivalence.in_process import examples_in, simulate_files
from tests.equivalence.test_over_the_wire import step_losses
from tests.service.conftest import server_config, write_texts
from tests.service.local import agent_config, run_agent_here, serving, start_agent

TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats."""


def run_daemons(folder: Path, config: ServerConfig, rows: Mapping[str, int]) -> dict[str, Path]:
    """Serve a run to its end, with an agent for each file."""
    files = {name: write_texts(folder / f"{name}.jsonl", name, count) for name, count in rows.items()}
    with serving(config) as server:
        ended = [start_agent(agent_config(folder, name, server.address, file)) for name, file in files.items()]
        for future in ended:
            future.result(240)
    return files


def assert_bits_of_one_process(folder: Path, config: ServerConfig, files: Mapping[str, Path]) -> None:
    exported = load_file(config.run.directory / "adapter" / "adapter_model.safetensors")
    simulated = simulate_files(
        files,
        config.training,
        seed=config.run.seed,
        lora=config.lora,
        codecs=config.codecs,
        federation=config.federation,
        aggregation=config.aggregation,
    )
    for name in files:
        assert step_losses(folder / name) == simulated.losses[name], name
    assert exported.keys() == {f"base_model.model.{name}" for name in simulated.adapter}
    for name, tensor in simulated.adapter.items():
        assert torch.equal(exported[f"base_model.model.{name}"], tensor), name


@pytest.mark.parametrize(
    ("federation", "training"),
    [
        ({"variant": "sflv2"}, {"micro_batch_size": 2}),
        ({"variant": "parallel"}, {"micro_batch_size": 2}),
        ({"variant": "parallel", "merge_ends": "step"}, {"max_grad_norm": 0.3, "weight_decay": 0.01}),
        ({"variant": "sflv1", "cohort": 2}, {"max_grad_norm": 0.3, "proximal": 0.1}),
    ],
    ids=str,
)
def test_three_agents_over_grpc_get_the_bits_of_one_process(
    tmp_path: Path, federation: dict[str, Any], training: dict[str, Any]
) -> None:
    config = server_config(tmp_path, training={"rounds": 3, **training}, federation={"agents": 3, **federation})
    files = run_daemons(tmp_path, config, {"a": 12, "b": 5, "c": 8})
    assert_bits_of_one_process(tmp_path, config, files)


@pytest.mark.parametrize(
    "aggregation",
    [
        {"lora": "ffa"},
        {"lora": "alternating"},
        {"lora": "flexlora"},
        {"lora": "flora", "flora_rank": 6},
        {"lora": "factors", "server_optimiser": "fedadam", "server_learning_rate": 1e-3},
        {"lora": "factors", "rule": "median", "norm_bound": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["sflv1", "parallel"])
def test_every_rule_over_grpc_gives_the_bits_of_one_process(
    tmp_path: Path, aggregation: dict[str, Any], variant: str
) -> None:
    rows = {"a": 12, "b": 5, "c": 8} if "rule" in aggregation else {"a": 12, "b": 5}
    federation = {"agents": len(rows), "quorum": len(rows), "variant": variant}
    config = server_config(tmp_path, federation=federation, aggregation=aggregation)
    files = run_daemons(tmp_path, config, rows)
    assert_bits_of_one_process(tmp_path, config, files)


def test_turns_that_are_cut_short_over_grpc_have_the_bits_of_one_process(tmp_path: Path) -> None:
    federation = {"agents": 2, "quorum": 2, "variant": "sflv2"}
    aggregation = {"lora": "factors", "norm_bound": 0.01}
    config = server_config(tmp_path, federation=federation, aggregation=aggregation)
    files = run_daemons(tmp_path, config, {"a": 12, "b": 5})
    assert_bits_of_one_process(tmp_path, config, files)


@pytest.mark.parametrize("variant", ["sflv2", "parallel", "async"])
def test_one_agent_over_grpc_has_the_loss_curve_of_central_lora(tmp_path: Path, variant: str) -> None:
    config = server_config(tmp_path, training={"warmup_steps": 2, "rounds": 3}, federation={"variant": variant})
    file = write_texts(tmp_path / "a.jsonl", "a", 20)
    with serving(config) as server:
        run_agent_here(agent_config(tmp_path, "a", server.address, file))
    examples = examples_in(file, config.training.max_tokens)
    base = splitfed.base_model_folder()
    losses, _ = central_run(base, examples, config.training, config.lora, client="a", seed=config.run.seed)
    assert step_losses(tmp_path / "a") == pytest.approx(losses, abs=TOLERANCE)


def test_agents_that_step_freely_end_with_one_adapter(tmp_path: Path) -> None:
    config = server_config(tmp_path, federation={"agents": 3, "variant": "async", "max_staleness": 2})
    run_daemons(tmp_path, config, {"a": 12, "b": 5, "c": 8})
    for name in "abc":
        losses = step_losses(tmp_path / name)
        assert losses[-1] < losses[0]
