"""The run that transformers' own Trainer makes: its loop, optimiser, schedule, accumulation, clipping and logs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from splitfed.config import LoraSection, TrainingSection
from splitfed.models import initial_adapter
from splitfed.training.data import Example
from splitfed.training.setup import lora_settings

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TrainerRun:
    """What came of it.

    Attributes:
        losses: The loss of every step, as the Trainer logs it.
        norms: The gradients' L2 norm before each step's clipping, as the Trainer logs it.
        adapter: The adapter at the end, by whole-model name.
        decayed: Names of the adapter's tensors that weight decay is applied to.
    """

    losses: list[float]
    norms: list[float]
    adapter: dict[str, Tensor]
    decayed: set[str]


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Example]],
    training: TrainingSection,
    lora: LoraSection,
    *,
    seed: int,
    folder: Path,
    averages_means: bool = False,
) -> TrainerRun:
    """Train one batch after another; what the settings do not name stays the Trainer's default.

    Args:
        model: The base model, in float32; it gets the adapter, in place.
        tokenizer: Knows how to pad.
        batches: The examples of every step.
        training: Translated to the Trainer's options of the same meaning.
        lora: Size and place of the adapter.
        seed: Seed of the adapter's first numbers.
        folder: For what the Trainer writes.
        averages_means: Take the mean of the micro-batches' means, as if the Trainer could not count tokens.
    """
    start = initial_adapter(model, lora_settings(lora), seed=seed)
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in start})
    adapted = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    set_peft_model_state_dict(adapted, {_PREFIX + name: tensor for name, tensor in start.items()})
    assert _adapter(adapted).keys() == start.keys()
    micro_batch_size = training.micro_batch_size or training.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=training.batch_size // micro_batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or 0.0,  # 0 = no clipping
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = _InOrder(
        adapted,
        arguments,
        DataCollatorForSeq2Seq(tokenizer),
        [{"input_ids": each.input_ids, "labels": each.labels} for batch in batches for each in batch],
    )
    if averages_means:
        trainer.model_accepts_loss_kwargs = False
    with torch.random.fork_rng(devices=[]):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(batches)
    return TrainerRun(
        [entry["loss"] for entry in logs],
        [entry["grad_norm"] for entry in logs],
        _adapter(adapted),
        {_plain(name) for name in trainer.get_decay_parameter_names(adapted) if ".lora_" in name},
    )


def _adapter(adapted: Any) -> dict[str, Tensor]:
    return {_plain(name): tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".default.", ".")
