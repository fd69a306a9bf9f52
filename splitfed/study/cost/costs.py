"""What a split point costs: agent, server and the link between them, from a configuration alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splitfed.models.factors import factor_of
from splitfed.study.cost.meter import Work
from splitfed.study.cost.parts import (
    PartCost,
    adapter_of_block,
    block_cost,
    embedding_cost,
    frame_cost,
    head_cost,
)
from splitfed.study.cost.shape import ModelShape, Weight
from splitfed.study.cost.wire import LinkCost, link_cost
from splitfed.study.cost.workload import SplitPoint, Workload

_ITEM_BYTES = 4
_SUM_ITEM_BYTES = 8
_AGENT_COPIES = 3
"""Of the adapter on an agent: the one that is trained, what the round started from, what leaves."""
_SERVER_COPIES = 6
"""Of the trunk's on the server: in the module, in the run's state, trained, as this version has it, what a round
leaves, and its mean."""
_MOMENTS = 2
_ADAMW_OPERATIONS, _ADAMW_TRAFFIC_ITEMS = 8, 16
"""Calls of torch's AdamW for each tensor, with the check of the gradients' norm; elements read and written for each."""
_CLIP_OPERATIONS, _CLIP_TRAFFIC_ITEMS = 8, 8
"""The same for clipping and summing each example's gradient."""


@dataclass(frozen=True)
class StageCost:
    """What one micro-batch costs in one stage of a step, or the whole step in an update.

    Attributes:
        work: What is computed.
        coded_elements: Elements that a codec encodes or decodes.
        noised_elements: Elements that are clipped and noised.
        kept_bytes: What autograd keeps of the stage's forward until its backward.
    """

    work: Work
    coded_elements: int = 0
    noised_elements: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class SideCost:
    """What one side holds and computes.

    Attributes:
        parameters: Of its segments' base; a tied embedding once.
        weight_bytes: The same in bytes.
        adapter_parameters: Of its adapter.
        trainable_parameters: Of these, those that are trained in a round.
        adapter_bytes: Its adapter in bytes.
        optimiser_bytes: AdamW's moments.
        gradient_bytes: Gradients of the adapter; each example's own with DP-SGD.
        kept_bytes: What a micro-batch that waits for the other side keeps.
        in_flight: Micro-batches that wait while another one is at work, at most.
        working_bytes: Most memory of a forward and backward at work, on top of those that wait.
        copies_bytes: Further copies of the adapter.
        work: What a local step computes.
    """

    parameters: int
    weight_bytes: int
    adapter_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    optimiser_bytes: int
    gradient_bytes: int
    kept_bytes: int
    in_flight: int
    working_bytes: int
    copies_bytes: int
    work: Work

    @property
    def flops(self) -> int:
        """FLOPs of a local step, forward and backward."""
        return self.work.flops

    @property
    def activation_bytes(self) -> int:
        """Memory of activations at its largest: what waits, and what is at work."""
        return self.in_flight * self.kept_bytes + self.working_bytes

    @property
    def memory_bytes(self) -> int:
        """Largest memory of all tensors; a process has its libraries besides (see `peak_memory_bytes`)."""
        states = self.adapter_bytes + self.optimiser_bytes + self.gradient_bytes + self.copies_bytes
        return self.weight_bytes + states + self.activation_bytes


@dataclass(frozen=True)
class Costs:
    """What a local step costs at a split point.

    Attributes:
        split_point: The split point.
        workload: What the step consists of.
        agent: The agent's side.
        server: The server's side, for one agent.
        link: What crosses between them.
        bottom_forward: A micro-batch's way through the bottom, out to the wire.
        top: From the wire through the top and back to it.
        bottom_backward: From the wire back through the bottom.
        trunk_forward: From the wire through the trunk and out again.
        trunk_backward: The same on the way back.
        agent_update: The agent's optimiser step.
        server_update: The server's.
    """

    split_point: SplitPoint
    workload: Workload
    agent: SideCost
    server: SideCost
    link: LinkCost
    bottom_forward: StageCost
    top: StageCost
    bottom_backward: StageCost
    trunk_forward: StageCost
    trunk_backward: StageCost
    agent_update: StageCost
    server_update: StageCost


