from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from splitfed.errors import WeightsError
from splitfed.models import Checkpoint, load_trunk
from splitfed.models.conversion import recipes
from tests.equivalence.tiny_models import tiny_model

logging.disable_progress_bar()

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
STORED = "model.layers.1.block_sparse_moe.experts.{expert}.{half}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("mixtral").save_pretrained(tmp_path)
    return tmp_path


def test_experts_stored_one_by_one_become_one_tensor(folder: Path) -> None:
    model = tiny_model("mixtral")
    checkpoint = Checkpoint(folder)
    (recipe,) = [recipe for recipe in recipes(model, checkpoint.names) if EXPERTS in recipe.targets]
    assert {name for name, _ in recipe.sources} == {
        STORED.format(expert=expert, half=half) for expert in range(4) for half in ("w1", "w3")
    }
    made = recipe.make(checkpoint, model, dtype=torch.float32)
    assert torch.equal(made[EXPERTS], model.get_parameter(EXPERTS))


def test_names_that_mean_nothing_to_the_model_make_nothing_of_it() -> None:
    model = tiny_model("llama")
    (recipe,) = recipes(model, ["rotary.inv_freq"])
    assert recipe.targets == ("rotary.inv_freq",)
    assert recipe.targets[0] not in model.state_dict()


@pytest.mark.parametrize("half", ["w1", "w3"])
def test_a_missing_expert_is_refused(folder: Path, half: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[STORED.format(expert=2, half=half)]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_trunk(folder, bottom_blocks=1, top_blocks=1)
