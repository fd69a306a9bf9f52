"""The surgery on a model: a copy of its module tree with fewer blocks, around the very same parameters."""

import copy
from itertools import chain
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfed.models.families import Family, family_of

# Configuration entries with one value a block, by any family's name for them: cut with the blocks.
_PER_BLOCK_ENTRIES = (
    "attention_layers",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "layers_num_experts",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
)
# Block indices which the forward pass takes to the cache, and the cache counts a segment's own blocks. (What else
# depends on a block's index was computed from the whole model's when the block was made.)
_CACHE_INDICES = ("layer_idx", "layer_id")


class Absent(nn.Module):
    """Stands for a token embedding which another segment holds."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: hidden states enter through ``inputs_embeds``.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("This segment holds no embeddings; give it hidden states.")


class NoPositions(nn.Module):
    """Stands for learned positions which the bottom has already added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a zero which broadcasts over hidden states."""
        return torch.zeros(())


def block_list_name(model: PreTrainedModel) -> str:
    """Name the block list as parameter names spell it, such as ``model.layers``."""
    return f"{model.base_model_prefix}.{family_of(model.config.model_type).blocks}"


def adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """List the linear layers of the blocks that LoRA can adapt, by name.

    Args:
        model: A whole model or a segment's, on any device; an adapter that is there already changes nothing.
    """
    prefix = f"{block_list_name(model)}."
    targets = family_of(model.config.model_type).targets
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
    }
    return {name: layer for name, layer in layers.items() if targets is None or name.rpartition(".")[2] in targets}


def adaptable_names(model: PreTrainedModel) -> frozenset[str]:
    """Last components of the names of those layers, such as ``q_proj``."""
    return frozenset(name.rpartition(".")[2] for name in adaptable_layers(model))


def cut(
    model: PreTrainedModel, family: Family, *, blocks: range, has_embeddings: bool, has_head: bool
) -> PreTrainedModel:
    """Copy a model's module tree with some of its blocks, sharing parameters and buffers.

    The copy is ``copy.deepcopy`` with a prepared memo: tensors stand for themselves, configurations for their cut
    copies, and modules which the segment does not hold for pass-throughs.

    Args:
        model: The whole model.
        family: Where it keeps its parts.
        blocks: Indices of the blocks to keep.
        has_embeddings: Whether embeddings, and what follows them, are kept.
        has_head: Whether the final norm and the head are kept.

    Returns:
        A model of the same class.
    """
    base = model.base_model
    block_list = cast(nn.ModuleList, base.get_submodule(family.blocks))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for config in _configs(model):
        memo[id(config)] = _cut_config(config, blocks, n_blocks=len(block_list))
    if not has_embeddings:
        memo[id(base.get_submodule(family.tokens))] = Absent()
        if family.positions is not None:
            memo[id(base.get_submodule(family.positions))] = NoPositions()
        memo.update(_pass_through(base, family.entry))
    if not has_head:
        memo.update(_pass_through(base, family.exit))
        memo.update({id(child): nn.Identity() for child in model.children() if child is not base})
    memo[id(block_list)] = nn.ModuleList(_copy_block(block_list[index], blocks.start, memo) for index in blocks)
    segment = copy.deepcopy(model, memo)
    if not has_embeddings:
        for name, value in family.neutral.items():
            setattr(segment.base_model, name, value)
        for config in _configs(segment):
            for name, value in family.neutral_config.items():
                setattr(config, name, value)
    segment._tied_weights_keys = {}
    segment.all_tied_weights_keys = {}
    return segment


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Each configuration object that some module of the model holds."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


def _pass_through(base: nn.Module, names: tuple[str, ...]) -> dict[int, Any]:
    modules = {name: attrgetter(name)(base) for name in names}
    return {id(module): nn.Identity() for module in modules.values() if module is not None}


def _cut_config(config: PreTrainedConfig, blocks: range, *, n_blocks: int) -> PreTrainedConfig:
    cut_config = copy.deepcopy(config)
    for entry in _PER_BLOCK_ENTRIES:
        values = config.__dict__.get(entry)
        if isinstance(values, list | tuple) and len(values) == n_blocks:
            setattr(cut_config, entry, values[blocks.start : blocks.stop])
    if getattr(config, "attn_layer_indices", None):
        cut_config.attn_layer_indices = [index - blocks.start for index in config.attn_layer_indices if index in blocks]
    if hasattr(config, "attn_layer_offset"):
        cut_config.attn_layer_offset = (config.attn_layer_offset - blocks.start) % config.attn_layer_period
    cut_config.num_hidden_layers = len(blocks)
    return cut_config


def _copy_block(block: nn.Module, first: int, memo: dict[int, Any]) -> nn.Module:
    block = copy.deepcopy(block, memo)
    for module in block.modules():
        for attribute in _CACHE_INDICES:
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, getattr(module, attribute) - first)
    return block
