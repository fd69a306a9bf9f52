"""Load one side's segments from a checkpoint folder, opening no tensor of the other side's.

The model is built on the ``meta`` device, given the tensors which one side holds, one after the other, and then cut.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from splitfed.errors import WeightsError
from splitfed.models.checkpoint import Checkpoint
from splitfed.models.conversion import recipes
from splitfed.models.cut import block_list_name
from splitfed.models.partition import partition
from splitfed.models.segment import Bottom, Segment, Top, Trunk
from splitfed.models.shell import load_shell


def load_bottom_and_top(
    folder: Path, *, bottom_blocks: int, top_blocks: int, dtype: torch.dtype = torch.float32
) -> tuple[Bottom, Top]:
    """Load what an agent holds, frozen; a tied embedding is in memory once.

    Args:
        folder: Configuration and safetensors of the whole model, or of these segments only.
        bottom_blocks: Blocks in the bottom.
        top_blocks: Blocks in the top.
        dtype: Element type to hold the weights in.

    Raises:
        WeightsError: If the configuration or a tensor is missing, damaged or of another shape.
        UnsupportedFamily: If the family is not proven to split.
        SplitPointError: If the split point is outside the model.
    """
    shell = load_shell(folder, dtype=dtype)
    parts = partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    _fill(shell, Checkpoint(folder), (parts.bottom, parts.top), dtype=dtype)
    parts = partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    return parts.bottom, parts.top


def load_trunk(folder: Path, *, bottom_blocks: int, top_blocks: int, dtype: torch.dtype = torch.float32) -> Trunk:
    """Load what the server holds, frozen.

    Args:
        folder: Configuration and safetensors of the whole model, or of the trunk only.
        bottom_blocks: Blocks in the bottom.
        top_blocks: Blocks in the top.
        dtype: Element type to hold the weights in.

    Raises:
        WeightsError: If the configuration or a tensor is missing, damaged or of another shape.
        UnsupportedFamily: If the family is not proven to split.
        SplitPointError: If the split point is outside the model.
    """
    shell = load_shell(folder, dtype=dtype)
    parts = partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    _fill(shell, Checkpoint(folder), (parts.trunk,), dtype=dtype)
    return partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks).trunk


def segment_tensor_names(folder: Path, *, bottom_blocks: int, top_blocks: int) -> dict[str, set[str]]:
    """Say which checkpoint tensors each segment is made of.

    Args:
        folder: Configuration and safetensors of the whole model.
        bottom_blocks: Blocks in the bottom.
        top_blocks: Blocks in the top.

    Returns:
        Names by "bottom", "trunk" and "top"; a tied embedding is in bottom and top.

    Raises:
        WeightsError: If the configuration or the checkpoint's list of tensors is missing or damaged.
        UnsupportedFamily: If the family is not proven to split.
        SplitPointError: If the split point is outside the model.
    """
    shell = load_shell(folder)
    parts = partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    known = recipes(shell, Checkpoint(folder).names)
    names: dict[str, set[str]] = {}
    for segment in parts:
        held = _held_by(shell, (segment,))
        chosen = (recipe.sources for recipe in known if not held.keys().isdisjoint(recipe.targets))
        names[segment.kind] = {name for sources in chosen for name, _ in sources}
    return names


def kept_in_float32(shell: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str]:
    """Say which tensors transformers holds in float32 whatever is asked, by the same search in their names.

    Args:
        shell: The model, with or without its weights.
        dtype: What is asked.

    Returns:
        What is found in the name of each such tensor, and in no other.
    """
    patterns = list(shell._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else []
    if dtype == torch.float16:
        patterns += shell._keep_in_fp32_modules or ()
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns) or r"(?!)")


def _fill(shell: PreTrainedModel, checkpoint: Checkpoint, segments: Iterable[Segment], *, dtype: torch.dtype) -> None:
    """Give the shell the tensors which the segments hold."""
    wanted = _held_by(shell, segments)
    in_float32 = kept_in_float32(shell, dtype)
    real: dict[int, Tensor] = {}
    for recipe in recipes(shell, checkpoint.names):
        held = [name for name in recipe.targets if name in wanted]
        if not held:
            continue
        if id(wanted[held[0]]) in real:
            _check_tied(checkpoint, recipe.sources[0][0], held[0], real[id(wanted[held[0]])])
            continue
        as_dtype = torch.float32 if in_float32.search(held[0]) else wanted[held[0]].dtype
        made = recipe.make(checkpoint, shell, dtype=as_dtype)
        for name in held:
            real[id(wanted[name])] = _checked(name, made.get(name), wanted[name], checkpoint.folder)
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in real)
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise WeightsError(
            f"The checkpoint in {checkpoint.folder} has nothing for {missing[0]!r}{more}; fetch it again."
        )
    _put(shell, real)
    _compute_buffers(shell, segments)


def _held_by(shell: PreTrainedModel, segments: Iterable[Segment]) -> dict[str, Tensor]:
    """Stored tensors of the segments by whole-model name; a tied tensor has several names."""
    held = {id(tensor) for segment in segments for tensor in segment.model.state_dict(keep_vars=True).values()}
    return {name: tensor for name, tensor in shell.state_dict(keep_vars=True).items() if id(tensor) in held}


def _checked(name: str, made: Tensor | None, wanted: Tensor, folder: Path) -> Tensor:
    if made is None or made.shape != wanted.shape:
        shape = None if made is None else list(made.shape)
        raise WeightsError(
            f"The tensor {name!r} in {folder} has shape {shape}, where the configuration asks for "
            f"{list(wanted.shape)}; configuration and weights are of two models."
        )
    return made


def _check_tied(checkpoint: Checkpoint, source: str, name: str, tensor: Tensor) -> None:
    """A checkpoint may store a tied tensor under both names, if it is the same."""
    if not torch.equal(checkpoint.read(source, dtype=tensor.dtype), tensor):
        raise WeightsError(
            f"The configuration in {checkpoint.folder} ties {name!r} to another tensor, but the weights give it values "
            "of its own; set tie_word_embeddings to false in config.json."
        )


def _put(shell: PreTrainedModel, real: dict[int, Tensor]) -> None:
    parameters: dict[int, nn.Parameter] = {}
    for module in shell.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in real:
                loaded = parameters.setdefault(id(parameter), nn.Parameter(real[id(parameter)], requires_grad=False))
                loaded._is_hf_initialized = True  # type: ignore[attr-defined]  # so that _init_weights leaves it
                module.register_parameter(name, loaded)
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in real:
                real[id(buffer)]._is_hf_initialized = True  # type: ignore[attr-defined]
                module._buffers[name] = real[id(buffer)]


@torch.no_grad()
@guard_torch_init_functions()
def _compute_buffers(shell: PreTrainedModel, segments: Iterable[Segment]) -> None:
    """Compute what no checkpoint stores (rotary frequencies and the like) as the library does after loading.

    Its initialisation leaves tensors marked as initialised, and does nothing to those on ``meta``.
    """
    of_blocks = f"{block_list_name(shell)}."
    held = {segment.whole_model_name(name) for segment in segments for name, _ in segment.model.named_modules()}
    for name, module in shell.named_modules():
        if name.startswith(of_blocks) and name not in held:
            continue
        for buffer_name in module._non_persistent_buffers_set:
            buffer = module._buffers[buffer_name]
            if buffer is not None:
                module._buffers[buffer_name] = torch.empty_like(buffer, device="cpu")
    for module in shell.modules():
        shell._init_weights(module)
