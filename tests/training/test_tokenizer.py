"""Opening a tokenizer that a server may have sent."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import splitfed
from splitfed.errors import WeightsError
from splitfed.training.tokenizer import open_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(splitfed.base_model_folder(), tmp_path / "base")
    return tmp_path / "base"


def test_the_embedded_models_tokenizer_opens(base: Path) -> None:
    tokenizer = open_tokenizer(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer("the statement")["input_ids"], skip_special_tokens=True) == "the statement"


def remove(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove,
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text("no JSON"),
        lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": []}'),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged_is_named(base: Path, damage: Callable[[Path], object]) -> None:
    damage(base)
    with pytest.raises(WeightsError, match=f"tokenizer in {base} cannot be used"):
        open_tokenizer(base)


def test_code_that_a_server_names_is_neither_run_nor_asked_about(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*prompt: object) -> str:
        pytest.fail(f"the user was asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)
    classes = ["evil/repository--code.Tokenizer", "evil/repository--code.Tokenizer"]
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": classes}})
    )
    with pytest.raises(WeightsError, match="code of its own"):
        open_tokenizer(base)
