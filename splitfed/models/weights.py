"""Load one side's segments from a checkpoint folder, opening no tensor of the other side's.

The model is built on the ``meta`` device, given the tensors which one side holds, one after the other, and then cut.
Names and layouts of older checkpoints are translated by transformers' own rules.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import guard_torch_init_functions

from splitfed.errors import WeightsError
from splitfed.models.checkpoint import Checkpoint
from splitfed.models.cut import block_list_name
from splitfed.models.families import family_of
from splitfed.models.partition import partition
from splitfed.models.segment import Bottom, Segment, Top, Trunk


def load_bottom_and_top(
    folder: Path, *, bottom_blocks: int, top_blocks: int, dtype: torch.dtype = torch.float32
) -> tuple[Bottom, Top]:
    """Load what an agent holds; a tied embedding is in memory once.

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
    _fill(shell, Checkpoint(folder), (parts.bottom, parts.top))
    parts = partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    return parts.bottom, parts.top


def load_trunk(folder: Path, *, bottom_blocks: int, top_blocks: int, dtype: torch.dtype = torch.float32) -> Trunk:
    """Load what the server holds.

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
    _fill(shell, Checkpoint(folder), (parts.trunk,))
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
        WeightsError: If the configuration is missing or damaged.
        UnsupportedFamily: If the family is not proven to split.
        SplitPointError: If the split point is outside the model.
    """
    shell = load_shell(folder)
    recipes = _recipes(shell, Checkpoint(folder).names)
    names: dict[str, set[str]] = {}
    for segment in partition(shell, bottom_blocks=bottom_blocks, top_blocks=top_blocks):
        held = _held_by(shell, (segment,))
        chosen = (recipe.sources for recipe in recipes if not held.keys().isdisjoint(recipe.targets))
        names[segment.kind] = {name for sources in chosen for name, _ in sources}
    return names


def load_shell(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the whole model on the ``meta`` device: shapes and names, no memory.

    Args:
        folder: Holds ``config.json``.
        dtype: Element type of its parameters.

    Raises:
        WeightsError: If the configuration is missing or damaged.
        UnsupportedFamily: If the family is not proven to split.
    """
    config = load_config(folder)
    family_of(config.model_type)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def load_config(folder: Path) -> PreTrainedConfig:
    """Read a model's configuration.

    Args:
        folder: Holds ``config.json``.

    Raises:
        WeightsError: If the configuration is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"There is no config.json in {folder}; give the folder of a causal language model.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"The configuration in {folder} cannot be read ({reason}); fetch it again.") from error
    return config


@dataclass(frozen=True)
class _Recipe:
    """How some tensors of a model are made from tensors of a checkpoint.

    Attributes:
        targets: Names in the model.
        sources: Names in the checkpoint, each with the pattern by which the rule knows it.
        rule: The library's conversion, or None where the tensor is taken as it is.
    """

    targets: tuple[str, ...]
    sources: list[tuple[str, str]]
    rule: WeightConverter | None

    def make(self, checkpoint: Checkpoint, shell: PreTrainedModel, *, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.rule is None:
            return {self.targets[0]: checkpoint.read(self.sources[0][0], dtype=dtype)}
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources:
            read = partial(checkpoint.read, name, dtype=dtype)
            rule.add_tensor(self.targets[0], name, pattern, read)  # type: ignore[arg-type]  # a callable is read late
        made = rule.convert(self.targets[0], model=shell, config=shell.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _recipes(shell: PreTrainedModel, names: Iterable[str]) -> list[_Recipe]:
    """Find what a checkpoint's tensors become in the model, by the library's own conversion rules."""
    rules = get_model_conversion_mapping(shell)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    shell_state = shell.state_dict()
    recipes: dict[str, _Recipe] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, shell.base_model_prefix, shell_state)
        if target not in shell_state and name in shell_state:
            target, pattern = name, None
        rule = None if pattern is None else converter_of[pattern]
        targets: tuple[str, ...] = (target,)
        if rule is not None:
            targets = tuple(target.replace(rule.target_patterns[0], other) for other in rule.target_patterns)
        recipe = recipes.setdefault(target, _Recipe(targets, [], rule))
        recipe.sources.append((name, pattern or name))
    return list(recipes.values())


def _fill(shell: PreTrainedModel, checkpoint: Checkpoint, segments: Iterable[Segment]) -> None:
    """Give the shell the tensors which the segments hold."""
    wanted = _held_by(shell, segments)
    real: dict[int, Tensor] = {}
    for recipe in _recipes(shell, checkpoint.names):
        held = [name for name in recipe.targets if name in wanted]
        if not held or all(id(wanted[name]) in real for name in held):
            continue
        made = recipe.make(checkpoint, shell, dtype=wanted[held[0]].dtype)
        for name in held:
            real[id(wanted[name])] = _checked(name, made.get(name), wanted[name], checkpoint.folder)
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in real)
    if missing:
        raise WeightsError(
            f"The checkpoint in {checkpoint.folder} has nothing for {missing[0]!r}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}; fetch it again."
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


def _put(shell: PreTrainedModel, real: dict[int, Tensor]) -> None:
    parameters: dict[int, nn.Parameter] = {}
    for module in shell.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in real:
                loaded = parameters.setdefault(id(parameter), nn.Parameter(real[id(parameter)], requires_grad=False))
                loaded._is_hf_initialized = True  # type: ignore[attr-defined]
                module.register_parameter(name, loaded)
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in real:
                real[id(buffer)]._is_hf_initialized = True  # type: ignore[attr-defined]
                module._buffers[name] = real[id(buffer)]


@torch.no_grad()
@guard_torch_init_functions()
def _compute_buffers(shell: PreTrainedModel, segments: Iterable[Segment]) -> None:
    """Compute what no checkpoint stores (rotary frequencies and the like) as the library does after loading."""
    elsewhere = set(_block_modules(shell))
    for segment in segments:
        elsewhere -= {segment.whole_model_name(name) for name, _ in segment.model.named_modules()}
    for name, module in shell.named_modules():
        if name in elsewhere or not module._non_persistent_buffers_set:
            continue
        for buffer in module._non_persistent_buffers_set:
            if module._buffers[buffer] is not None:
                module._buffers[buffer] = torch.empty_like(module._buffers[buffer], device="cpu")
        shell._init_weights(module)


def _block_modules(shell: PreTrainedModel) -> Iterator[str]:
    prefix = f"{block_list_name(shell)}."
    return (name for name, _ in shell.named_modules() if name.startswith(prefix))
