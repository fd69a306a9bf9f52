"""Split training in one process = central training with stock transformers + PEFT, loss for loss."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.config import CodecSection, LoraSection, TrainingSection
from splitfed.training.simulate import examples_of, simulate
from tests.equivalence.central import central_run

TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats."""

OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
TEXTS = [
    f"The clinic saw {n} patients on day {n * n}, and {n % 3} of them came back. " * (1 + n % 4) for n in range(40)
]


@pytest.fixture(scope="module")
def base() -> Path:
    return splitfed.base_model_folder()


@pytest.mark.parametrize(("bottom_blocks", "top_blocks"), [(1, 1), (0, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize(("micro_batch_size", "max_in_flight"), [(None, 1), (2, 1), (2, 3)])
def test_one_client_has_the_loss_curve_of_central_lora(
    base: Path, bottom_blocks: int, top_blocks: int, micro_batch_size: int | None, max_in_flight: int
) -> None:
    training = TrainingSection(
        rounds=2,
        local_steps=3,
        batch_size=6,
        micro_batch_size=micro_batch_size,
        max_tokens=48,
        learning_rate=3e-3,
        weight_decay=0.01,
        warmup_steps=2,
        max_in_flight=max_in_flight,
    )
    lora = LoraSection(rank=4, alpha=8.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = examples_of(TEXTS, tokenizer, max_tokens=48)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = splitfed.partition(model, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    split = simulate(parts, tokenizer, {"a": examples}, training=training, lora=lora, codecs=OPEN, seed=5)
    losses, adapter = central_run(base, examples, training, lora, client="a", seed=5)
    assert losses[-1] < losses[0]
    assert split.losses["a"] == pytest.approx(losses, abs=TOLERANCE)
    if (bottom_blocks, top_blocks) == (1, 1):
        assert set(split.adapter) == set(adapter)
        for name, tensor in adapter.items():
            torch.testing.assert_close(split.adapter[name], tensor, rtol=0, atol=2e-4)
