"""Which layers LoRA adapts, in what shapes, and the same in peft's words.

Shapes: R rank, I input features, O output features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitfed.models.cut import adaptable_layers, adaptable_names
from splitfed.models.segment import Segment


@dataclass(frozen=True)
class LoraSettings:
    """What peft calls ``r``, ``lora_alpha``, ``lora_dropout`` and ``target_modules``.

    Attributes:
        rank: R, 1 or more.
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of dropping an input of the adapter, in [0, 1).
        targets: Last name components of the layers to adapt; None for every linear layer of the blocks, or what
            ``families`` lists for the family.
        ranks: Layers with another rank than R, by their name in the whole model; their update has the same scale.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    def alpha_at(self, rank: int) -> float:
        """The alpha with which an update of another rank has the same scale.

        Args:
            rank: The other rank, 1 or more.
        """
        return self.alpha * rank / self.rank

    def at_rank(self, rank: int) -> "LoraSettings":
        """The same adapter at another rank in all layers: for a client that can hold less, or a sum of adapters.

        Args:
            rank: The rank, 1 or more.
        """
        return replace(self, rank=rank, alpha=self.alpha_at(rank), ranks={})


def adapter_shapes(source: Segment | PreTrainedModel, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Say which tensors an adapter consists of, whether or not it is there yet.

    Args:
        source: A segment or the whole model, on any device (``meta`` included).
        lora: Size and place of the adapter.

    Returns:
        Shapes by whole-model key.

    Raises:
        ValueError: If no layer of the whole model's blocks is called as one of ``lora.targets``, or a rank is given for
            a layer that is not adapted.
    """
    if isinstance(source, Segment):
        check_targets(lora, source.adaptable_names)
        layers = {source.whole_model_name(name): layer for name, layer in target_layers(source.model, lora).items()}
    else:
        check_targets(lora, adaptable_names(source))
        layers = target_layers(source, lora)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        n_inputs, n_outputs = _layer_size(layer)
        rank = lora.ranks.get(name, lora.rank)
        shapes[f"{name}.lora_A.weight"] = (rank, n_inputs)
        shapes[f"{name}.lora_B.weight"] = (n_outputs, rank)
    return shapes


def target_layers(model: PreTrainedModel, lora: LoraSettings) -> dict[str, nn.Module]:
    """Find the layers to adapt.

    Args:
        model: A segment's model, or the whole one, on any device.
        lora: Size and place of the adapter.

    Returns:
        Linear layers of the blocks, by their name in ``model``.
    """
    layers = adaptable_layers(model)
    if lora.targets is None:
        return layers
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in lora.targets}


def peft_config(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """Say in peft's words which layers of a model are adapted, and how.

    Targets are last name components, as other tools expect, or full names where a component alone would also match a
    layer that is not adapted.

    Args:
        model: A segment's model, or the whole one, on any device.
        lora: Size and place of the adapter, with the ranks of single layers by their names in ``model``.
    """
    layers = target_layers(model, lora)
    components = {name.rpartition(".")[2] for name in layers}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in components}
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=dict(lora.ranks),
        alpha_pattern={name: lora.alpha_at(rank) for name, rank in lora.ranks.items()},
        lora_dropout=lora.dropout,
        target_modules=sorted(components if matched == layers.keys() else layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def check_targets(lora: LoraSettings, present: frozenset[str]) -> None:
    """Refuse a target which no layer has for a name, and a rank of a layer which is none of the targets.

    Args:
        lora: Size and place of the adapter.
        present: Names to choose among.

    Raises:
        ValueError: If one of ``lora.targets`` is not among them, or a layer of ``lora.ranks`` is not called as a
            target, or has a rank below 1.
    """
    unknown = sorted(set(lora.targets or ()) - present)
    if unknown:
        raise ValueError(
            f"No layer of the blocks that LoRA can adapt is called {unknown[0]!r}, which is among its targets; "
            f"choose among {', '.join(sorted(present))}."
        )
    for name, rank in lora.ranks.items():
        if name.rpartition(".")[2] not in (present if lora.targets is None else lora.targets) or rank < 1:
            raise ValueError(
                f"The layer {name!r} cannot have rank {rank}; give ranks of 1 or more, for layers that are adapted, by "
                "their full names."
            )


def _layer_size(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return int(layer.nx), int(layer.nf)
