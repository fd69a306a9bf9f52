"""Whether a run fits its base model."""

from pathlib import Path

import pytest

from splitfed.config import LoraSection, ModelSection
from splitfed.errors import ConfigError, SplitPointError
from splitfed.training.fits import check_fit
from tests.equivalence.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    return tmp_path


def test_a_rank_as_large_as_the_largest_adapted_layer_fits_and_a_larger_one_does_not(folder: Path) -> None:
    layers = {name: layer for name, layer in tiny_model("llama").named_modules() if name.endswith("_proj")}
    most = max(min(layer.in_features, layer.out_features) for layer in layers.values())
    model = ModelSection(base=str(folder))
    check_fit(folder, model, LoraSection(rank=most), residual_rank=most)
    said = f"is {most + 1}, but an adapted layer of this base model has {most} inputs or outputs at most"
    with pytest.raises(ConfigError, match=rf"^\[lora\] rank {said}"):
        check_fit(folder, model, LoraSection(rank=most + 1))
    with pytest.raises(ConfigError, match=rf"^\[aggregation\] flora_rank {said}"):
        check_fit(folder, model, LoraSection(rank=most), residual_rank=most + 1)


@pytest.mark.parametrize(("bottom", "top", "fits"), [(0, 3, True), (1, 2, True), (2, 2, False), (0, 4, False)])
def test_the_trunk_keeps_a_block_for_an_agent_that_says_nothing(
    folder: Path, bottom: int, top: int, fits: bool
) -> None:
    model = ModelSection(
        base=str(folder), bottom_blocks=bottom, top_blocks=top, least_bottom_blocks=0, least_top_blocks=0
    )
    if fits:
        check_fit(folder, model, LoraSection(rank=2))
        return
    with pytest.raises(SplitPointError, match="so that the trunk keeps a block"):
        check_fit(folder, model, LoraSection(rank=2))
