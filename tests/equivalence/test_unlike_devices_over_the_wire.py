"""Agents with cuts and ranks of their own over gRPC give the bits of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.config import ServerConfig
from splitfed.errors import JoinRefused
from splitfed.training.simulate import simulate
from tests.equivalence.in_process import examples_in
from tests.equivalence.test_over_the_wire import step_losses
from tests.service.conftest import server_config, write_texts
from tests.service.local import agent_config, run_agent_here, serving, start_agent

CUTS = {"a": (1, 1), "b": (2, 1), "c": (0, 2)}
RANKS = {"a": 2, "b": 4, "c": 4}
ROWS = {"a": 12, "b": 5, "c": 8}


def unlike_run(folder: Path, **federation: Any) -> ServerConfig:
    return server_config(
        folder,
        model={"least_bottom_blocks": 0},
        lora={"least_rank": 2},
        federation={"agents": 3, **federation},
        aggregation={},
    )


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "parallel"])
def test_unlike_agents_over_grpc_get_the_bits_of_one_process(tmp_path: Path, variant: str) -> None:
    config = unlike_run(tmp_path, variant=variant)
    files = {name: write_texts(tmp_path / f"{name}.jsonl", name, rows) for name, rows in ROWS.items()}
    own = {name: {"bottom_blocks": CUTS[name][0], "top_blocks": CUTS[name][1], "rank": RANKS[name]} for name in files}
    with serving(config) as server:
        ended = [
            start_agent(agent_config(tmp_path, name, server.address, file, **own[name])) for name, file in files.items()
        ]
        for future in ended:
            future.result(240)
    base = splitfed.base_model_folder()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    simulated = simulate(
        {name: splitfed.partition(model, bottom_blocks=cut[0], top_blocks=cut[1]) for name, cut in CUTS.items()},
        AutoTokenizer.from_pretrained(base),
        {name: examples_in(file, config.training.max_tokens) for name, file in files.items()},
        training=config.training,
        lora=config.lora,
        codecs=config.codecs,
        federation=config.federation,
        trunk=splitfed.partition(model, bottom_blocks=0, top_blocks=1).trunk,
        ranks=RANKS,
        seed=config.run.seed,
    )
    for name in files:
        assert step_losses(tmp_path / name) == simulated.losses[name], name
    folder = config.run.directory / "adapter"
    exported = load_file(folder / "adapter_model.safetensors")
    assert exported.keys() == {f"base_model.model.{name}" for name in simulated.adapter}
    for name, tensor in simulated.adapter.items():
        assert torch.equal(exported[f"base_model.model.{name}"], tensor), name
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.mark.parametrize("variant", ["sflv1", "parallel"])
def test_a_personal_top_never_leaves_its_agent(tmp_path: Path, variant: str) -> None:
    config = server_config(tmp_path, federation={"agents": 2, "variant": variant})
    files = {name: write_texts(tmp_path / f"{name}.jsonl", name, rows) for name, rows in (("a", 12), ("b", 5))}
    with serving(config) as server:
        ended = [
            start_agent(agent_config(tmp_path, name, server.address, file, personal=["top"]))
            for name, file in files.items()
        ]
        for future in ended:
            future.result(240)
    base = splitfed.base_model_folder()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    simulated = simulate(
        splitfed.partition(model, bottom_blocks=1, top_blocks=1),
        AutoTokenizer.from_pretrained(base),
        {name: examples_in(file, config.training.max_tokens) for name, file in files.items()},
        training=config.training,
        lora=config.lora,
        codecs=config.codecs,
        federation=config.federation,
        personal={"top"},
        seed=config.run.seed,
    )
    exported = load_file(config.run.directory / "adapter" / "adapter_model.safetensors")
    for name in files:
        assert step_losses(tmp_path / name) == simulated.losses[name], name
    for name, tensor in simulated.adapter.items():
        assert torch.equal(exported[f"base_model.model.{name}"], tensor), name


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"bottom_blocks": 0},
            "A bottom of 0 and a top of 1 blocks do not fit this run, whose server runs",
        ),
        ({"bottom_blocks": 40}, "A bottom of 40 and a top of 1 blocks do not fit this run"),
        ({"rank": 2}, r"\[agent\] rank is 2, but the run 'small' has rank 4 for all"),
    ],
    ids=str,
)
def test_what_a_run_does_not_allow_is_refused(tmp_path: Path, own: dict[str, Any], said: str) -> None:
    config = server_config(tmp_path)
    file = write_texts(tmp_path / "a.jsonl", "a", 5)
    with serving(config) as server, pytest.raises(JoinRefused, match=said):
        run_agent_here(agent_config(tmp_path, "a", server.address, file, **own))
