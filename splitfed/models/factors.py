"""The LoRA factors that a segment holds, by whole-model key, and which of them are trained.

Shapes: R rank, I input features, O output features.
"""

import re
from collections.abc import Iterable
from typing import Final

from torch import nn

from splitfed.models.segment import Segment

TRAINED_ADAPTER: Final = "default"
"""peft's name for the adapter that a run trains."""

RESIDUAL_ADAPTER: Final = "residual"
"""peft's name for the frozen one under it."""

_FACTORS: Final = frozenset({"A", "B"})


def segment_factors(segment: Segment, adapter_name: str) -> dict[str, nn.Parameter]:
    """List the factors of one of a segment's adapters.

    Args:
        segment: A segment with or without that adapter.
        adapter_name: The adapter, as peft calls it.

    Returns:
        Parameters by keys such as ``model.layers.3.self_attn.q_proj.lora_A.weight``: A is [R, I] and B is [O, R].
    """
    infix = re.compile(rf"\.lora_(A|B)\.{re.escape(adapter_name)}\.weight$")
    return {
        infix.sub(r".lora_\1.weight", segment.whole_model_name(name)): parameter
        for name, parameter in segment.model.named_parameters()
        if infix.search(name)
    }


def set_trained_factors(segment: Segment, factors: Iterable[str]) -> None:
    """Say which factors of a segment's adapter are trained from now on; the others keep their values.

    The parameters stay the same objects, so slices of a trunk follow it. A gradient that a factor has gathered is
    forgotten when it is frozen, so that no optimiser applies it.

    Args:
        segment: A segment with or without an adapter.
        factors: "A", "B" or both.

    Raises:
        ValueError: If ``factors`` is empty or holds anything else.
    """
    chosen = frozenset(factors)
    if not chosen or not chosen <= _FACTORS:
        raise ValueError(f'The factors to train are {sorted(chosen)}; give "A", "B" or both.')
    for key, parameter in segment_factors(segment, TRAINED_ADAPTER).items():
        is_trained = factor_of(key) in chosen
        parameter.requires_grad_(is_trained)
        if not is_trained:
            parameter.grad = None


def trained_parameters(segment: Segment) -> dict[str, nn.Parameter]:
    """List the parameters of a segment's adapter that are trained: what an optimiser is made of.

    Args:
        segment: A segment with or without an adapter.
    """
    factors = segment_factors(segment, TRAINED_ADAPTER)
    return {key: parameter for key, parameter in factors.items() if parameter.requires_grad}


def factor_of(key: str) -> str:
    """Say whether a whole-model key names an "A" or a "B".

    Args:
        key: Ends in ``lora_A.weight`` or ``lora_B.weight``.

    Raises:
        ValueError: If it does not.
    """
    for factor in _FACTORS:
        if key.endswith(f".lora_{factor}.weight"):
            return factor
    raise ValueError(f"The key {key!r} names no LoRA factor; it must end in lora_A.weight or lora_B.weight.")
