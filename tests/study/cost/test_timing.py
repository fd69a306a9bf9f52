"""Step time on given devices: the arithmetic of a schedule, by hand."""

import pytest

from splitfed.config.device import (
    AttentionSection,
    CodecRates,
    ComputeSection,
    DeviceProfile,
    DeviceSection,
    LinkSection,
    MatmulSection,
    ProcessSection,
)
from splitfed.models import LoraSettings
from splitfed.study.cost import (
    SplitPoint,
    Work,
    Workload,
    compute_s,
    cost_of,
    model_shape,
    peak_memory_bytes,
    step_time,
)
from splitfed.study.cost.meter import Matmul
from tests.equivalence.tiny_models import tiny_config

FAST = LinkSection(up_bits_per_s=1e13, down_bits_per_s=1e13, latency_s=0.0)


def device(rate: float = 1e9, *, memory_bytes: int = 100, request_s: float = 0.0) -> DeviceProfile:
    """A device that does nothing but matrix products."""
    return DeviceProfile(
        device=DeviceSection(name="d", source="test", memory_bytes=10**9),
        matmul=MatmulSection(float32=[[1.0, rate]]),
        compute=ComputeSection(bandwidth_bytes_per_s=1e15, call_s=0.0, request_s=request_s, noise_elements_per_s=1e16),
        codecs=CodecRates(none=1e16, bf16=1e16, fp16=1e16, int8=1e16),
        process=ProcessSection(memory_bytes=memory_bytes),
    )


def costs(micro_batch_size: int | None = None, max_in_flight: int = 1):
    workload = Workload(
        batch_size=4,
        micro_batch_size=micro_batch_size,
        tokens=12,
        max_in_flight=max_in_flight,
        lora=LoraSettings(rank=2),
    )
    return cost_of(model_shape(tiny_config("llama")), SplitPoint(1, 1), workload)


def test_computation_is_arithmetic_traffic_and_calls() -> None:
    work = Work(operations=3, traffic_bytes=2_000_000)
    work.matmuls[Matmul("float32", 10**9, 10**6)] = 2  # bound by arithmetic
    work.matmuls[Matmul("float32", 10, 10**6)] = 1  # bound by traffic
    own = device(1e9).model_copy(
        update={"compute": ComputeSection(bandwidth_bytes_per_s=1e6, call_s=0.5, correction=2.0)}
    )
    assert compute_s(work, own) == pytest.approx(2.0 * (3 * 0.5 + 2.0 + 2 * 1.0 + 1.0))


def test_one_micro_batch_takes_everything_one_after_the_other() -> None:
    cost = costs()
    link = LinkSection(up_bits_per_s=8e6, down_bits_per_s=4e6, latency_s=0.25)
    found = step_time(cost, device(1e9), device(2e9), link)
    assert found.agent_s == pytest.approx(cost.agent.flops / 1e9, rel=1e-2)
    assert found.server_s == pytest.approx(cost.server.flops / 2e9, rel=1e-2)
    assert found.link_s == pytest.approx(cost.link.up_bytes / 1e6 + cost.link.down_bytes / 5e5 + 3 * 0.25)
    # the request that ends a step goes out while the smashed gradient is on its way: one round trip is for nothing
    assert found.step_s == pytest.approx(found.agent_s + found.server_s + found.link_s - 0.25, rel=1e-2)


def test_a_request_takes_its_time_at_both_ends() -> None:
    cost, base = costs(), step_time(costs(), device(), device(), FAST)
    asking = step_time(cost, device(request_s=1.0), device(), FAST)
    assert (asking.agent_s - base.agent_s, asking.server_s) == pytest.approx((2.0, base.server_s))
    assert asking.step_s - base.step_s == pytest.approx(2.0)
    answering = step_time(cost, device(), device(request_s=1.0), FAST)
    assert (answering.agent_s, answering.server_s - base.server_s) == pytest.approx((base.agent_s, 3.0))
    # the end of the step is asked for at once: its answer follows the smashed gradient by what it takes itself
    assert answering.step_s - base.step_s == pytest.approx(3.0, rel=1e-3)


def test_attention_takes_as_long_as_its_heads_are_slow() -> None:
    cost, fast = costs(), device(1e9)
    heads = AttentionSection(float32=[[1.0, 1e6]])
    slow = fast.model_copy(update={"attention": heads})
    flops = sum(each.flops * calls for each, calls in cost.agent.work.matmuls.items() if each.head_size)
    assert {each.head_size for each in cost.agent.work.matmuls} == {0, 8}
    more_s = step_time(cost, slow, fast, FAST).agent_s - step_time(cost, fast, fast, FAST).agent_s
    assert more_s == pytest.approx(flops / 1e6 - flops / 1e9, rel=1e-6)


def test_micro_batches_in_flight_overlap() -> None:
    slow = LinkSection(up_bits_per_s=8e6, down_bits_per_s=8e6, latency_s=0.5)
    one_by_one = step_time(costs(1, 1), device(), device(), slow).step_s
    in_flight = step_time(costs(1, 4), device(), device(), slow).step_s
    assert in_flight < one_by_one / 2


def test_a_slower_device_or_link_never_makes_a_step_faster() -> None:
    cost = costs(2, 2)
    base = step_time(cost, device(1e8), device(1e8), FAST).step_s
    assert step_time(cost, device(5e7), device(1e8), FAST).step_s > base
    assert step_time(cost, device(1e8), device(5e7), FAST).step_s > base
    slower = FAST.model_copy(update={"latency_s": 0.1})
    assert step_time(cost, device(1e8), device(1e8), slower).step_s > base


def test_memory_counts_the_libraries_once() -> None:
    side = costs().agent
    assert peak_memory_bytes(side, device(memory_bytes=1000)) - peak_memory_bytes(side, device(memory_bytes=0)) == 1000
    assert peak_memory_bytes(side, device(memory_bytes=0)) >= side.memory_bytes
