"""Measured the way anyone would: stock transformers and PEFT on the exported adapter."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

_BATCH = 8


class StockModel:
    """The base model, with or without an exported adapter.

    Args:
        base: Folder of the base model.
    """

    def __init__(self, base: Path) -> None:
        disable_progress_bar()
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)

    def load(self, adapter: Path | None) -> Any:
        """Load the model as a user would."""
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
            return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    @torch.no_grad()
    def held_out_loss(self, adapter: Path | None, texts: Sequence[str], *, max_tokens: int) -> float:
        """Measure the mean loss per token, in nats."""
        model = self.load(adapter)
        total, tokens = 0.0, 0
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[start : start + _BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=max_tokens,
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            count = int((labels[:, 1:] != -100).sum())
            loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            total += loss.item() * count
            tokens += count
        return total / tokens

    @torch.no_grad()
    def sample(self, adapter: Path | None, prompt: str, *, new_tokens: int) -> str:
        """Generate greedily after a prompt; returns what was generated."""
        model = self.load(adapter)
        inputs = self._tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=self._tokenizer.pad_token_id
        )
        return str(self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
