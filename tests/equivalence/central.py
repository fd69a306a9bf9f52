"""The run without a split: stock transformers + PEFT, one optimiser, one schedule, the same numbers at the start."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler

from splitfed.config import LoraSection, TrainingSection
from splitfed.models import initial_adapter
from splitfed.training.data import Example, collate
from splitfed.training.order import step_examples
from splitfed.training.setup import lora_settings


def central_run(
    folder: Path,
    examples: Sequence[Example],
    training: TrainingSection,
    lora: LoraSection,
    *,
    client: str,
    seed: int,
    pad_token_id: int = 0,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train centrally on one client's examples, in the order that the client would draw them.

    Returns:
        The loss of every step, and the adapter by whole-model name.
    """
    batches = batches_of(examples, training, client=client, seed=seed)
    return central_steps(folder, batches, training, lora, seed=seed, pad_token_id=pad_token_id)


def batches_of(
    examples: Sequence[Example], training: TrainingSection, *, client: str, seed: int
) -> list[list[Example]]:
    """Give what a client draws in each step of the run."""
    return [
        [
            examples[i]
            for i in step_examples(
                len(examples),
                seed=seed,
                client=client,
                round=index // training.local_steps + 1,
                step=index % training.local_steps,
                batch_size=training.batch_size,
                local_steps=training.local_steps,
            )
        ]
        for index in range(training.rounds * training.local_steps)
    ]


def central_steps(
    folder: Path,
    batches: Sequence[Sequence[Example]],
    training: TrainingSection,
    lora: LoraSection,
    *,
    seed: int,
    pad_token_id: int = 0,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train centrally on one batch after another.

    Returns:
        The loss of every step, and the adapter by whole-model name.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = initial_adapter(model, lora_settings(lora), seed=seed)
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in start})
    peft_model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    assert set(parameters) == set(start)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    optimiser = torch.optim.AdamW(
        [parameters[name] for name in sorted(parameters)], lr=training.learning_rate, weight_decay=training.weight_decay
    )
    scheduler = get_scheduler(
        training.schedule,
        optimiser,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.rounds * training.local_steps,
    )
    peft_model.train()
    losses = []
    for index, examples in enumerate(batches):
        if index % training.local_steps == 0:
            held_to = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        batch = collate(examples, pad_token_id=pad_token_id)
        loss = peft_model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss
        pulled = sum((parameter - held_to[name]).square().sum() for name, parameter in parameters.items())
        (loss + training.proximal / 2 * pulled).backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach().clone() for name, parameter in parameters.items()}
