import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from splitfed.errors import WeightsError
from splitfed.models import canonical_config, tensor_hashes
from tests.equivalence.tiny_models import tiny_config, tiny_model


def written(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_config("llama").save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "5.0.0"},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"use_cache": False},
        {"architectures": ["LlamaForCausalLM"]},
        {"initializer_range": LlamaConfig().initializer_range},
    ],
)
def test_what_changes_no_logit_does_not_count(tmp_path: Path, changes: dict[str, object]) -> None:
    assert canonical_config(written(tmp_path / "b", **changes)) == canonical_config(written(tmp_path / "a"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-5},
        {"num_hidden_layers": 5},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    ],
)
def test_what_changes_logits_counts(tmp_path: Path, changes: dict[str, object]) -> None:
    assert canonical_config(written(tmp_path / "b", **changes)) != canonical_config(written(tmp_path / "a"))


def test_tensors_are_hashed_alike_whatever_the_sharding(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    names = ["model.norm.weight", "model.layers.3.mlp.up_proj.weight"]
    assert tensor_hashes(tmp_path / "one", names) == tensor_hashes(tmp_path / "many", names)
    assert list(tensor_hashes(tmp_path / "one", names)) == sorted(names)


def test_a_tensor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"'model\.other'"):
        tensor_hashes(tmp_path, ["model.other"])
