"""Costs told from a configuration against the very segments, run for real."""

import resource
import time

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from splitfed.config import CodecSection, RunConfig
from splitfed.errors import SplitPointError, UnsupportedFamily
from splitfed.models import LoraSettings, adapter_parameters, adapter_state
from splitfed.study.cost import FLOPS_BESIDE_TORCH, SplitPoint, Workload, cost_of, model_shape
from splitfed.study.cost.meter import Meter, keeping
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.per_example import PerExampleLayers
from tests.equivalence.tiny_models import tiny_config
from tests.training.split_client import B, D, T, examples, split_client, tiny_parts

FAMILIES = ("gpt2", "llama", "mixtral", "mistral", "qwen3_next")
"""Learned positions and a tied head; rotary; experts; sliding windows; mixed layers."""
RANK_2 = LoraSettings(rank=2, alpha=4.0)
WORKLOAD = Workload(batch_size=B, tokens=T, lora=RANK_2, codecs=CodecSection())
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
)


def flops_of(work) -> int:
    with FlopCounterMode(display=False, custom_mapping=dict(FLOPS_BESIDE_TORCH)) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("split", [(0, 0), (2, 1)])
def test_parameters_and_weight_bytes_are_those_of_the_segments(family: str, split: tuple[int, int], tmp_path) -> None:
    parts = tiny_parts(family, bottom_blocks=split[0], top_blocks=split[1])
    costs = cost_of(model_shape(tiny_config(family)), SplitPoint(*split), WORKLOAD)
    for side, segments in ((costs.agent, (parts.bottom, parts.top)), (costs.server, (parts.trunk,))):
        adapters = {id(each) for segment in segments for each in adapter_parameters(segment).values()}
        held = {
            tensor.data_ptr(): tensor
            for segment in segments
            for tensor in segment.model.state_dict(keep_vars=True).values()
            if id(tensor) not in adapters
        }
        save_file({str(key): tensor.detach().clone() for key, tensor in held.items()}, tmp_path / "side")
        header = int.from_bytes((tmp_path / "side").read_bytes()[:8], "little")
        assert side.weight_bytes == (tmp_path / "side").stat().st_size - 8 - header
        trained = sum(each.numel() for segment in segments for each in adapter_parameters(segment).values())
        assert side.trainable_parameters == side.adapter_parameters == trained
        assert side.adapter_bytes == 4 * trained


def test_tied_embeddings_count_once_and_untied_ones_twice() -> None:
    tied_agent, untied_agent = (
        cost_of(model_shape(tiny_config("llama", tie_word_embeddings=is_tied)), SplitPoint(0, 0), WORKLOAD).agent
        for is_tied in (True, False)
    )
    assert untied_agent.parameters - tied_agent.parameters == 96 * D


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("bottom_blocks", [0, 1])
def test_payloads_are_what_a_link_in_process_counts(codec: str, bottom_blocks: int) -> None:
    client = split_client(codec=codec, parts=tiny_parts(bottom_blocks=bottom_blocks))
    client.trainer.step(client.link, examples(T, T, T, T), round=1, step=0)
    codecs = CodecSection(**dict.fromkeys(("smashed", "trunk_output", "output_gradient", "smashed_gradient"), codec))
    workload = Workload(batch_size=B, tokens=T, lora=RANK_2, codecs=codecs)
    link = cost_of(model_shape(tiny_config("llama")), SplitPoint(bottom_blocks, 1), workload).link
    assert (link.up_payload_bytes, link.down_payload_bytes) == (
        client.link.traffic.sent_bytes,
        client.link.traffic.received_bytes,
    )
    assert link.up_payload_bytes < link.up_bytes < link.up_payload_bytes + 200


