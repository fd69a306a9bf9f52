"""What a split point costs, told from a model's configuration alone."""

from splitfed.study.cost.costs import Costs, SideCost, StageCost, cost_of
from splitfed.study.cost.meter import FLOPS_BESIDE_TORCH, Work
from splitfed.study.cost.shape import ModelShape, model_shape
from splitfed.study.cost.timing import StepTime, compute_s, peak_memory_bytes, step_time
from splitfed.study.cost.wire import LinkCost
from splitfed.study.cost.workload import SplitPoint, Workload

__all__ = [
    "FLOPS_BESIDE_TORCH",
    "Costs",
    "LinkCost",
    "ModelShape",
    "SideCost",
    "SplitPoint",
    "StageCost",
    "StepTime",
    "Work",
    "Workload",
    "compute_s",
    "cost_of",
    "model_shape",
    "peak_memory_bytes",
    "step_time",
]
