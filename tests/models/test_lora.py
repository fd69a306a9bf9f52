from dataclasses import replace

import pytest
import torch

from splitfed.models import LoraSettings, adapter_shapes, partition
from splitfed.models.lora import peft_config
from tests.equivalence.tiny_models import tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)


def test_the_segments_adapters_together_are_the_whole_models() -> None:
    whole = tiny_model("llama")
    parts = partition(whole, bottom_blocks=1, top_blocks=1)
    together = {key: shape for segment in parts for key, shape in adapter_shapes(segment, LORA).items()}
    assert together == adapter_shapes(whole, LORA)


def test_peft_is_told_short_names_unless_they_would_match_more() -> None:
    assert peft_config(tiny_model("llama"), replace(LORA, targets=("q_proj",))).target_modules == {"q_proj"}
    model = tiny_model("llama")
    model.q_proj = torch.nn.Linear(2, 2)
    assert peft_config(model, replace(LORA, targets=("q_proj",))).target_modules == {
        f"model.layers.{block}.self_attn.q_proj" for block in range(4)
    }


def test_another_rank_has_the_same_scale() -> None:
    lora = LoraSettings(rank=6, alpha=15.0, dropout=0.1, targets=("q_proj",), ranks={"model.layers.1.q_proj": 3})
    other = lora.at_rank(16)
    assert (other.rank, other.alpha, other.ranks) == (16, 40.0, {})
    assert (other.dropout, other.targets) == (0.1, ("q_proj",))


def test_layers_with_a_rank_of_their_own_have_it_in_every_segment() -> None:
    lora = replace(LORA, ranks={"model.layers.0.mlp.up_proj": 3, "model.layers.2.mlp.up_proj": 9})
    whole = tiny_model("llama")
    shapes = adapter_shapes(whole, lora)
    assert shapes["model.layers.0.mlp.up_proj.lora_A.weight"] == (3, 32)
    assert shapes["model.layers.1.mlp.up_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.2.mlp.up_proj.lora_B.weight"] == (48, 9)
    parts = partition(whole, bottom_blocks=1, top_blocks=1)
    assert {key: shape for segment in parts for key, shape in adapter_shapes(segment, lora).items()} == shapes


def test_a_rank_for_what_is_not_adapted_and_a_rank_of_nothing_are_refused() -> None:
    trunk = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).trunk
    for lora in (
        replace(LORA, ranks={"model.layers.2.mlp.up_prj": 3}),
        replace(LORA, ranks={"model.layers.2.mlp.up_proj": 0}),
        replace(LORA, targets=("q_proj",), ranks={"model.layers.2.mlp.up_proj": 3}),
    ):
        with pytest.raises(ValueError, match=r"'model\.layers\.2\.mlp\.up_pro?j' cannot have rank"):
            adapter_shapes(trunk, lora)


def test_settings_can_be_a_key() -> None:
    assert len({LORA, replace(LORA, ranks={"h.0.attn.c_attn": 3}), replace(LORA)}) == 2
