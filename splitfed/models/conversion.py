"""What a checkpoint's tensors become in a model, by transformers' own rules for names and layouts of older versions.

Most are taken as they are. Experts that a checkpoint stores one by one, say, become one tensor.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from splitfed.errors import WeightsError
from splitfed.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Recipe:
    """How some tensors of a model are made from tensors of a checkpoint.

    Attributes:
        targets: Names in the model.
        sources: Names in the checkpoint, each with the pattern by which the rule knows it.
        rule: The library's conversion, or None where the tensor is taken as it is.
    """

    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list)
    rule: WeightConverter | None = None

    def make(self, checkpoint: Checkpoint, shell: PreTrainedModel, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read what is needed from the checkpoint, and convert it.

        Args:
            checkpoint: Holds the sources.
            shell: The model.
            dtype: Wanted element type.

        Returns:
            Tensors by name in the model.

        Raises:
            WeightsError: If a source is missing or damaged, or the sources do not fit together.
        """
        if self.rule is None:
            return {self.targets[0]: checkpoint.read(self.sources[0][0], dtype=dtype)}
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources:
            read = partial(checkpoint.read, name, dtype=dtype)
            rule.add_tensor(self.targets[0], name, pattern, read)  # type: ignore[arg-type]  # it may be a callable
        try:
            made = rule.convert(self.targets[0], model=shell, config=shell.config)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise WeightsError(
                f"The tensors of {self.targets[0]!r} in {checkpoint.folder} do not fit together; fetch it again."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def recipes(shell: PreTrainedModel, names: Iterable[str]) -> list[Recipe]:
    """Say how a checkpoint's tensors become the model's.

    Args:
        shell: The model, on any device.
        names: Names of the checkpoint's tensors; those that mean nothing to the model give recipes for names it lacks.
    """
    rules = get_model_conversion_mapping(shell)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    shell_state = shell.state_dict()
    found: dict[str, Recipe] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, shell.base_model_prefix, shell_state)
        if target not in shell_state and name in shell_state:
            target, pattern = name, None
        rule = None if pattern is None else converter_of[pattern]
        targets: tuple[str, ...] = (target,)
        if rule is not None:
            targets = tuple(target.replace(rule.target_patterns[0], other) for other in rule.target_patterns)
        recipe = found.setdefault(target, Recipe(targets, rule=rule))
        recipe.sources.append((name, pattern or name))
    return list(found.values())
