import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from splitfed.errors import SplitPointError, UnsupportedFamily
from splitfed.models import Partition, partition
from tests.equivalence.tiny_models import N_BLOCKS, tiny_model


@pytest.fixture
def llama_parts() -> Partition:
    return partition(tiny_model("llama"), bottom_blocks=1, top_blocks=2)


@pytest.mark.parametrize(("bottom_blocks", "top_blocks"), [(-1, 0), (0, -1), (N_BLOCKS, 0), (0, N_BLOCKS), (2, 2)])
def test_a_split_point_that_leaves_no_trunk_is_refused_with_the_range(bottom_blocks: int, top_blocks: int) -> None:
    with pytest.raises(SplitPointError, match=r"sum at most 3") as caught:
        partition(tiny_model("llama"), bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    assert f"bottom_blocks={bottom_blocks} and top_blocks={top_blocks}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_family_that_is_not_proven_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.config.model_type = "wonder"
    with pytest.raises(UnsupportedFamily, match="'wonder'"):
        partition(model, bottom_blocks=1, top_blocks=1)


def test_a_loss_over_all_routers_is_refused() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    with pytest.raises(UnsupportedFamily, match="output_router_logits"):
        partition(model, bottom_blocks=1, top_blocks=1)
    parts = partition(tiny_model("mixtral"), bottom_blocks=1, top_blocks=1)
    with pytest.raises(ValueError, match="output_router_logits"):
        parts.top(torch.zeros(1, 3, 32), output_router_logits=True)


def test_settings_for_single_blocks_are_refused() -> None:
    model = tiny_model("llama")
    model.config.per_layer_config = {1: {"num_key_value_heads": 4}}
    with pytest.raises(UnsupportedFamily, match="per_layer_config"):
        partition(model, bottom_blocks=1, top_blocks=1)


def test_a_peft_model_is_refused_with_the_way_out() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"get_base_model\(\)"):
        partition(model, bottom_blocks=1, top_blocks=1)


def test_segments_know_their_blocks_and_are_three_in_order(llama_parts: Partition) -> None:
    assert [(segment.kind, segment.blocks) for segment in llama_parts] == [
        ("bottom", range(1)),
        ("trunk", range(1, 2)),
        ("top", range(2, 4)),
    ]
    assert (llama_parts.bottom_blocks, llama_parts.top_blocks) == (1, 2)


def test_the_given_model_keeps_its_modules_and_its_configuration() -> None:
    model = tiny_model("qwen2")
    modules = dict(model.named_modules())
    settings = copy.deepcopy(model.config.to_dict())
    parts = partition(model, bottom_blocks=1, top_blocks=2)
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == settings
    shared = {id(module) for module in modules.values()}
    assert not any(id(module) in shared for segment in parts for module in segment.modules())


def test_a_change_of_the_whole_models_weights_is_a_change_of_the_segments() -> None:
    model = tiny_model("llama")
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    hidden_BTD = torch.randn(1, 4, 32)
    before_BTD = parts.trunk(hidden_BTD)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(parts.trunk(hidden_BTD), before_BTD)
