import pytest
import torch

from splitfed.errors import SplitPointError
from splitfed.models import Trunk, partition, trunk_slice
from tests.equivalence.tiny_models import tiny_model


@pytest.fixture
def trunk() -> Trunk:
    return partition(tiny_model("llama"), bottom_blocks=1, top_blocks=0).trunk


@pytest.mark.parametrize("blocks", [range(2, 2), range(3, 1), range(3), range(1, 5), range(1, 4, 2), range(3, 0, -1)])
def test_blocks_that_are_no_slice_are_refused_with_the_trunks(trunk: Trunk, blocks: range) -> None:
    with pytest.raises(SplitPointError, match="no slice of a trunk of blocks 1 to 3"):
        trunk_slice(trunk, blocks)


def test_a_slice_is_a_trunk_that_knows_its_blocks_and_names(trunk: Trunk) -> None:
    part = trunk_slice(trunk, range(2, 4))
    assert (part.kind, part.blocks, part.config.num_hidden_layers) == ("trunk", range(2, 4), 2)
    assert part.whole_model_name("model.layers.0.mlp.up_proj.weight") == "model.layers.2.mlp.up_proj.weight"
    assert part.adaptable_names == trunk.adaptable_names


def test_the_trunk_keeps_its_modules_and_its_output(trunk: Trunk) -> None:
    hidden_BTD = torch.randn(1, 4, 32)
    before_BTD = trunk(hidden_BTD)
    modules, settings = dict(trunk.named_modules()), trunk.config.to_dict()
    part = trunk_slice(trunk, range(2, 3)).train()
    assert dict(trunk.named_modules()) == modules
    assert trunk.config.to_dict() == settings
    assert not {id(module) for module in modules.values()} & {id(module) for module in part.modules()}
    assert not trunk.training
    assert torch.equal(trunk(hidden_BTD), before_BTD)


def test_a_slice_that_is_moved_to_another_type_takes_the_trunk_with_it(trunk: Trunk) -> None:
    part = trunk_slice(trunk, range(2, 3))
    part.to(torch.bfloat16)
    assert trunk.model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
