"""LoRA on segments = LoRA through stock PEFT on the whole model: the export's logits, and the gradients of a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from splitfed.models import (
    LoraSettings,
    Segment,
    adapter_parameters,
    adapter_shapes,
    adapter_state,
    add_adapter,
    export_adapter,
    initial_adapter,
    load_adapter_state,
    load_bottom_and_top,
    load_residual,
    load_trunk,
    partition,
    trunk_slice,
)
from splitfed.models.families import FAMILIES
from splitfed.models.lora import peft_config
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter away from its start: every tensor matters."""
    generator = torch.Generator().manual_seed(2)
    return {
        key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        for key, tensor in state.items()
    }


def loaded_with_adapter(folder: Path, lora: LoraSettings) -> tuple[Segment, Segment, Segment]:
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    trunk = load_trunk(folder, bottom_blocks=1, top_blocks=1)
    for segment in (bottom, trunk, top):
        add_adapter(segment, lora, seed=5)
    return bottom, trunk, top


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_peft_loads_the_export_and_gives_the_split_runs_logits(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    bottom, trunk, top = segments = loaded_with_adapter(tmp_path / "base", LORA)
    state = trained({key: tensor for segment in segments for key, tensor in adapter_state(segment).items()})
    for segment in segments:
        load_adapter_state(segment, state)
    export_adapter(tmp_path / "adapter", state, LORA, base_folder=tmp_path / "base", base_name="base")

    input_ids_BT = torch.randint(3, VOCABULARY, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    without_BTV = base(input_ids_BT).logits
    expected_BTV = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids_BT).logits
    assert (expected_BTV - without_BTV).abs().max() > 0.01 * without_BTV.abs().max()
    assert_equal_to_rounding(top(trunk(bottom(input_ids_BT))).logits, expected_BTV, "logits")


def ranks_by_block(state: dict[str, Tensor], ranks: list[int]) -> dict[str, int]:
    """Give the layers of every block a rank, block after block, the last rank to all blocks that follow."""
    layers = {key.rpartition(".lora_")[0] for key in state}
    blocks = {layer: int(next(part for part in layer.split(".") if part.isdigit())) for layer in layers}
    return {layer: ranks[min(block, len(ranks) - 1)] for layer, block in blocks.items()}


@pytest.mark.parametrize("n_blocks", [4, 12])  # 12: the names of blocks 1 and 11, 0 and 10 begin alike
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_peft_loads_an_export_whose_layers_have_different_ranks(family: str, n_blocks: int, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=n_blocks)
    model.save_pretrained(tmp_path / "base")
    lora = replace(LORA, ranks=ranks_by_block(initial_adapter(model, LORA, seed=5), [4, 8, 16, 4, 6, 3, 5, 4]))
    bottom, trunk, top = segments = loaded_with_adapter(tmp_path / "base", lora)
    state = trained({key: tensor for segment in segments for key, tensor in adapter_state(segment).items()})
    for segment in segments:
        load_adapter_state(segment, state)
    export_adapter(tmp_path / "adapter", state, LORA, base_folder=tmp_path / "base", base_name="base")

    input_ids_BT = torch.randint(3, VOCABULARY, (2, 9))
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    loaded = {name: tensor for name, tensor in whole.state_dict().items() if ".lora_" in name}
    assert {len(tensor) for name, tensor in loaded.items() if ".lora_A." in name} >= {4, 8, 16}
    for key, tensor in state.items():
        assert torch.equal(loaded[f"base_model.model.{key.removesuffix('weight')}default.weight"], tensor), key
    scales = {layer.scaling["default"] for layer in whole.modules() if isinstance(layer, BaseTunerLayer)}
    assert scales == {LORA.alpha / LORA.rank}
    assert_equal_to_rounding(top(trunk(bottom(input_ids_BT))).logits, whole(input_ids_BT).logits, "logits")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_adapter_and_residual_are_one_export_of_both_ranks(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    residual = trained({key: torch.zeros(shape) for key, shape in adapter_shapes(model, LORA.at_rank(3)).items()})
    state = trained(initial_adapter(model, LORA, seed=5))
    bottom, trunk, top = segments = partition(model, bottom_blocks=1, top_blocks=1)
    for segment in segments:
        add_adapter(segment, LORA, seed=5, residual_rank=3)
        load_adapter_state(segment, state)
        load_residual(segment, residual)
    both = {key: torch.cat([state[key], residual[key]], dim=0 if "lora_A" in key else 1) for key in state}
    export_adapter(tmp_path / "adapter", both, LORA, base_folder=tmp_path / "base", base_name="base")

    input_ids_BT = torch.randint(3, VOCABULARY, (2, 9))
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    logits_BTV = top(trunk(bottom(input_ids_BT))).logits
    assert_equal_to_rounding(logits_BTV, whole(input_ids_BT).logits, "logits")
    for segment in segments:
        load_residual(segment, {})
    without_BTV = top(trunk(bottom(input_ids_BT))).logits
    assert (logits_BTV - without_BTV).abs().max() > 0.01 * without_BTV.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trunk_runs_a_clients_adapter_of_another_rank_in_place_of_its_own(family: str) -> None:
    """As a trunk trainer does it, on a slice: the scale is the run's, so that any rank will do."""
    whole = partition(tiny_model(family), bottom_blocks=0, top_blocks=0).trunk
    add_adapter(whole, LORA, seed=5)
    part = trunk_slice(whole, range(1, 3))
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    hidden_BTD = torch.randn(2, 5, 32)
    for rank in (2, 4, 16):
        alone = partition(tiny_model(family), bottom_blocks=1, top_blocks=1).trunk
        add_adapter(alone, LORA.at_rank(rank), seed=5)
        load_adapter_state(alone, trained(adapter_state(alone)))
        expected_BTD = alone(hidden_BTD)
        expected_BTD.square().sum().backward()
        clients = {key: nn.Parameter(tensor) for key, tensor in adapter_state(alone).items()}
        placed = {names[id(parameter)]: clients[key] for key, parameter in adapter_parameters(part).items()}
        output_BTD = functional_call(part, placed, (hidden_BTD,))
        output_BTD.square().sum().backward()
        assert torch.equal(output_BTD, expected_BTD)
        for key, parameter in adapter_parameters(alone).items():
            assert torch.equal(clients[key].grad, parameter.grad), f"{key}, rank {rank}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_central_step_with_peft_has_the_split_steps_gradients(family: str) -> None:
    input_ids_BT = torch.randint(3, VOCABULARY, (2, 9))
    whole = tiny_model(family)
    start = trained(initial_adapter(whole, LORA, seed=5))
    parts = partition(whole, bottom_blocks=1, top_blocks=1)
    for segment in parts:
        add_adapter(segment, LORA, seed=5)
        load_adapter_state(segment, start)
    parts.top(parts.trunk(parts.bottom(input_ids_BT)), labels=input_ids_BT).loss.backward()
    gradients = {key: p.grad for segment in parts for key, p in adapter_parameters(segment).items()}

    central = get_peft_model(tiny_model(family), peft_config(whole, LORA))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in central.named_parameters()
        if parameter.requires_grad
    }
    assert parameters.keys() == start.keys()
    for key, parameter in parameters.items():
        parameter.data.copy_(start[key])
    central(input_ids=input_ids_BT, labels=input_ids_BT).loss.backward()
    for key, parameter in parameters.items():
        assert_equal_to_rounding(gradients[key], parameter.grad, key)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_default_targets_are_those_of_pefts_all_linear(family: str) -> None:
    whole = tiny_model(family)
    start = initial_adapter(whole, LORA, seed=0)
    everything = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    central = get_peft_model(tiny_model(family), everything)
    names = {name for name, parameter in central.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.").replace(".default.", ".") for name in names} == start.keys()


@pytest.mark.parametrize(("bottom_blocks", "top_blocks"), [(0, 0), (1, 1), (0, 3), (2, 1)])
def test_every_cut_starts_from_the_central_baselines_numbers(bottom_blocks: int, top_blocks: int) -> None:
    whole = tiny_model("llama")
    start = initial_adapter(whole, LORA, seed=5)
    parts = partition(whole, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    state: dict[str, Tensor] = {}
    for segment in parts:
        add_adapter(segment, LORA, seed=5)
        state |= adapter_state(segment)
    assert state.keys() == start.keys()
    assert all(torch.equal(state[key], start[key]) for key in start)
