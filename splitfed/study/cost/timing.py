"""How long a local step takes, and how much memory a process needs: costs on given devices and a given link."""

from dataclasses import dataclass
from functools import partial
from typing import Final

from splitfed.config.device import DeviceProfile, LinkSection
from splitfed.study.cost.costs import Costs, SideCost, StageCost
from splitfed.study.cost.meter import Work

_ALLOCATOR: Final = 1.9
"""Memory of a process ÷ memory in use, for what comes and goes: daemons keep freed blocks (see `prepare_process`), and
the blocks of a loaded checkpoint, of forward and of backward have other sizes. Measured by benchmarks/cost_model.py."""


@dataclass(frozen=True)
class StepTime:
    """How long a local step takes, in seconds.

    Attributes:
        step_s: From its first forward to its end.
        agent_s: Time that the agent computes.
        server_s: Time that the server computes.
        link_s: Time that bytes are on their way, both directions and round trips, as if one after the other.
    """

    step_s: float
    agent_s: float
    server_s: float
    link_s: float


def step_time(costs: Costs, agent: DeviceProfile, server: DeviceProfile, link: LinkSection) -> StepTime:
    """Say how long a local step takes.

    The step is gone through as the client step goes through it: at most ``max_in_flight`` micro-batches between
    forward and backward, gradients in order. Agent, wire up, server and wire down each do one thing at a time.

    Args:
        costs: The step.
        agent: The agent's device.
        server: The server's device.
        link: The link between them.

    Raises:
        ConfigError: If a profile has no rate for the model's number format.
    """
    line = _Line(link)
    work = partial(_stage_s, codecs=costs.workload.codecs.smashed)
    bottom_s, top_s, back_s = (
        work(stage, device=agent) for stage in (costs.bottom_forward, costs.top, costs.bottom_backward)
    )
    forward_s, backward_s = (work(stage, device=server) for stage in (costs.trunk_forward, costs.trunk_backward))
    update_s, trunk_update_s = work(costs.agent_update, device=agent), work(costs.server_update, device=server)
    bottom_s, top_s = bottom_s + agent.compute.request_s, top_s + agent.compute.request_s
    forward_s, backward_s, trunk_update_s = (
        work_s + server.compute.request_s for work_s in (forward_s, backward_s, trunk_update_s)
    )

    now_s = 0.0
    waiting: list[float] = []
    returning: list[float] = []

    def turn(now_s: float) -> float:
        now_s = max(now_s, waiting.pop(0)) + top_s
        returning.append(
            line.ask(now_s, costs.link.output_gradient.wire_bytes, backward_s, costs.link.smashed_gradient.wire_bytes)
        )
        while len(returning) > costs.workload.max_in_flight:
            now_s = max(now_s, returning.pop(0)) + back_s
        return now_s

    for _ in range(costs.link.micro_batches):
        if len(waiting) == costs.workload.max_in_flight:
            now_s = turn(now_s)
        now_s += bottom_s
        waiting.append(line.ask(now_s, costs.link.smashed.wire_bytes, forward_s, costs.link.trunk_output.wire_bytes))
    while waiting:
        now_s = turn(now_s)
    applied_s = line.ask(now_s, costs.link.step_up.wire_bytes, trunk_update_s, costs.link.step_down.wire_bytes)
    while returning:
        now_s = max(now_s, returning.pop(0)) + back_s
    times = costs.link.micro_batches
    return StepTime(
        step_s=max(now_s + update_s, applied_s),
        agent_s=times * (bottom_s + top_s + back_s) + update_s,
        server_s=times * (forward_s + backward_s) + trunk_update_s,
        link_s=costs.link.up_bytes / link.up_bytes_per_s
        + costs.link.down_bytes / link.down_bytes_per_s
        + (2 * times + 1) * link.latency_s,
    )


def peak_memory_bytes(side: SideCost, device: DeviceProfile) -> int:
    """Say how much memory a side's process needs at its largest.

    Args:
        side: What it holds and computes.
        device: The device, which says what a process needs before it holds a model.
    """
    return device.process.memory_bytes + side.weight_bytes + round(_ALLOCATOR * (side.memory_bytes - side.weight_bytes))


def compute_s(work: Work, device: DeviceProfile) -> float:
    """Say how long a computation takes.

    A matrix product takes as long as its arithmetic or its memory traffic, whichever is longer; everything else as long
    as its traffic; and each call takes its time.

    Args:
        work: What is computed.
        device: Where.

    Raises:
        ConfigError: If the profile has no rate for a number format.
    """
    compute = device.compute
    total_s = work.operations * compute.call_s + work.traffic_bytes / compute.bandwidth_bytes_per_s
    for each, calls in work.matmuls.items():
        rate = device.rate(each.dtype, each.flops, head_size=each.head_size)
        total_s += calls * max(each.flops / rate, each.traffic_bytes / compute.bandwidth_bytes_per_s)
    return total_s * compute.correction


def _stage_s(stage: StageCost, *, codecs: str, device: DeviceProfile) -> float:
    coding = device.codecs.rate(codecs)
    noising_s = stage.noised_elements / device.compute.noise_elements_per_s
    return compute_s(stage.work, device) + stage.coded_elements / coding + noising_s


@dataclass
class _Line:
    """Wire up, server and wire down, each busy until some time."""

    link: LinkSection
    up_s: float = 0.0
    server_s: float = 0.0
    down_s: float = 0.0

    def ask(self, at_s: float, up_bytes: int, work_s: float, down_bytes: int) -> float:
        """Give when the answer is there to a request made at some time."""
        self.up_s = max(self.up_s, at_s) + up_bytes / self.link.up_bytes_per_s
        self.server_s = max(self.server_s, self.up_s + self.link.latency_s / 2) + work_s
        self.down_s = max(self.down_s, self.server_s) + down_bytes / self.link.down_bytes_per_s
        return self.down_s + self.link.latency_s / 2
