from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from splitfed.errors import SplitPointError, WeightsError
from splitfed.models import load_bottom_and_top, load_trunk, segment_tensor_names
from tests.equivalence.tiny_models import tiny_model

logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put other tensors into the checkpoint, or take some out; names have dots, so changes spell them with ``__``."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loaded_segments_are_frozen_and_do_not_drop(folder: Path) -> None:
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    for segment in (bottom, load_trunk(folder, bottom_blocks=1, top_blocks=1), top):
        assert not any(parameter.requires_grad for parameter in segment.parameters())
        assert not any(module.training for module in segment.model.modules())


def test_a_folder_of_one_sides_tensors_is_enough_for_that_side(folder: Path) -> None:
    names = segment_tensor_names(folder, bottom_blocks=1, top_blocks=1)
    others = names["trunk"] - names["bottom"] - names["top"]
    rewrite(folder, **dict.fromkeys(others))
    load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    with pytest.raises(WeightsError, match=r"nothing for 'model\.layers\.1\..* and 17 more tensors"):
        load_trunk(folder, bottom_blocks=1, top_blocks=1)


def test_a_tensor_of_another_shape_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(4, 4))
    with pytest.raises(WeightsError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* has shape \[4, 4\]"):
        load_trunk(folder, bottom_blocks=1, top_blocks=1)
    load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)


def test_a_tied_tensor_may_be_stored_twice_if_it_is_the_same(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    embedding_VD = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lm_head__weight=embedding_VD.clone())
    bottom, top = load_bottom_and_top(tmp_path, bottom_blocks=1, top_blocks=1)
    assert bottom.model.get_input_embeddings().weight is top.model.get_output_embeddings().weight
    rewrite(tmp_path, lm_head__weight=embedding_VD + 1)
    with pytest.raises(WeightsError, match="set tie_word_embeddings to false"):
        load_bottom_and_top(tmp_path, bottom_blocks=1, top_blocks=1)


def test_a_tied_embedding_belongs_to_bottom_and_top(tmp_path: Path) -> None:
    tiny_model("gpt2", tie_word_embeddings=True).save_pretrained(tmp_path)
    names = segment_tensor_names(tmp_path, bottom_blocks=1, top_blocks=1)
    assert "transformer.wte.weight" in names["bottom"] & names["top"]
    assert "transformer.wpe.weight" in names["bottom"] - names["top"]
    assert "transformer.ln_f.weight" in names["top"] - names["bottom"]


def test_a_split_point_out_of_range_is_refused_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SplitPointError):
        load_trunk(folder, bottom_blocks=2, top_blocks=2)