def cost_of(shape: ModelShape, split_point: SplitPoint, workload: Workload) -> Costs:
    """Say what a local step costs at a split point.

    Args:
        shape: The model, as `model_shape` gives it; what is measured of its blocks serves further calls.
        split_point: Where it is cut.
        workload: What the step consists of.

    Raises:
        SplitPointError: If the trunk would hold no block, or a count is negative.
        UnsupportedFamily: If the family's cost cannot be told without values.
        ValueError: If no layer of the blocks is called as one of the adapter's targets.

    Guarantees:
        * Parameters, weight bytes and payloads are those of a real run, to the byte.
        * FLOPs are what torch's counter counts in the real segments, with the formulas of ``FLOPS_BESIDE_TORCH``.
        * What autograd keeps is what it keeps in the real segments, to the byte.
        * No weight is read or allocated.
    """
    key = ("costs", split_point, workload)
    if key not in shape.measured:  # the same on every device of a fleet
        shape.measured[key] = _cost_of(shape, split_point, workload)
    found: Costs = shape.measured[key]
    return found


def _cost_of(shape: ModelShape, split_point: SplitPoint, workload: Workload) -> Costs:
    shape.check(split_point.bottom_blocks, split_point.top_blocks)
    last = shape.n_blocks - split_point.top_blocks
    of_bottom, of_trunk, of_top = (
        range(split_point.bottom_blocks),
        range(split_point.bottom_blocks, last),
        range(last, shape.n_blocks),
    )
    adapters = {index: adapter_of_block(shape, index, workload) for index in range(shape.n_blocks)}
    bottom_trains = any(adapters[index] for index in of_bottom)
    dp = workload.is_per_example

    bottom = _blocks(shape, of_bottom, workload, goes_on=False, per_example=dp)
    trunk = _blocks(shape, of_trunk, workload, goes_on=bottom_trains)
    top = _blocks(shape, of_top, workload, goes_on=True, per_example=dp)
    embedding, frame, head = (of(shape, workload) for of in (embedding_cost, frame_cost, head_cost))

    hidden = workload.sequences * workload.tokens * shape.hidden_size
    noised = hidden if workload.is_noisy else 0
    answered = hidden if bottom_trains else 0
    bottom_forward = StageCost(embedding.forward + _sum(bottom, "forward"), hidden, noised, _kept(bottom))
    from_head = head.forward + head.backward
    through_top = StageCost(from_head + _both(top), 2 * hidden, noised, _kept([*top, head]))
    bottom_backward = StageCost(_sum(bottom, "backward"), answered)
    trunk_forward = StageCost(frame.forward + _sum(trunk, "forward"), 2 * hidden, kept_bytes=_kept(trunk))
    trunk_backward = StageCost(_sum(trunk, "backward"), hidden + answered)

    times = workload.micro_batches
    agent_weights, server_weights = shape.weights(split_point.bottom_blocks, split_point.top_blocks)
    of_agent = {key: size for index in (*of_bottom, *of_top) for key, size in adapters[index].items()}
    of_server = {key: size for index in of_trunk for key, size in adapters[index].items()}

    hidden_bytes = hidden * _ITEM_BYTES  # on the wire's ends everything is float32
    agent = _side(
        agent_weights,
        of_agent,
        workload,
        copies=_AGENT_COPIES,
        per_example=dp,
        kept_bytes=_kept(bottom) + 2 * hidden_bytes,
        in_flight=min(2 * workload.max_in_flight, times) - 1,
        working_bytes=max(_peak([*top, head]) + _kept(bottom), _peak(bottom)) + 4 * hidden_bytes,
        work=(bottom_forward.work + through_top.work + bottom_backward.work) * times,
    )
    server = _side(
        server_weights,
        of_server,
        workload,
        copies=_SERVER_COPIES,
        per_example=False,
        kept_bytes=_kept(trunk) + 2 * hidden_bytes,
        in_flight=min(workload.max_in_flight, times) - 1,
        working_bytes=_peak(trunk) + 4 * hidden_bytes,
        work=(trunk_forward.work + trunk_backward.work) * times,
    )
    return Costs(
        split_point,
        workload,
        agent,
        server,
        link_cost(
            shape,
            workload,
            bottom_trains=bottom_trains,
            adapter_up=_trained(of_agent, workload),
            adapter_down=of_agent,
        ),
        bottom_forward=bottom_forward,
        top=through_top,
        bottom_backward=bottom_backward,
        trunk_forward=trunk_forward,
        trunk_backward=trunk_backward,
        agent_update=_update(of_agent, workload, per_example=dp),
        server_update=_update(of_server, workload, per_example=False),
    )


