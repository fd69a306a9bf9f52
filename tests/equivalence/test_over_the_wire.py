"""What the daemons compute over gRPC = what one process computes = central training."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import splitfed
from splitfed.config import CodecSection
from tests.equivalence.central import central_run
from tests.equivalence.in_process import examples_in, simulate_files
from tests.service.conftest import OPEN, server_config, write_texts
from tests.service.local import agent_config, run_agent_here, serving, start_agent

TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats."""


def step_losses(state_directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (state_directory / "metrics.jsonl").read_text().splitlines()]
    return [loss for line in lines for loss in line["step_losses"]]


@pytest.mark.parametrize("training", [{}, {"micro_batch_size": 2, "max_in_flight": 2}])
def test_one_agent_over_grpc_has_the_loss_curve_of_central_lora(tmp_path: Path, training: dict[str, int]) -> None:
    config = server_config(tmp_path, training={"warmup_steps": 2, **training})
    file = write_texts(tmp_path / "a.jsonl", "a", 20)
    with serving(config) as server:
        run_agent_here(agent_config(tmp_path, "a", server.address, file))
    losses, _ = central_run(
        splitfed.base_model_folder(),
        examples_in(file, config.training.max_tokens),
        config.training,
        config.lora,
        client="a",
        seed=config.run.seed,
    )
    assert step_losses(tmp_path / "a") == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.parametrize("codecs", [OPEN, CodecSection(), CodecSection(smashed="bf16", trunk_output="fp16")])
def test_two_agents_over_grpc_get_the_bits_of_one_process(tmp_path: Path, codecs: CodecSection) -> None:
    config = server_config(
        tmp_path, codecs=codecs, training={"micro_batch_size": 2, "max_in_flight": 2}, federation={"agents": 2}
    )
    files = {name: write_texts(tmp_path / f"{name}.jsonl", name, rows) for name, rows in (("a", 12), ("b", 5))}
    with serving(config) as server:
        ended = [start_agent(agent_config(tmp_path, name, server.address, file)) for name, file in files.items()]
        for future in ended:
            future.result(120)
    exported = load_file(config.run.directory / "adapter" / "adapter_model.safetensors")
    simulated = simulate_files(files, config.training, seed=config.run.seed, lora=config.lora, codecs=codecs)
    for name, tensor in simulated.adapter.items():
        assert torch.equal(exported[f"base_model.model.{name}"], tensor), name
    assert step_losses(tmp_path / "a") == simulated.losses["a"]
