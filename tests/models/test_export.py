import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitfed.models import LoraSettings, adapter_shapes, check_adapter, export_adapter, initial_adapter
from tests.equivalence.tiny_models import tiny_config, tiny_model

LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "v_proj"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_export_needs_no_weights_of_the_base_and_keeps_every_bit(base: Path, tmp_path: Path) -> None:
    state = initial_adapter(tiny_model("llama"), LORA, seed=0)
    export_adapter(tmp_path / "new" / "adapter", state, LORA, base_folder=base, base_name="org/base")
    stored = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{key}" for key in state}
    assert all(torch.equal(stored[f"base_model.model.{key}"], tensor) for key, tensor in state.items())


def test_the_exports_configuration_says_what_was_trained(base: Path, tmp_path: Path) -> None:
    state = initial_adapter(tiny_model("llama"), LORA, seed=0)
    export_adapter(tmp_path / "adapter", state, LORA, base_folder=base, base_name="org/base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8.0, 0.1)
    assert (settings["peft_type"], settings["task_type"], settings["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert set(settings["target_modules"]) == {"q_proj", "v_proj"}


def test_a_state_that_is_not_the_models_adapter_is_refused_and_nothing_written(base: Path, tmp_path: Path) -> None:
    state = initial_adapter(tiny_model("llama"), LORA, seed=0)
    del state["model.layers.3.self_attn.v_proj.lora_B.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.3\.self_attn\.v_proj\.lora_B\.weight'"):
        export_adapter(tmp_path / "adapter", state, LORA, base_folder=base, base_name="org/base")
    assert not (tmp_path / "adapter").exists()


def test_layers_with_a_rank_of_their_own_are_named_in_full_and_others_not_at_all(base: Path, tmp_path: Path) -> None:
    lora = replace(LORA, ranks={"model.layers.1.self_attn.q_proj": 16})
    state = initial_adapter(tiny_model("llama"), lora, seed=0)
    export_adapter(tmp_path / "adapter", state, LORA, base_folder=base, base_name="org/base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert settings["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 16}
    assert settings["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 32.0}


def test_an_adapter_of_one_other_rank_needs_no_pattern(base: Path, tmp_path: Path) -> None:
    state = initial_adapter(tiny_model("llama"), LORA.at_rank(6), seed=0)
    export_adapter(tmp_path / "adapter", state, LORA, base_folder=base, base_name="org/base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 12.0)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}


def test_a_received_adapter_has_exactly_the_expected_tensors() -> None:
    shapes = adapter_shapes(tiny_model("llama"), LORA)
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    check_adapter(state, shapes)
    with pytest.raises(ValueError, match="which no adapted layer takes"):
        check_adapter({**state, "model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, shapes)
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"has shape \[4, 31\], not \[4, 32\]"):
        check_adapter({**state, key: torch.zeros(4, 31)}, shapes)
    del state[key]
    with pytest.raises(ValueError, match="has no tensor"):
        check_adapter(state, shapes)