def test_flops_of_a_step_are_what_torch_counts_in_the_real_segments(family: str) -> None:
    parts = tiny_parts(family)
    for segment in parts:
        segment.train()
    tokens_BT, hidden_BTD = torch.zeros(B, T, dtype=torch.long), torch.randn(B, T, D, requires_grad=True)
    gradient_BTD = torch.ones(B, T, D)
    costs = cost_of(model_shape(tiny_config(family)), SplitPoint(1, 1), WORKLOAD)
    assert costs.server.flops == flops_of(lambda: parts.trunk(hidden_BTD).backward(gradient_BTD))
    of_bottom = flops_of(lambda: parts.bottom(tokens_BT).backward(gradient_BTD))
    of_top = flops_of(lambda: causal_lm_loss(parts.top(hidden_BTD).logits, tokens_BT, 1.0).backward())
    assert costs.agent.flops == of_bottom + of_top


def test_flops_of_a_step_are_those_of_the_client_and_trunk_steps(family: str) -> None:
    client = split_client(parts=tiny_parts(family))
    with Meter() as meter:
        client.trainer.step(client.link, examples(T, T, T, T), round=1, step=0)
    costs = cost_of(model_shape(tiny_config(family)), SplitPoint(1, 1), WORKLOAD)
    assert costs.agent.flops + costs.server.flops == meter.work.flops


