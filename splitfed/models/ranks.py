"""Adapters whose layers have ranks of their own: which ranks a state has, and the settings that describe it.

Shapes: R rank, I input features, O output features.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from splitfed.models.factors import factor_of
from splitfed.models.lora import LoraSettings


def adapter_ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read the rank of every adapted layer off its factors.

    Args:
        state: An adapter by whole-model key: A is [R, I] and B is [O, R].

    Returns:
        Ranks by the layer's name in the whole model.

    Raises:
        ValueError: If a key names no factor, one of a layer's factors is missing, or the two have different ranks.
    """
    ranks: dict[str, int] = {}
    for key in sorted(state):
        layer = key.removesuffix(f".lora_{factor_of(key)}.weight")
        a, b = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
        if a is None or b is None:
            missing = "A" if a is None else "B"
            raise ValueError(
                f"The adapter has no tensor '{layer}.lora_{missing}.weight'; give both factors of a layer."
            )
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise ValueError(
                f"The factors of {layer!r} have shapes {list(a.shape)} and {list(b.shape)}, which have no rank in "
                "common; give A as [rank, inputs] and B as [outputs, rank]."
            )
        ranks[layer] = a.shape[0]
    return ranks


def settings_of(state: Mapping[str, Tensor], lora: LoraSettings) -> LoraSettings:
    """Describe an adapter of a run, whatever the ranks of its layers; the scale is the run's.

    Args:
        state: The adapter by whole-model key; not empty.
        lora: The run's settings.

    Returns:
        The run's settings, with the most common rank of the adapter (the larger one where two are), and every other
        rank by its layer.

    Raises:
        ValueError: If a key names no factor, one of a layer's factors is missing, or the two have different ranks.
    """
    ranks = adapter_ranks(state)
    if not ranks:
        return lora
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    return replace(lora.at_rank(usual), ranks=others)
