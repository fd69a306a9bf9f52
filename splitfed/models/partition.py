"""One causal language model as three segments, bottom, trunk and top, which share its parameters.

A segment is the model's own Hugging Face class with fewer blocks. Masks, rotary embeddings, sliding windows, attention
back ends and the cache stay the library's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from splitfed.errors import SplitPointError, UnsupportedFamily
from splitfed.models.cut import adaptable_names, cut
from splitfed.models.families import Family, family_of
from splitfed.models.segment import Bottom, Segment, Top, Trunk

__all__ = ["Bottom", "Partition", "Segment", "Top", "Trunk", "check_split_point", "partition"]


@dataclass(frozen=True)
class Partition:
    """The three segments of one model.

    Attributes:
        bottom: Embeddings and the first ``bottom_blocks`` blocks.
        trunk: Every block between.
        top: The last ``top_blocks`` blocks, final norm and head.
        bottom_blocks: Blocks in the bottom.
        top_blocks: Blocks in the top.
    """

    bottom: Bottom
    trunk: Trunk
    top: Top
    bottom_blocks: int
    top_blocks: int

    def __iter__(self) -> Iterator[Segment]:
        return iter((self.bottom, self.trunk, self.top))


def partition(model: PreTrainedModel, *, bottom_blocks: int, top_blocks: int) -> Partition:
    """Cut a causal language model at two split points.

    Args:
        model: A causal language model of a supported family; it stays usable.
        bottom_blocks: Blocks in the bottom, 0 or more (0: embeddings only).
        top_blocks: Blocks in the top, 0 or more (0: final norm and head only).

    Raises:
        SplitPointError: If the trunk would hold no block, or a count is negative.
        UnsupportedFamily: If the family is not proven to split, or the configuration asks for a loss over all routers
            (``output_router_logits``) or gives blocks settings of their own (``per_layer_config``).
        ValueError: If ``model`` is not a model of transformers.

    Guarantees:
        * Segments chained give the whole model's logits, loss and gradients, up to float32 rounding, with padding on
          either side.
        * Cached decoding through the segments, each with its own cache, gives the whole model's logits.
        * Bottom and trunk return hidden states before the final norm.
        * The segments' parameters are the given model's own ``Parameter`` objects, the trunk's are its blocks'.
        * The given model's modules and configuration are not changed, and it generates as before.
    """
    family = _checked_family(model)
    n_blocks = len(cast(nn.ModuleList, model.base_model.get_submodule(family.blocks)))
    check_split_point(n_blocks, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    first, last = bottom_blocks, n_blocks - top_blocks
    bottom = cut(model, family, blocks=range(first), has_embeddings=True, has_head=False)
    trunk = cut(model, family, blocks=range(first, last), has_embeddings=False, has_head=False)
    top = cut(model, family, blocks=range(last, n_blocks), has_embeddings=False, has_head=True)
    names = adaptable_names(model)
    return Partition(
        bottom=Bottom(bottom, blocks=range(first), adaptable_names=names),
        trunk=Trunk(trunk, blocks=range(first, last), adaptable_names=names),
        top=Top(top, blocks=range(last, n_blocks), adaptable_names=names),
        bottom_blocks=bottom_blocks,
        top_blocks=top_blocks,
    )


def check_split_point(n_blocks: int, *, bottom_blocks: int, top_blocks: int) -> None:
    """Refuse a split point which leaves the trunk without a block.

    Args:
        n_blocks: Blocks of the whole model.
        bottom_blocks: Blocks wanted in the bottom.
        top_blocks: Blocks wanted in the top.

    Raises:
        SplitPointError: If either count is negative, or their sum exceeds ``n_blocks - 1``.
    """
    if bottom_blocks < 0 or top_blocks < 0 or bottom_blocks + top_blocks > n_blocks - 1:
        raise SplitPointError(
            f"bottom_blocks={bottom_blocks} and top_blocks={top_blocks} do not split a model of {n_blocks} blocks; "
            f"both must be 0 or more and their sum at most {n_blocks - 1}, so that the trunk keeps a block."
        )


def _checked_family(model: PreTrainedModel) -> Family:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"partition takes a causal language model of transformers, not a {type(model).__name__}; "
            "of a PeftModel give get_base_model()."
        )
    family = family_of(model.config.model_type)
    if getattr(model.config, "output_router_logits", False):
        raise UnsupportedFamily(
            "output_router_logits=true in the model's configuration adds a loss over the routers of every block, "
            "which no segment can see; set it to false."
        )
    if getattr(model.config, "is_heterogeneous", False):
        raise UnsupportedFamily(
            "per_layer_config in the model's configuration gives blocks settings of their own, which is not proven "
            "to split; use a model without it."
        )
    return family
