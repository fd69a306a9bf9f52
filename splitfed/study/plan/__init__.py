"""The split planner: where to cut for a device, a link and what must be kept."""

from splitfed.config.plan import Limits
from splitfed.study.plan.choice import Constraint, judge, pareto
from splitfed.study.plan.classes import device_classes, device_profile
from splitfed.study.plan.evidence import Evidence, evidence
from splitfed.study.plan.files import agent_config, server_config, write_files
from splitfed.study.plan.leakage import Leakage, LeakagePoint, LeakageTable
from splitfed.study.plan.loss import LossCost, LossPoint, LossTable
from splitfed.study.plan.plans import Plan
from splitfed.study.plan.request import Answer, Request, Seat, plan

__all__ = [
    "Answer",
    "Constraint",
    "Evidence",
    "Leakage",
    "LeakagePoint",
    "LeakageTable",
    "Limits",
    "LossCost",
    "LossPoint",
    "LossTable",
    "Plan",
    "Request",
    "Seat",
    "agent_config",
    "device_classes",
    "device_profile",
    "evidence",
    "judge",
    "pareto",
    "plan",
    "server_config",
    "write_files",
]
