"""A frozen second adapter under the one that is trained: what earlier rounds have left behind and nobody trains on.

FLoRA's server stacks its clients' updates, and their sum outgrows the rank that is trained; it is kept here. Both
adapters have the same scale: stacked (A below A, B beside B), they are one adapter of the sum of their ranks, which
`export_adapter` writes as any other.

Shapes: R rank, I input features, O output features.

Source: Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, 2024.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from splitfed.models.factors import RESIDUAL_ADAPTER, TRAINED_ADAPTER, factor_of, segment_factors
from splitfed.models.lora import LoraSettings, peft_config
from splitfed.models.segment import Segment


def add_residual(segment: Segment, lora: LoraSettings, rank: int) -> None:
    """Put a frozen adapter of zeros beside a segment's trained one, in place.

    Args:
        segment: A segment with its adapter.
        lora: Size and place of the trained adapter; the residual has its scale and no dropout.
        rank: Rank of the residual, 1 or more.
    """
    of_residual = replace(lora.at_rank(rank), dropout=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # two adapters are meant
        inject_adapter_in_model(peft_config(segment.model, of_residual), segment.model, adapter_name=RESIDUAL_ADAPTER)
    for module in segment.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([RESIDUAL_ADAPTER, TRAINED_ADAPTER])
    for parameter in residual_parameters(segment).values():
        parameter.data = torch.zeros(parameter.shape)  # float32, whatever the base's dtype
        parameter.requires_grad_(False)


def residual_parameters(segment: Segment) -> dict[str, nn.Parameter]:
    """List a segment's residual by whole-model key, the same keys as the adapter's.

    Args:
        segment: A segment with or without a residual.
    """
    return segment_factors(segment, RESIDUAL_ADAPTER)


def load_residual(segment: Segment, state: Mapping[str, Tensor]) -> None:
    """Set a segment's residual; keys of other segments are left aside.

    Args:
        segment: A segment with a residual.
        state: Tensors by whole-model key, A [r, I] and B [O, r], of the residual's rank or a smaller one (0 included):
            the rest is zero. Empty: all of it is zero. Nothing is changed unless all of the segment's are there.

    Raises:
        ValueError: If a key of the segment is missing, or a tensor does not fit.
    """
    fitted = fitted_residual(segment, state)
    with torch.no_grad():
        for key, parameter in residual_parameters(segment).items():
            parameter.copy_(fitted[key])


def fitted_residual(segment: Segment, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors in the shapes of a segment's residual, which is left as it is.

    Args:
        segment: A segment with a residual.
        state: As for `load_residual`.

    Returns:
        New tensors by whole-model key, for the segment's keys alone.

    Raises:
        ValueError: If a key of the segment is missing, or a tensor does not fit.
    """
    parameters = residual_parameters(segment)
    if state:
        _check_fits(state, parameters)
    fitted = {key: torch.zeros_like(parameter, requires_grad=False) for key, parameter in parameters.items()}
    for key, tensor in fitted.items():
        if state:
            n_rows, n_columns = state[key].shape
            tensor[:n_rows, :n_columns] = state[key].detach()
    return fitted


def _check_fits(state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for key, parameter in parameters.items():
        if key not in state:
            raise ValueError(f"The residual has no tensor {key!r}; give one for every adapted layer of the segment.")
        found, room = list(state[key].shape), list(parameter.shape)
        rank_axis = "AB".index(factor_of(key))
        if len(found) != 2 or found[1 - rank_axis] != room[1 - rank_axis] or found[rank_axis] > room[rank_axis]:
            raise ValueError(
                f"The residual's tensor {key!r} has shape {found}, which does not fit into {room}; "
                "use a residual of the same base and targets, and of no larger rank."
            )
    for key in parameters:
        a, b = (state[f"{key.rpartition('.lora_')[0]}.lora_{factor}.weight"] for factor in "AB")
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"The residual's factors around {key!r} have shapes {list(a.shape)} and {list(b.shape)}, which have no "
                "rank in common; give both factors of one product."
            )
