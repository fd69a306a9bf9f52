"""One causal language model as bottom, trunk and top: partition, loading of one side, LoRA adapters."""

from splitfed.models.adapters import (
    adapter_parameters,
    adapter_state,
    add_adapter,
    initial_adapter,
    load_adapter_state,
    own_names,
    remove_adapter,
)
from splitfed.models.base import resolve_base
from splitfed.models.checkpoint import Checkpoint, TensorIdentity
from splitfed.models.export import check_adapter, export_adapter
from splitfed.models.factors import set_trained_factors, trained_parameters
from splitfed.models.fingerprint import canonical_config, tensor_hashes
from splitfed.models.lora import LoraSettings, adapter_shapes
from splitfed.models.partition import Bottom, Partition, Segment, Top, Trunk, partition
from splitfed.models.ranks import adapter_ranks, settings_of
from splitfed.models.residual import fitted_residual, load_residual, residual_parameters
from splitfed.models.shell import load_config, load_shell
from splitfed.models.slices import trunk_slice
from splitfed.models.weights import load_bottom_and_top, load_trunk, segment_tensor_names

__all__ = [
    "Bottom",
    "Checkpoint",
    "LoraSettings",
    "Partition",
    "Segment",
    "TensorIdentity",
    "Top",
    "Trunk",
    "adapter_parameters",
    "adapter_ranks",
    "adapter_shapes",
    "adapter_state",
    "add_adapter",
    "canonical_config",
    "check_adapter",
    "export_adapter",
    "fitted_residual",
    "initial_adapter",
    "load_adapter_state",
    "load_bottom_and_top",
    "load_config",
    "load_residual",
    "load_shell",
    "load_trunk",
    "own_names",
    "partition",
    "remove_adapter",
    "residual_parameters",
    "resolve_base",
    "segment_tensor_names",
    "set_trained_factors",
    "settings_of",
    "tensor_hashes",
    "trained_parameters",
    "trunk_slice",
]
