"""A base model in one piece, with transformers alone: what a study compares with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from splitfed.errors import WeightsError
from splitfed.models import load_shell


def open_whole_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a base model, ready to be used and not to be trained.

    Args:
        folder: The base model.
        dtype: Element type of its weights.

    Raises:
        WeightsError: If its configuration or its weights cannot be used.
    """
    load_shell(folder)  # says in one sentence what is wrong with the configuration
    try:
        with without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise WeightsError(f"The weights in {folder} cannot be read ({reason}); fetch the base model again.") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"The checkpoint in {folder} has nothing for {missing[0]!r}; fetch it again.")
    whole: PreTrainedModel = model.eval().requires_grad_(False)
    return whole


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
