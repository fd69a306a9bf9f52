"""LoRA on segments = LoRA through stock PEFT on the whole model: the export's logits, and the gradients of a step."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitfed.models import (
    LoraSettings,
    Segment,
    adapter_parameters,
    adapter_state,
    add_adapter,
    export_adapter,
    initial_adapter,
    load_adapter_state,
    load_bottom_and_top,
    load_trunk,
    partition,
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
