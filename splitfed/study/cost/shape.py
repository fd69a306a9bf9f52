"""A model known by its configuration alone: the very modules, without weights, and which of its blocks are alike."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from splitfed.assets import base_model_folder
from splitfed.errors import WeightsError
from splitfed.models import Segment, load_config, partition
from splitfed.models.cut import adaptable_names, cut
from splitfed.models.families import Family, family_of
from splitfed.models.partition import Bottom, Top, Trunk, check_split_point
from splitfed.models.weights import kept_in_float32

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDICES: Final = ("layer_idx", "layer_id", "training")


class Weight(NamedTuple):
    """One stored tensor: number of elements, bytes."""

    elements: int
    size_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """A causal language model without its weights.

    Attributes:
        model: The whole model on the ``meta`` device.
        dtype: Number format of weights and arithmetic, such as "float32".
        kinds: What a block is like, by its index: blocks of one kind cost the same.
        measured: What was measured of its parts so far.
    """

    model: PreTrainedModel
    dtype: str
    kinds: tuple[str, ...]
    measured: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole model."""
        return len(self.kinds)

    @property
    def hidden_size(self) -> int:
        """D, the size of what crosses a split point."""
        return int(self.model.config.hidden_size)

    def check(self, bottom_blocks: int, top_blocks: int) -> None:
        """Refuse a split point outside the model.

        Raises:
            SplitPointError: If the trunk would hold no block, or a count is negative.
        """
        check_split_point(self.n_blocks, bottom_blocks=bottom_blocks, top_blocks=top_blocks)

    def embeddings(self) -> Bottom:
        """Cut a bottom without blocks."""
        model = self._cut(range(0), has_embeddings=True, has_head=False)
        return Bottom(model, blocks=range(0), adaptable_names=adaptable_names(self.model))

    def head(self) -> Top:
        """Cut a top without blocks."""
        blocks = range(self.n_blocks, self.n_blocks)
        model = self._cut(blocks, has_embeddings=False, has_head=True)
        return Top(model, blocks=blocks, adaptable_names=adaptable_names(self.model))

    def block(self, blocks: range) -> Trunk:
        """Cut a trunk of some blocks, or of none, which no other one shares modules with."""
        model = self._cut(blocks, has_embeddings=False, has_head=False)
        return Trunk(model, blocks=blocks, adaptable_names=adaptable_names(self.model))

    def weights(self, bottom_blocks: int, top_blocks: int) -> tuple[list[Weight], list[Weight]]:
        """List the stored tensors of agent and server, each once on its side, whatever it is tied to."""
        last = self.n_blocks - top_blocks
        ends = [self._weights_of("embeddings"), self._weights_of("head")]
        ends += [self._weights_of(index) for index in (*range(bottom_blocks), *range(last, self.n_blocks))]
        trunk = [self._weights_of(index) for index in range(bottom_blocks, last)]
        agent, server = ({key: weight for part in parts for key, weight in part.items()} for parts in (ends, trunk))
        return list(agent.values()), list(server.values())

    def _weights_of(self, part: str | int) -> dict[int, Weight]:
        """Give the stored tensors of a part, a block by its index, by what tells one tensor from another."""
        key = ("weights", part)
        if key not in self.measured:
            if isinstance(part, int):
                segment: Segment = self.block(range(part, part + 1))
            else:
                segment = self.embeddings() if part == "embeddings" else self.head()
            exact = kept_in_float32(self.model, DTYPES[self.dtype])
            self.measured[key] = {
                id(tensor): Weight(
                    tensor.numel(),
                    tensor.numel() * (4 if exact.search(segment.whole_model_name(name)) else tensor.element_size()),
                )
                for name, tensor in segment.model.state_dict(keep_vars=True).items()
            }
        return cast(dict[int, Weight], self.measured[key])

    def _cut(self, blocks: range, *, has_embeddings: bool, has_head: bool) -> PreTrainedModel:
        return cut(self.model, self._family, blocks=blocks, has_embeddings=has_embeddings, has_head=has_head)

    @property
    def _family(self) -> Family:
        return family_of(self.model.config.model_type)


def model_shape(source: str | os.PathLike[str] | PreTrainedConfig, *, dtype: str = "float32") -> ModelShape:
    """Build a model without its weights.

    Args:
        source: A folder with ``config.json``, "demo", a hub id of which only ``config.json`` is fetched, or a
            configuration.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        WeightsError: If the configuration is missing or damaged, or that of a quantised model.
        UnsupportedFamily: If the family is not proven to split.
        ValueError: If there is no such dtype.

    Guarantees:
        * No weight is read or allocated.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    config = source if isinstance(source, PreTrainedConfig) else _config_of(os.fspath(source))
    if getattr(config, "quantization_config", None) is not None:
        raise WeightsError("The configuration is that of a quantised model; give one in floating point.")
    family = family_of(config.model_type)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
    model.requires_grad_(False)
    partition(model, bottom_blocks=0, top_blocks=0)  # what it refuses is refused here
    blocks = cast(nn.ModuleList, model.base_model.get_submodule(family.blocks))
    return ModelShape(model, dtype, tuple(_kind(block, config, index) for index, block in enumerate(blocks)))


def _config_of(source: str) -> PreTrainedConfig:
    if source == "demo":
        return load_config(base_model_folder())
    if Path(source).is_dir():
        return load_config(Path(source))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise WeightsError(
            f"The model {source!r} is neither a folder nor one whose configuration the hub can give "
            f"({type(error).__name__}); check its name and the connection."
        ) from error
    return config


def _kind(block: nn.Module, config: PreTrainedConfig, index: int) -> str:
    """Say all of a block that its cost can depend on, save its index."""
    settings = [
        (type(module).__name__, sorted((name, value) for name, value in vars(module).items() if _is_plain(name, value)))
        for module in block.modules()
    ]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    entries = sorted(
        (name, str(values[index]))
        for name, values in vars(config).items()
        if isinstance(values, list | tuple) and len(values) == config.num_hidden_layers
    )
    return repr((settings, shapes, entries))


def _is_plain(name: str, value: object) -> bool:
    return not name.startswith("_") and name not in _INDICES and isinstance(value, bool | int | float | str)
