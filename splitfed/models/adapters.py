"""LoRA adapters on segments, keyed as the whole model's.

Every factor is initialised from (run seed, whole-model key) alone, so that any cut, any agent and a central baseline
start from the same numbers.

Shapes: R rank, I input features, O output features.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitfed.models.factors import TRAINED_ADAPTER, segment_factors
from splitfed.models.lora import LoraSettings, adapter_shapes, check_targets, peft_config, target_layers
from splitfed.models.residual import add_residual
from splitfed.models.segment import Segment


def add_adapter(segment: Segment, lora: LoraSettings, *, seed: int, residual_rank: int = 0) -> None:
    """Put a LoRA adapter on a segment, in place, and freeze everything else in it.

    The base parameters are shared with the whole model, so they are frozen there too.

    Args:
        segment: The segment; one without blocks gets no adapter.
        lora: Size and place of the adapter.
        seed: The run's seed.
        residual_rank: Rank of a second adapter, of zeros and frozen (see `load_residual`); 0 for none.

    Raises:
        ValueError: If no layer of the whole model's blocks is called as one of ``lora.targets``, or a rank is not
            possible.
    """
    if residual_rank < 0:
        raise ValueError(f"The residual cannot have rank {residual_rank}; give 1 or more, or 0 for no residual.")
    segment.model.requires_grad_(False)
    check_targets(lora, segment.adaptable_names)
    layers = {name: segment.whole_model_name(name) for name in target_layers(segment.model, lora)}
    if not layers:
        return
    ranks = {name: lora.ranks[whole] for name, whole in layers.items() if whole in lora.ranks}
    config = peft_config(segment.model, replace(lora, ranks=ranks))
    inject_adapter_in_model(config, segment.model, adapter_name=TRAINED_ADAPTER)
    if residual_rank:
        add_residual(segment, lora, residual_rank)
    for key, parameter in adapter_parameters(segment).items():
        parameter.data = initial_factor(key, parameter.shape, seed=seed)  # float32, whatever the base's dtype
        parameter.requires_grad_(True)


def remove_adapter(segment: Segment) -> None:
    """Take a segment's adapters off, in place, the frozen one as well; its base stays frozen.

    Args:
        segment: A segment with or without an adapter.
    """
    adapted = {name: layer for name, layer in segment.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(segment.model.get_submodule(parent), child, layer.get_base_layer())
    segment.model.__dict__.pop("peft_config", None)


def adapter_parameters(segment: Segment) -> dict[str, nn.Parameter]:
    """List a segment's adapter parameters by whole-model key.

    Args:
        segment: A segment with or without an adapter.

    Returns:
        Keys such as ``model.layers.3.self_attn.q_proj.lora_A.weight``: A is [R, I] and B is [O, R].
    """
    return segment_factors(segment, TRAINED_ADAPTER)


def own_names(segment: Segment, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Map names of some of a segment's parameters to those that the segment itself has for them, as a module.

    Args:
        segment: The segment.
        parameters: Some of its parameters, by whole-model key or any other name.
    """
    own = {id(parameter): name for name, parameter in segment.named_parameters()}
    return {name: own[id(parameter)] for name, parameter in parameters.items()}


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
