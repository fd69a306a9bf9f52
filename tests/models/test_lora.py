from dataclasses import replace

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
