import pytest
import torch

from splitfed.models import partition
from splitfed.models.cut import Absent, adaptable_layers, adaptable_names, block_list_name
from tests.equivalence.tiny_models import tiny_model


def test_per_block_entries_of_the_configuration_are_cut_with_the_blocks() -> None:
    model = tiny_model("qwen2")
    kinds = model.config.layer_types
    for segment in partition(model, bottom_blocks=1, top_blocks=1):
        assert segment.config.layer_types == kinds[segment.blocks.start : segment.blocks.stop]
        assert segment.config.num_hidden_layers == len(segment.blocks)


def test_positions_of_attention_blocks_among_others_move_with_the_cut() -> None:
    bamba = partition(tiny_model("bamba"), bottom_blocks=1, top_blocks=1)
    assert [segment.config.layers_block_type for segment in bamba] == [
        ["linear_attention"],
        ["full_attention", "linear_attention"],
        ["linear_attention"],
    ]
    jamba = partition(tiny_model("jamba"), bottom_blocks=1, top_blocks=1)
    assert [segment.config.layers_block_type for segment in jamba] == [["mamba"], ["attention", "mamba"], ["mamba"]]


def test_cache_indices_are_the_segments_own_and_scales_the_whole_models() -> None:
    model = tiny_model("gpt2")
    trunk = partition(model, bottom_blocks=2, top_blocks=1).trunk
    (block,) = trunk.model.transformer.h
    assert block.attn.layer_idx == 0
    assert block.attn.scaling == model.transformer.h[2].attn.scaling != model.transformer.h[0].attn.scaling
    assert model.transformer.h[2].attn.layer_idx == 2


def test_a_segment_without_embeddings_refuses_tokens() -> None:
    trunk = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).trunk
    assert isinstance(trunk.model.get_input_embeddings(), Absent)
    with pytest.raises(RuntimeError, match="holds no embeddings"):
        trunk.model(torch.zeros(1, 3, dtype=torch.long))


def test_routers_of_experts_are_not_adapted() -> None:
    model = tiny_model("phimoe")
    assert adaptable_names(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(name.startswith(f"{block_list_name(model)}.") for name in adaptable_layers(model))
