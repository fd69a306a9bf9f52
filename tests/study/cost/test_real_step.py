"""A step run for real, beside what its configuration says."""

import pytest

from splitfed.config import CodecSection
from splitfed.errors import SplitPointError
from splitfed.models import LoraSettings
from splitfed.study.cost import SplitPoint, Workload, cost_of, model_shape
from splitfed.study.cost.real_step import run_step
from tests.equivalence.tiny_models import tiny_config, tiny_model
from tests.training.split_client import examples, split_client, tiny_parts

STEP = Workload(batch_size=4, tokens=12, lora=LoraSettings(rank=2, alpha=4.0))


@pytest.mark.parametrize("split", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_told_from_the_configuration_is_what_is_measured(family: str, split: tuple[int, int]) -> None:
    real = run_step(tiny_model(family), SplitPoint(*split), STEP, tries=1)
    told = cost_of(model_shape(tiny_config(family)), SplitPoint(*split), STEP)
    assert (real.agent.weight_bytes, real.server.weight_bytes) == (told.agent.weight_bytes, told.server.weight_bytes)
    assert (real.agent.flops, real.server.flops) == (told.agent.flops, told.server.flops)
    assert real.up_payload_bytes == told.link.up_payload_bytes
    assert real.down_payload_bytes == told.link.down_payload_bytes
    assert told.agent.activation_bytes / real.agent.activation_bytes == pytest.approx(1, rel=0.25)
    assert min(real.agent.compute_s, real.server.compute_s) > 0


def test_payloads_are_those_of_a_link_in_process() -> None:
    client = split_client(codec="int8", parts=tiny_parts())
    client.trainer.step(client.link, examples(12, 12, 12, 12), round=1, step=0)
    codecs = CodecSection(**dict.fromkeys(("smashed", "trunk_output", "output_gradient", "smashed_gradient"), "int8"))
    real = run_step(tiny_model("llama"), SplitPoint(1, 1), Workload(batch_size=4, tokens=12, codecs=codecs), tries=1)
    traffic = client.link.traffic
    assert (real.up_payload_bytes, real.down_payload_bytes) == (traffic.sent_bytes, traffic.received_bytes)


def test_the_model_can_be_cut_again() -> None:
    model = tiny_model("llama")
    first = run_step(model, SplitPoint(1, 1), STEP, tries=1)
    run_step(model, SplitPoint(0, 0), STEP, tries=1)
    again = run_step(model, SplitPoint(1, 1), STEP, tries=1)
    assert (first.agent.flops, first.agent.weight_bytes) == (again.agent.flops, again.agent.weight_bytes)


@pytest.mark.parametrize("workload", [Workload(is_noisy=True), Workload(batch_size=4, micro_batch_size=2)])
def test_a_step_that_is_more_than_one_plain_micro_batch_is_refused(workload: Workload) -> None:
    with pytest.raises(ValueError, match="one micro-batch without noise"):
        run_step(tiny_model("llama"), SplitPoint(1, 1), workload)


def test_no_try_and_no_trunk_are_refused() -> None:
    with pytest.raises(ValueError, match="tries is 0"):
        run_step(tiny_model("llama"), SplitPoint(1, 1), STEP, tries=0)
    with pytest.raises(SplitPointError):
        run_step(tiny_model("llama"), SplitPoint(9, 1), STEP)
