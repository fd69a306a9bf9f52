"""What one part of a model costs: embeddings, a block, the head with the loss. Each kind is run once, on ``meta``.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

from splitfed.errors import UnsupportedFamily
from splitfed.models import Segment, adapter_shapes, set_trained_factors
from splitfed.models.factors import TRAINED_ADAPTER
from splitfed.models.lora import peft_config, target_layers
from splitfed.study.cost.meter import AttentionOfDaemons, Kept, Meter, Work, keeping, storage_of
from splitfed.study.cost.shape import DTYPES, ModelShape
from splitfed.study.cost.workload import Workload
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.per_example import PerExampleLayers


@dataclass(frozen=True)
class PartCost:
    """What one micro-batch costs in one part of a model.

    Attributes:
        forward: The forward.
        backward: The backward, the gradients of the adapter included.
        kept_bytes: Memory that is kept between the two.
        shared_bytes: Memory that all parts of a segment keep together (masks, rotary embeddings), once for all.
        peak_bytes: Most memory that is alive at a time, what is kept included.
    """

    forward: Work
    backward: Work
    kept_bytes: int = 0
    shared_bytes: int = 0
    peak_bytes: int = 0


def embedding_cost(shape: ModelShape, workload: Workload) -> PartCost:
    """Measure the way from tokens to the first block: nothing is trained there."""

    def measure() -> PartCost:
        bottom = shape.embeddings().train()
        tokens_BT = torch.zeros(workload.sequences, workload.tokens, dtype=torch.long, device="meta")
        with _measured(shape) as meter, torch.no_grad():
            bottom(tokens_BT)
        return PartCost(meter.work, Work(), peak_bytes=meter.peak_bytes)

    return _once(shape, ("embeddings", workload.sequences, workload.tokens), measure)


def frame_cost(shape: ModelShape, workload: Workload) -> PartCost:
    """Measure what a segment does besides its blocks: positions, rotary embeddings."""

    def measure() -> PartCost:
        trunk = shape.block(range(0)).train()
        with _measured(shape) as meter, torch.no_grad():
            trunk(_hidden(shape, workload))
        return PartCost(meter.work, Work())

    return _once(shape, ("frame", workload.sequences, workload.tokens), measure)


def block_cost(
    shape: ModelShape, index: int, workload: Workload, *, goes_on: bool, per_example: bool = False
) -> PartCost:
    """Measure one block in training.

    Args:
        shape: The model.
        index: The block.
        workload: Size of a micro-batch, and the adapter.
        goes_on: The backward goes on to what is before the block.
        per_example: Whether each example's own gradient is computed.
    """

    def measure() -> PartCost:
        frame = frame_cost(shape, workload).forward
        trunk = shape.block(range(index, index + 1))
        has_adapter = _adapt(trunk, workload)
        trunk.train()
        hidden_BTD = _hidden(shape, workload).requires_grad_(goes_on)
        shared: set[int] = set()
        _note_shared(trunk, shared)
        layers = PerExampleLayers(trunk) if per_example and has_adapter else None
        with _measured(shape) as meter, keeping(trunk) as kept:
            if layers is None:
                output_BTD = trunk(hidden_BTD)
                forward = _taken(meter)
                if output_BTD.requires_grad:
                    output_BTD.backward(torch.empty_like(output_BTD))
            else:
                with layers.recording(hidden_BTD[:, :, 0]) as recorded:
                    output_BTD = trunk(hidden_BTD)
                forward = _taken(meter)
                gradient_BTD = torch.empty_like(output_BTD)
                recorded.backward(output_BTD, gradient_BTD, wrt=hidden_BTD if goes_on else None)
        return _part(forward.without(frame), meter, kept, shared)

    options = (goes_on, per_example, _adapter_key(workload))
    return _once(shape, ("block", shape.kinds[index], workload.sequences, workload.tokens, *options), measure)


def head_cost(shape: ModelShape, workload: Workload) -> PartCost:
    """Measure final norm, head and loss, and the way back to the last block."""

    def measure() -> PartCost:
        top = shape.head().train()
        hidden_BTD = _hidden(shape, workload).requires_grad_()
        labels_BT = torch.zeros(workload.sequences, workload.tokens, dtype=torch.long, device="meta")
        with _measured(shape) as meter, keeping(top) as kept:
            loss = causal_lm_loss(top(hidden_BTD).logits, labels_BT, 1.0)
            forward = _taken(meter)
            loss.backward()
        return _part(forward, meter, kept, set())

    return _once(shape, ("head", workload.sequences, workload.tokens), measure)


def adapter_of_block(shape: ModelShape, index: int, workload: Workload) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a block's adapter, by whole-model key."""
    key = ("adapter", index, _adapter_key(workload))
    return cast(
        dict[str, tuple[int, ...]],
        _once(shape, key, lambda: adapter_shapes(shape.block(range(index, index + 1)), workload.lora)),
    )


def _once(shape: ModelShape, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
    if key not in shape.measured:
        shape.measured[key] = measure()
    return shape.measured[key]


def _adapter_key(workload: Workload) -> tuple[Any, ...]:
    lora = workload.lora
    return lora.rank, lora.dropout, lora.targets, workload.trained_factors


def _adapt(segment: Segment, workload: Workload) -> bool:
    """Put an adapter without values on a segment; False if none of its layers takes one."""
    if not target_layers(segment.model, workload.lora):
        return False
    with torch.device("meta"):
        config = peft_config(segment.model, workload.lora)
        inject_adapter_in_model(config, segment.model, adapter_name=TRAINED_ADAPTER)
    segment.model.requires_grad_(False)
    set_trained_factors(segment, workload.trained_factors)
    return True


def _hidden(shape: ModelShape, workload: Workload) -> Tensor:
    size = workload.sequences, workload.tokens, shape.hidden_size
    return torch.empty(size, dtype=DTYPES[shape.dtype], device="meta")


@contextmanager
def _measured(shape: ModelShape) -> Iterator[Meter]:
    try:
        with Meter() as meter, AttentionOfDaemons():
            yield meter
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedFamily(
            f"The family {shape.model.config.model_type!r} chooses its way by values, so its cost cannot be told "
            f"from a configuration ({' '.join(str(error).split())[:100]}); measure a run of it."
        ) from error


def _taken(meter: Meter) -> Work:
    """Take what was counted so far."""
    work, meter.work = meter.work, Work()
    return work


def _part(forward: Work, meter: Meter, kept: Kept, shared: set[int]) -> PartCost:
    own_bytes = kept.bytes_without(shared)
    return PartCost(forward, meter.work, own_bytes, kept.bytes_without(set()) - own_bytes, meter.peak_bytes)


def _note_shared(segment: Segment, shared: set[int]) -> None:
    """Note the storages that a segment hands to its block besides hidden states."""
    (name,) = {segment._block_list_name}
    block = segment.model.get_submodule(f"{name}.0")

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        beside = args[1:] if args else ()
        named = [value for key, value in kwargs.items() if args or key != "hidden_states"]
        shared.update(storage_of(each) for each in tree_leaves((beside, named)) if isinstance(each, Tensor))

    block.register_forward_pre_hook(note, with_kwargs=True)


__all__ = ["PartCost", "adapter_of_block", "block_cost", "embedding_cost", "frame_cost", "head_cost"]
