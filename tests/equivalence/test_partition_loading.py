"""Segments loaded from a folder = the whole model, and no tensor of another side is opened."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from splitfed.models import Checkpoint, load_bottom_and_top, load_trunk, segment_tensor_names
from splitfed.models.families import FAMILIES
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

logging.disable_progress_bar()


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the checkpoint tensors that were read since."""
    names: set[str] = set()
    read = Checkpoint.read

    def recorded(self: Checkpoint, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        names.add(name)
        return read(self, name, dtype=dtype)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    return names


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_loaded_segments_give_the_whole_models_logits(family: str, tmp_path: Path, opened: set[str]) -> None:
    model = tiny_model(family)
    folder = saved(model, tmp_path)
    names = segment_tensor_names(folder, bottom_blocks=1, top_blocks=1)
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    assert opened == names["bottom"] | names["top"]
    opened.clear()
    trunk = load_trunk(folder, bottom_blocks=1, top_blocks=1)
    assert opened == names["trunk"]
    assert not names["trunk"] & (names["bottom"] | names["top"])
    assert set.union(*names.values()) == Checkpoint(folder).names

    buffers = dict(model.named_buffers())
    for segment in (bottom, trunk, top):
        for name, buffer in segment.model.named_buffers():
            assert torch.equal(buffer, buffers[segment.whole_model_name(name)]), name
    input_ids_BT = torch.randint(3, VOCABULARY, (2, 9))
    attention_mask_BT = torch.ones_like(input_ids_BT)
    attention_mask_BT[0, :3] = 0
    hidden_BTD = trunk(bottom(input_ids_BT, attention_mask_BT), attention_mask_BT)
    seen_BT = attention_mask_BT.bool()
    expected_BTV = model(input_ids_BT, attention_mask=attention_mask_BT).logits
    assert_equal_to_rounding(top(hidden_BTD, attention_mask_BT).logits[seen_BT], expected_BTV[seen_BT], "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "glm4_moe", "gpt_neo", "nemotron_h"])
def test_loaded_segments_hold_what_from_pretrained_holds_in_half_precision(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tiny_model(family), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1, dtype=dtype)
    for segment in (bottom, load_trunk(folder, bottom_blocks=1, top_blocks=1, dtype=dtype), top):
        for name, tensor in segment.model.state_dict().items():
            expected = whole[segment.whole_model_name(name)]
            assert tensor.dtype == expected.dtype, name
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sharded_checkpoint_loads_as_one_file_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    one = saved(model, tmp_path / "one")
    many = saved(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    expected = load_trunk(one, bottom_blocks=1, top_blocks=1).state_dict()
    for name, tensor in load_trunk(many, bottom_blocks=1, top_blocks=1).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_a_checkpoint_of_the_model_without_its_head_loads(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    folder = saved(model.base_model, tmp_path)
    assert not any(name.startswith(model.base_model_prefix) for name in Checkpoint(folder).names)
    expected = model.state_dict()
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    for segment in (bottom, load_trunk(folder, bottom_blocks=1, top_blocks=1), top):
        for name, tensor in segment.model.state_dict().items():
            assert torch.equal(tensor, expected[segment.whole_model_name(name)]), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_embedding_is_in_memory_once(family: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(family, tie_word_embeddings=True), tmp_path)
    bottom, top = load_bottom_and_top(folder, bottom_blocks=1, top_blocks=1)
    assert bottom.model.get_input_embeddings().weight is top.model.get_output_embeddings().weight
