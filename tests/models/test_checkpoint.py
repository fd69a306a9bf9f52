import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitfed.errors import WeightsError
from splitfed.models import Checkpoint, TensorIdentity
from splitfed.models import checkpoint as checkpoint_module

TENSORS = {
    "matrix": torch.arange(60, dtype=torch.float32).reshape(10, 6),
    "vector": torch.arange(7, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "integers": torch.arange(4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("piece_bytes", [1, 50, 2**25])
def test_tensors_are_read_as_they_are_whatever_the_pieces(
    folder: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_PIECE_BYTES", piece_bytes)
    checkpoint = Checkpoint(folder)
    assert checkpoint.names == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        content = tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert checkpoint.identity(name).sha256 == hashlib.sha256(content).hexdigest()


def test_a_tensor_is_converted_while_it_is_read(folder: Path) -> None:
    read = Checkpoint(folder).read("matrix", dtype=torch.bfloat16)
    assert torch.equal(read, TENSORS["matrix"].to(torch.bfloat16))


def test_what_is_read_stays_when_the_file_changes(folder: Path) -> None:
    read = Checkpoint(folder).read("matrix")
    save_file({"matrix": torch.zeros(10, 6)}, folder / "model.safetensors")
    assert torch.equal(read, TENSORS["matrix"])


def test_an_identity_has_dtype_and_shape_and_does_not_depend_on_sharding(folder: Path, tmp_path: Path) -> None:
    whole = Checkpoint(folder).identity("vector")
    assert (whole.dtype, whole.shape) == ("BF16", (7,))
    (tmp_path / "shards").mkdir()
    save_file({"vector": TENSORS["vector"]}, tmp_path / "shards" / "a.safetensors")
    shard(tmp_path / "shards", {"vector": "a.safetensors"})
    assert Checkpoint(tmp_path / "shards").identity("vector") == whole
    assert whole != TensorIdentity(dtype="BF16", shape=(7,), sha256="0" * 64)


def test_a_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_damaged_file_says_which(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-20])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        Checkpoint(folder)


def test_a_name_that_is_not_there_says_so(folder: Path) -> None:
    with pytest.raises(WeightsError, match="no tensor 'other'"):
        Checkpoint(folder).read("other")


def test_a_missing_shard_says_which(folder: Path) -> None:
    shard(folder, {"matrix": "model-00001-of-00002.safetensors"})
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors is missing"):
        Checkpoint(folder).read("matrix")


def test_a_shard_without_the_tensor_says_which(folder: Path) -> None:
    shard(folder, {"other": "model.safetensors"})
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        Checkpoint(folder).read("other")


def test_an_index_cannot_name_files_outside_the_folder(folder: Path) -> None:
    shard(folder, {"matrix": "../model.safetensors"})
    with pytest.raises(WeightsError, match="outside the folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map"'])
def test_a_damaged_index_says_so(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="is not one of safetensors shards"):
        Checkpoint(folder)
