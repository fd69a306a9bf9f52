"""LoRA adapters on segments, keyed as the whole model's.

Every factor is initialised from (run seed, whole-model key) alone, so that any cut, any agent and a central baseline
start from the same numbers.

Shapes: R rank, I input features, O output features.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfed.models.cut import adaptable_layers, adaptable_names
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
        targets: Last name components of the layers to adapt; None for every linear layer of the blocks, or what
            ``families`` lists for the family.
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
        ValueError: If no layer of the whole model's blocks is called as one of ``lora.targets``.
    """
    segment.model.requires_grad_(False)
    _check_targets(lora, segment.adaptable_names)
    if not target_layers(segment.model, lora):
        return
    config = peft_config(segment.model, lora)
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


def adapter_shapes(source: Segment | PreTrainedModel, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Say which tensors an adapter consists of, whether or not it is there yet.

    Args:
        source: A segment or the whole model, on any device (``meta`` included).
        lora: Size and place of the adapter.

    Returns:
        Shapes by whole-model key.

    Raises:
        ValueError: If no layer of the whole model's blocks is called as one of ``lora.targets``.
    """
    if isinstance(source, Segment):
        _check_targets(lora, source.adaptable_names)
        layers = {source.whole_model_name(name): layer for name, layer in target_layers(source.model, lora).items()}
    else:
        _check_targets(lora, adaptable_names(source))
        layers = target_layers(source, lora)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        n_inputs, n_outputs = _layer_size(layer)
        shapes[f"{name}.lora_A.weight"] = (lora.rank, n_inputs)
        shapes[f"{name}.lora_B.weight"] = (n_outputs, lora.rank)
    return shapes


def initial_adapter(model: PreTrainedModel, lora: LoraSettings, *, seed: int) -> dict[str, Tensor]:
    """Give the whole model's adapter before the first step: what all segments together start from.

    Args:
        model: The whole model, on any device (``meta`` included).
        lora: Size and place of the adapter.
        seed: The run's seed.

    Raises:
        ValueError: If no layer of the blocks is called as one of ``lora.targets``.
    """
    return {key: initial_factor(key, shape, seed=seed) for key, shape in adapter_shapes(model, lora).items()}


def target_layers(model: PreTrainedModel, lora: LoraSettings) -> dict[str, nn.Module]:
    """Find the layers to adapt.

    Args:
        model: A segment's model, or the whole one, on any device.
        lora: Size and place of the adapter.

    Returns:
        Linear layers of the blocks, by their name in ``model``.
    """
    layers = adaptable_layers(model)
    if lora.targets is None:
        return layers
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in lora.targets}


def peft_config(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """Say in peft's words which layers of a model are adapted, and how.

    Targets are last name components, as other tools expect, or full names where a component alone would also match a
    layer that is not adapted.

    Args:
        model: A segment's model, or the whole one, on any device.
        lora: Size and place of the adapter.
    """
    layers = target_layers(model, lora)
    components = {name.rpartition(".")[2] for name in layers}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in components}
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(components if matched == layers.keys() else layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def _check_targets(lora: LoraSettings, present: frozenset[str]) -> None:
    unknown = sorted(set(lora.targets or ()) - present)
    if unknown:
        raise ValueError(
            f"No layer of the blocks that LoRA can adapt is called {unknown[0]!r}, which is among its targets; "
            f"choose among {', '.join(sorted(present))}."
        )


def _layer_size(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return int(layer.nx), int(layer.nf)