def _blocks(
    shape: ModelShape, blocks: range, workload: Workload, *, goes_on: bool, per_example: bool = False
) -> list[PartCost]:
    """Measure consecutive blocks; the backward reaches a block where something before it is trained."""
    costs = []
    for index in blocks:
        costs.append(block_cost(shape, index, workload, goes_on=goes_on, per_example=per_example))
        goes_on = goes_on or bool(_trained(adapter_of_block(shape, index, workload), workload))
    return costs


def _sum(parts: Iterable[PartCost], direction: str) -> Work:
    return sum((getattr(part, direction) for part in parts), start=Work())


def _both(parts: Iterable[PartCost]) -> Work:
    return sum((part.forward + part.backward for part in parts), start=Work())


def _kept(parts: Sequence[PartCost]) -> int:
    """Add up what parts in a row keep for their backward."""
    return sum(part.kept_bytes for part in parts) + max((part.shared_bytes for part in parts), default=0)


def _peak(parts: Sequence[PartCost]) -> int:
    """Give the most memory of forwards in a row and backwards in the opposite order."""
    return max((_kept(parts[:index]) + part.peak_bytes for index, part in enumerate(parts)), default=0)


def _side(
    weights: Sequence[Weight],
    adapter: Mapping[str, Sequence[int]],
    workload: Workload,
    *,
    copies: int,
    per_example: bool,
    kept_bytes: int,
    in_flight: int,
    working_bytes: int,
    work: Work,
) -> SideCost:
    adapter_bytes = _ITEM_BYTES * _elements(adapter)
    trained = _elements(_trained(adapter, workload))
    per_element = _ITEM_BYTES * workload.sequences + _SUM_ITEM_BYTES + _ITEM_BYTES if per_example else _ITEM_BYTES
    return SideCost(
        parameters=sum(weight.elements for weight in weights),
        weight_bytes=sum(weight.size_bytes for weight in weights),
        adapter_parameters=_elements(adapter),
        trainable_parameters=trained,
        adapter_bytes=adapter_bytes,
        optimiser_bytes=_MOMENTS * _ITEM_BYTES * trained,
        gradient_bytes=per_element * trained,
        kept_bytes=kept_bytes,
        in_flight=in_flight,
        working_bytes=working_bytes,
        copies_bytes=(copies - 1) * adapter_bytes,
        work=work,
    )


def _trained(adapter: Mapping[str, Sequence[int]], workload: Workload) -> dict[str, Sequence[int]]:
    return {key: size for key, size in adapter.items() if factor_of(key) in workload.trained_factors}


def _elements(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(size) for size in shapes.values())


def _update(adapter: Mapping[str, Sequence[int]], workload: Workload, *, per_example: bool) -> StageCost:
    """Count AdamW's step, tensor by tensor; with DP-SGD also clip, sum and noise of each example's gradient."""
    trained = _trained(adapter, workload)
    elements = _elements(trained)
    traffic_bytes = _ADAMW_TRAFFIC_ITEMS * _ITEM_BYTES * elements
    operations = _ADAMW_OPERATIONS * len(trained)
    if per_example:
        traffic_bytes += _CLIP_TRAFFIC_ITEMS * _ITEM_BYTES * elements * workload.batch_size
        operations += _CLIP_OPERATIONS * len(trained) * workload.micro_batches
    work = Work(traffic_bytes=traffic_bytes, operations=operations)
    return StageCost(work, noised_elements=elements if per_example else 0)
