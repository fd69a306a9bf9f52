"""LoRA adapters on segments, keyed as the whole model's, and their export as one standard PEFT adapter.

Every factor is initialised from (run seed, whole-model key) alone, so that any cut, any agent and a central baseline
start from the same numbers.

Shapes: R rank, I input features, O output features.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfed.models.cut import block_list_name
from splitfed.models.segment import Segment

_ADAPTER_NAME = "default"
_INFIX = re.compile(rf"\.lora_(A|B)\.{_ADAPTER_NAME}\.weight$")


@dataclass(frozen=True)
class LoraSettings:
    """What peft calls ``r``, ``lora_alpha``, ``lora_dropout`` and ``target_modules``.

    Attributes:
        rank: R, 1 or more.
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of dropping an input of the adapter, in [0, 1).
        targets: Last name components of the layers to adapt; None for every linear layer of the blocks.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def add_adapter(segment: Segment, lora: LoraSettings, *, seed: int) -> None:
    """Put a LoRA adapter on a segment, in place, and freeze everything else in it.

    The base parameters are shared with the whole model, so they are frozen there too.

    Args:
        segment: The segment; one without blocks gets no adapter.
        lora: Size and place of the adapter.
        seed: The run's seed.

    Raises:
        ValueError: If no layer of the segment's blocks is called as ``lora.targets`` say.
    """
    segment.model.requires_grad_(False)
    targets = _target_layers(segment.model, lora)
    if not targets:
        return
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        fan_in_fan_out=_is_transposed(targets),
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, segment.model, adapter_name=_ADAPTER_NAME)
    for key, parameter in adapter_parameters(segment).items():
        parameter.data = initial_factor(key, parameter.shape, seed=seed)  # float32, whatever the base's dtype
        parameter.requires_grad_(True)


def adapter_parameters(segment: Segment) -> dict[str, nn.Parameter]:
    """List a segment's adapter parameters by whole-model key.

    Args:
        segment: A segment with or without an adapter.

    Returns:
        Keys such as ``model.layers.3.self_attn.q_proj.lora_A.weight``: A is [R, I] and B is [O, R].
    """
    return {
        _INFIX.sub(r".lora_\1.weight", segment.whole_model_name(name)): parameter
        for name, parameter in segment.model.named_parameters()
        if _INFIX.search(name)
    }


def adapter_state(segment: Segment) -> dict[str, Tensor]:
    """Copy a segment's adapter, by whole-model key.

    Args:
        segment: A segment with or without an adapter.
    """
    return {key: parameter.detach().clone() for key, parameter in adapter_parameters(segment).items()}


def load_adapter_state(segment: Segment, state: Mapping[str, Tensor]) -> None:
    """Set a segment's adapter; keys of other segments are left aside.

    Args:
        segment: A segment with an adapter.
        state: Tensors by whole-model key; nothing is changed unless all of the segment's are there.

    Raises:
        ValueError: If a key of the segment is missing, or a tensor has another shape.
    """
    parameters = adapter_parameters(segment)
    for key, parameter in parameters.items():
        if key not in state:
            raise ValueError(f"The adapter has no tensor {key!r}; give one for every adapted layer of the segment.")
        if state[key].shape != parameter.shape:
            raise ValueError(
                f"The adapter's tensor {key!r} has shape {list(state[key].shape)}, not {list(parameter.shape)}; "
                f"use an adapter of the same base, rank and targets."
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def initial_factor(key: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Draw one LoRA factor as peft does (A Kaiming-uniform, B zero), from the seed and its key alone.

    Rows are drawn in order, so a smaller rank is the leading rows of a larger one.

    Args:
        key: Whole-model key, ending in ``lora_A.weight`` or ``lora_B.weight``.
        shape: [R, I] for A, [O, R] for B.
        seed: The run's seed.
    """
    if key.endswith("lora_B.weight"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).random(shape, dtype=np.float32)
    return torch.from_numpy((2 * uniform - 1) / np.float32(math.sqrt(shape[1])))


def expected_adapter_shapes(segment: Segment, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Say which tensors an adapter of a segment consists of, whether or not it has one.

    Args:
        segment: A segment, on any device (``meta`` included).
        lora: Size and place of the adapter.

    Raises:
        ValueError: If no layer of the segment's blocks is called as ``lora.targets`` say.
    """
    return _adapter_shapes(segment.model, lora, segment.whole_model_name)


def initial_adapter(model: PreTrainedModel, lora: LoraSettings, *, seed: int) -> dict[str, Tensor]:
    """Give the whole model's adapter before the first step: what all segments together start from.

    Args:
        model: The whole model, on any device (``meta`` included).
        lora: Size and place of the adapter.
        seed: The run's seed.

    Raises:
        ValueError: If no layer of the blocks is called as ``lora.targets`` say.
    """
    shapes = _adapter_shapes(model, lora, str)
    return {key: initial_factor(key, shape, seed=seed) for key, shape in shapes.items()}


def _adapter_shapes(
    model: PreTrainedModel, lora: LoraSettings, whole_model_name: Callable[[str], str]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _target_layers(model, lora).items():
        n_inputs, n_outputs = _layer_size(layer)
        shapes[f"{whole_model_name(name)}.lora_A.weight"] = (lora.rank, n_inputs)
        shapes[f"{whole_model_name(name)}.lora_B.weight"] = (n_outputs, lora.rank)
    return shapes


def _target_layers(model: PreTrainedModel, lora: LoraSettings) -> dict[str, nn.Module]:
    """Layers of the blocks to adapt, by local name; an adapter that is already there does not change the answer."""
    prefix = f"{block_list_name(model)}."
    linear = {
        name.removesuffix(".base_layer"): layer
        for name, layer in model.named_modules()
        if name.startswith(prefix) and isinstance(layer, nn.Linear | Conv1D) and ".lora_" not in name
    }
    if lora.targets is None:
        return linear
    chosen = {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in lora.targets}
    if linear and not chosen:
        present = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"No layer of the blocks is called as the LoRA targets {list(lora.targets)} say; "
            f"choose among {', '.join(present)}."
        )
    return chosen


def _layer_size(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return int(layer.nx), int(layer.nf)


def _is_transposed(layers: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(layer, Conv1D) for layer in layers.values())
