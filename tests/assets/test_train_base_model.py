"""The training script, and the model that it made."""

import hashlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfed.assets import base_model_folder
from splitfed.assets.docstrings import docstrings, is_held_out, source_files, standard_library

UNIFORM_LOSS = 7.6246  # ln 2048
REPEATED_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start_training(folder: Path, hash_seed: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "splitfed.assets.train_base_model", "--output", str(folder), "--steps", "3"]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_of_the_script_give_the_same_files(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = [start_training(folder, hash_seed) for hash_seed, folder in enumerate(folders)]
    for run in runs:
        output, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
        assert "held-out loss" in output
    for name in REPEATED_FILES:
        assert sha256(folders[0] / name) == sha256(folders[1] / name), name
    assert sha256(folders[0] / "model.safetensors") != sha256(base_model_folder() / "model.safetensors")
    assert "3 steps" in (folders[0] / "README.md").read_text(encoding="utf-8")


def test_the_shipped_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in base_model_folder().iterdir()}
    assert {*REPEATED_FILES, "README.md"} == set(sizes)
    assert sum(sizes.values()) <= 5_000_000


def test_the_shipped_model_has_the_promised_shape() -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model_folder(), local_files_only=True)
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers == 6
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_shipped_tokenizer_gives_back_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder(), local_files_only=True)
    text = "Return a list.\n\n  naïve café, 東京, 🙂\t'x' ."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == 2048


def test_loading_and_generating_with_the_shipped_model_gives_no_warning(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model_folder(), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder(), local_files_only=True)
    prompt = tokenizer("Return the", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0], skip_special_tokens=True)
    assert text.startswith("Return the")
    assert len(text) > len("Return the")
    captured = capfd.readouterr()
    assert "warn" not in (captured.out + captured.err).lower()


@torch.no_grad()
def test_the_shipped_model_predicts_docstrings_it_was_never_trained_on() -> None:
    library = standard_library()
    held_out = [path for path in source_files(library) if is_held_out(path, library)]
    texts = list(islice((text for path in held_out for text in docstrings(path) if len(text) > 200), 32))
    model = AutoModelForCausalLM.from_pretrained(base_model_folder(), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder(), local_files_only=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss.item()
    assert loss < UNIFORM_LOSS - 3
