"""A local step run for real on each side, and what it took: what the costs told from a configuration are held against.

Shapes: B sequences, T tokens, D hidden.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitfed.models import Partition, Segment, adapter_parameters, add_adapter, partition
from splitfed.study.cost.meter import Meter
from splitfed.study.cost.workload import SplitPoint, Workload
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.link import LinkCodecs, cross, link_codecs

_TRIES: Final = 3


@dataclass(frozen=True)
class RealSide:
    """What one side took.

    Attributes:
        weight_bytes: Of the base's tensors in its segments, a tied one once.
        flops: Of its forwards and backwards.
        activation_bytes: Most memory of tensors that the step made and that were alive at once.
        compute_s: Seconds of the fastest try.
    """

    weight_bytes: int
    flops: int
    activation_bytes: int
    compute_s: float


@dataclass(frozen=True)
class RealStep:
    """What a step took.

    Attributes:
        agent: The agent's side.
        server: The server's side.
        up_payload_bytes: Payload from agent to server.
        down_payload_bytes: Payload from server to agent.
    """

    agent: RealSide
    server: RealSide
    up_payload_bytes: int
    down_payload_bytes: int


def run_step(model: PreTrainedModel, split_point: SplitPoint, workload: Workload, *, tries: int = _TRIES) -> RealStep:
    """Run each side of a step by itself, on the model's own weights, and measure it.

    A side is given what it would receive, in numbers drawn at random: neither time nor memory depends on them.

    Args:
        model: The whole model, in memory; it stays usable.
        split_point: Where to cut it.
        workload: The step: one micro-batch, without noise.
        tries: How often to time it.

    Raises:
        SplitPointError: If the trunk would hold no block, or a count is negative.
        ValueError: If the step has noise or several micro-batches, or is not tried at all.

    Guarantees:
        * The payloads are those of a link in process, to the byte.
    """
    if workload.is_noisy or workload.micro_batches > 1:
        raise ValueError("Only a step of one micro-batch without noise is run here; leave both out of the workload.")
    if tries < 1:
        raise ValueError(f"tries is {tries}; give 1 or more.")
    parts = partition(model, bottom_blocks=split_point.bottom_blocks, top_blocks=split_point.top_blocks)
    for segment in parts:
        add_adapter(segment, workload.lora, seed=0)
        segment.train()
    hidden_BTD = torch.randn(workload.sequences, workload.tokens, int(model.config.hidden_size))
    codecs, bottom_trains = link_codecs(workload.codecs), bool(adapter_parameters(parts.bottom))
    tokens_BT = torch.randint(int(model.config.vocab_size), hidden_BTD.shape[:2])

    def agent() -> int:
        return _agent_step(parts, tokens_BT, hidden_BTD, codecs, bottom_trains=bottom_trains)

    def server() -> int:
        return _server_step(parts, hidden_BTD, codecs, bottom_trains=bottom_trains)

    of_agent, up_bytes = _measured(agent, (parts.bottom, parts.top), tries)
    of_server, down_bytes = _measured(server, (parts.trunk,), tries)
    return RealStep(of_agent, of_server, up_bytes, down_bytes)


def _agent_step(
    parts: Partition, tokens_BT: Tensor, received_BTD: Tensor, codecs: LinkCodecs, *, bottom_trains: bool
) -> int:
    """Go through bottom and top and back; gives the payload that left."""
    smashed_BTD = parts.bottom(tokens_BT)
    up_bytes = cross(smashed_BTD.detach(), codecs.smashed)[1]
    output_BTD = received_BTD.clone().requires_grad_()
    causal_lm_loss(parts.top(output_BTD).logits, tokens_BT, float(tokens_BT.numel())).backward()
    assert output_BTD.grad is not None
    up_bytes += cross(output_BTD.grad, codecs.output_gradient)[1]
    if bottom_trains:
        smashed_BTD.backward(received_BTD.clone())
    return up_bytes


def _server_step(parts: Partition, received_BTD: Tensor, codecs: LinkCodecs, *, bottom_trains: bool) -> int:
    """Go through the trunk and back; gives the payload that left."""
    smashed_BTD = received_BTD.clone().requires_grad_(bottom_trains)
    output_BTD = parts.trunk(smashed_BTD)
    down_bytes = cross(output_BTD.detach(), codecs.trunk_output)[1]
    output_BTD.backward(received_BTD.clone())
    if smashed_BTD.grad is not None:
        down_bytes += cross(smashed_BTD.grad, codecs.smashed_gradient)[1]
    return down_bytes


def _measured(step: Callable[[], int], segments: tuple[Segment, ...], tries: int) -> tuple[RealSide, int]:
    payload_bytes = step()  # gradients are there from now on, as in every step but the first
    with Meter() as meter:
        step()
    seconds = []
    for _ in range(tries):
        started_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started_s)
    side = RealSide(_weight_bytes(segments), meter.work.flops, meter.peak_bytes, min(seconds))
    return side, payload_bytes


def _weight_bytes(segments: tuple[Segment, ...]) -> int:
    adapters = {id(each) for segment in segments for each in adapter_parameters(segment).values()}
    base = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for segment in segments
        for tensor in segment.model.state_dict(keep_vars=True).values()
        if id(tensor) not in adapters
    }
    return sum(base.values())