def test_flops_are_those_on_paper() -> None:
    """Linear layers of a Llama block and the head, by hand; only attention scores are left aside."""
    config = tiny_config("llama", num_attention_heads=4, num_key_value_heads=4)
    costs = cost_of(model_shape(config), SplitPoint(0, 0), WORKLOAD)
    rows, hidden, inner = B * T, config.hidden_size, config.intermediate_size
    layers = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    scores = 2 * (2 * B * config.num_attention_heads * T * T * (hidden // config.num_attention_heads))
    forward = sum(2 * rows * i * o + 2 * rows * 2 * (i + o) for i, o in layers) + scores
    assert costs.trunk_forward.work.flops == config.num_hidden_layers * forward
    head = 2 * rows * hidden * config.vocab_size
    assert costs.agent.flops == 2 * head  # forward, and the way back to the trunk


def test_what_autograd_keeps_is_what_it_keeps_in_the_segments(family: str) -> None:
    parts = tiny_parts(family, bottom_blocks=2, top_blocks=1)
    for segment in parts:
        segment.train()
    costs = cost_of(model_shape(tiny_config(family)), SplitPoint(2, 1), WORKLOAD)
    tokens_BT, hidden_BTD = torch.zeros(B, T, dtype=torch.long), torch.randn(B, T, D, requires_grad=True)
    with keeping(parts.bottom) as of_bottom:
        _bottom_BTD = parts.bottom(tokens_BT)
    with keeping(parts.trunk) as of_trunk:
        _trunk_BTD = parts.trunk(hidden_BTD)
    with keeping(parts.top) as of_top:
        _loss = causal_lm_loss(parts.top(hidden_BTD).logits, tokens_BT, 1.0)
    assert costs.bottom_forward.kept_bytes == of_bottom.bytes_without(set())
    assert costs.trunk_forward.kept_bytes == of_trunk.bytes_without(set())
    assert costs.top.kept_bytes == of_top.bytes_without(set())


def test_gradients_of_single_examples_are_in_the_flops() -> None:
    bottom = tiny_parts("llama").bottom.train()
    tokens_BT = torch.zeros(B, T, dtype=torch.long)

    with Meter() as meter:
        with PerExampleLayers(bottom).recording(tokens_BT) as recorded:
            output_BTD = bottom(tokens_BT)
        recorded.backward(output_BTD, torch.ones_like(output_BTD))
    workload = Workload(batch_size=B, tokens=T, lora=RANK_2, is_noisy=True, is_per_example=True)
    costs = cost_of(model_shape(tiny_config("llama")), SplitPoint(1, 1), workload)
    assert costs.bottom_forward.work.flops + costs.bottom_backward.work.flops == meter.work.flops


def test_a_frozen_factor_saves_backward_and_gradients() -> None:
    shape = model_shape(tiny_config("llama"))
    both = cost_of(shape, SplitPoint(1, 1), WORKLOAD)
    frozen = Workload(batch_size=B, tokens=T, lora=RANK_2, trained_factors=frozenset("B"))
    one = cost_of(shape, SplitPoint(1, 1), frozen)
    assert one.server.flops < both.server.flops
    assert one.agent.trainable_parameters < one.agent.adapter_parameters == both.agent.adapter_parameters
    assert one.link.adapter_up_bytes < one.link.adapter_down_bytes


def test_more_micro_batches_keep_less_and_compute_the_same() -> None:
    shape = model_shape(tiny_config("llama"))
    whole = cost_of(shape, SplitPoint(1, 1), WORKLOAD)
    single = Workload(batch_size=B, micro_batch_size=1, tokens=T, lora=RANK_2, max_in_flight=1)
    cut = cost_of(shape, SplitPoint(1, 1), single)
    assert cut.agent.flops == whole.agent.flops
    assert cut.agent.activation_bytes < whole.agent.activation_bytes
    assert cut.link.up_payload_bytes == whole.link.up_payload_bytes


def test_the_plan_of_70_billion_parameters_takes_seconds_and_no_memory() -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.perf_counter()
    costs = cost_of(model_shape(LLAMA_70B, dtype="bfloat16"), SplitPoint(2, 1), Workload())
    assert time.perf_counter() - started_s < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1 << 20
    assert costs.agent.parameters + costs.server.parameters == 70_553_706_496  # as the published model has
    assert costs.server.weight_bytes == 2 * costs.server.parameters


def test_the_run_file_says_what_a_step_is() -> None:
    run = RunConfig.model_validate({
        "run": {}, "model": {"base": "demo"}, "lora": {"rank": 4}, "training": {"max_tokens": 32, "micro_batch_size": 2}
    })  # fmt: skip
    workload = Workload.of(run)
    assert (workload.tokens, workload.sequences, workload.micro_batches, workload.lora.rank) == (32, 2, 4, 4)
    assert workload.is_noisy
    assert workload.is_per_example
    assert workload.trained_factors == {"B"}  # noise in both factors would multiply


def test_a_split_point_outside_the_model_is_refused() -> None:
    with pytest.raises(SplitPointError, match="bottom_blocks=3"):
        cost_of(model_shape(tiny_config("llama")), SplitPoint(3, 1), WORKLOAD)


def test_a_family_that_chooses_its_way_by_values_is_refused() -> None:
    with pytest.raises(UnsupportedFamily, match="jetmoe"):
        cost_of(model_shape(tiny_config("jetmoe")), SplitPoint(1, 1), WORKLOAD)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"tokens": 0}, {"max_in_flight": 0}, {"batch_size": 4, "micro_batch_size": 3}]
)
def test_a_step_of_nothing_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"batch_size|tokens|max_in_flight"):
        Workload(**changes)


def test_blocks_that_are_alike_are_measured_once() -> None:
    shape = model_shape(GPT2Config(n_embd=32, n_head=4, n_layer=12, vocab_size=64, bos_token_id=0, eos_token_id=1))
    cost_of(shape, SplitPoint(1, 1), WORKLOAD)
    measured = [key for key in shape.measured if key[0] == "block"]
    assert len(measured) == 2  # the first one, whose backward ends there, and all others
    assert len(set(shape.kinds)) == 1


def test_adapters_travel_with_their_names_once_a_round() -> None:
    parts = tiny_parts("llama")
    link = cost_of(model_shape(tiny_config("llama")), SplitPoint(1, 1), WORKLOAD).link
    state = adapter_state(parts.bottom) | adapter_state(parts.top)
    payload, names = sum(4 * each.numel() for each in state.values()), sum(map(len, state))
    assert payload + names < link.adapter_up_bytes < payload + 2 * names
