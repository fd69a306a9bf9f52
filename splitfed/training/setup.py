"""From a run's configuration to segments with their adapters: one way for the server, the agents and a notebook."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from splitfed.config import LoraSection, ModelSection
from splitfed.errors import ConfigError
from splitfed.models import (
    Bottom,
    LoraSettings,
    Segment,
    Top,
    Trunk,
    add_adapter,
    initial_adapter,
    load_bottom_and_top,
    load_shell,
    load_trunk,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def lora_settings(lora: LoraSection) -> LoraSettings:
    """Give the adapter's size and place as the models know them."""
    targets = None if lora.targets is None else tuple(lora.targets)
    return LoraSettings(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=targets)


def open_trunk(folder: Path, model: ModelSection, lora: LoraSection, *, seed: int, residual_rank: int = 0) -> Trunk:
    """Load the server's segment, with its adapter at the run's start."""
    trunk = load_trunk(
        folder, bottom_blocks=model.bottom_blocks, top_blocks=model.top_blocks, dtype=DTYPES[model.dtype]
    )
    _adapt(trunk, lora, seed, residual_rank)
    return trunk


def open_bottom_and_top(
    folder: Path, model: ModelSection, lora: LoraSection, *, seed: int, residual_rank: int = 0
) -> tuple[Bottom, Top]:
    """Load an agent's segments, with their adapters at the run's start."""
    bottom, top = load_bottom_and_top(
        folder, bottom_blocks=model.bottom_blocks, top_blocks=model.top_blocks, dtype=DTYPES[model.dtype]
    )
    _adapt(bottom, lora, seed, residual_rank)
    _adapt(top, lora, seed, residual_rank)
    return bottom, top


def start_of_run(folder: Path, lora: LoraSection, trunk: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Give the adapters of bottom and top at the run's start, from shapes alone.

    Args:
        folder: The base model.
        lora: Size and place of the adapter.
        trunk: The trunk's adapter, whose keys are left out.
        seed: The run's seed.
    """
    whole = initial_adapter(load_shell(folder), lora_settings(lora), seed=seed)
    return {name: tensor for name, tensor in whole.items() if name not in trunk}


def _adapt(segment: Segment, lora: LoraSection, seed: int, residual_rank: int) -> None:
    try:
        add_adapter(segment, lora_settings(lora), seed=seed, residual_rank=residual_rank)
    except ValueError as error:
        raise ConfigError(f"[lora] targets: {error}") from error
