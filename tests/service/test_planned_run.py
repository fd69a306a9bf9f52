"""What splitfed plan chooses, run for real on a link of the planned rate and latency, keeps what it promised."""

from pathlib import Path

import pytest
import torch
from planned_runs import run_plan, splitfed
from shapes import write_model, write_words
from transformers import LlamaConfig

WITHIN = 0.25
"""The stated margin of step time and peak memory; bytes and epsilon are known beforehand."""
TRAINING = {"rounds": 2, "local_steps": 6, "batch_size": 4, "max_tokens": 32}
ROWS = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a slow link brings to an agent in a few seconds."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=1000, eos_token_id=1, pad_token_id=0, **shape)
    return write_model(tmp_path_factory.mktemp("base"), config, torch.float32)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this machine can do, with one thread."""
    file = tmp_path_factory.mktemp("device") / "profile.toml"
    splitfed("profile", "--threads", "1", "--output", str(file))
    return file


@pytest.mark.parametrize(
    ("options", "link"),
    [
        (["--max-step", "1500ms"], "2mbit,100ms"),
        (["--max-memory", "1GB", "--max-bytes", "150kB", "--prefer", "memory"], "3mbit,150ms"),
        (["--epsilon", "3e4", "--codecs", "bf16"], "4mbit,150ms"),
    ],
    ids=["time", "memory and bytes", "epsilon"],
)
def test_a_plan_keeps_its_promises(
    tmp_path: Path, base: Path, profile: Path, options: list[str], link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = write_words(tmp_path / "words.jsonl", rows=ROWS, tokens=TRAINING["max_tokens"] - 2, vocabulary=1000)
    outcome = run_plan(tmp_path / "run", base, words, options, link=link, training=TRAINING, rows=ROWS, profile=profile)
    ratios = outcome.ratios()
    assert ratios.pop("up_bytes") == pytest.approx(1, abs=0.01)
    assert ratios.pop("down_bytes") == pytest.approx(1, abs=0.01)
    assert 1 <= ratios.pop("epsilon") < 1.001  # a ledger counts what was released, which is at most what was planned
    assert ratios == {name: pytest.approx(1, abs=WITHIN) for name in ("step_s", "memory_bytes", "server_memory_bytes")}
