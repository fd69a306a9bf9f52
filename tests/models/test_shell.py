import json
from pathlib import Path

import pytest

from splitfed.errors import UnsupportedFamily, WeightsError
from splitfed.models import load_shell
from tests.equivalence.tiny_models import tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path)
    return tmp_path


def configure(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def test_the_shell_takes_no_memory(folder: Path) -> None:
    assert all(tensor.is_meta for tensor in load_shell(folder).state_dict().values())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_damaged_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"configuration in .* cannot be read"):
        load_shell(folder)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_shell(tmp_path)


def test_another_family_is_refused_by_name(folder: Path) -> None:
    configure(folder, model_type="a_new_one")
    with pytest.raises(UnsupportedFamily, match="'a_new_one'"):
        load_shell(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(WeightsError, match="are quantised"):
        load_shell(folder)
