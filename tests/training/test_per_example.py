"""Each example's gradient is its own, whatever else is in flight, and nothing but their noised sum is applied."""

import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

import splitfed.training.per_example
from splitfed.errors import PrivacyError
from splitfed.models import LoraSettings, Partition, adapter_parameters, add_adapter, partition
from splitfed.privacy import NoiseStream, PerExampleMechanism
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example, collate
from splitfed.training.link import Place
from splitfed.training.per_example import GradientSum, PerExampleLayers, RecordedPass
from splitfed.training.releases import OpenReleases
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import (
    PAD,
    TRAINING,
    D,
    RecordingLink,
    ScriptedNoise,
    SplitClient,
    T,
    examples,
    split_client,
    tiny_parts,
)
from tests.training.test_client_step import LateLink, assert_same_bits, run_steps

TEXTS = examples(5, 8, T, 3, 7, 6, prompt=1)
THREE_IN_FLIGHT = TRAINING.model_copy(update={"batch_size": 6, "micro_batch_size": 2, "max_in_flight": 3})
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}, "llama": {}}


class KeepingMechanism(PerExampleMechanism):
    """Keeps the gradients of every micro-batch that it clips, and on which call of the link they came."""

    def __init__(self, clipping_norm: float = 1e6, noise_multiplier: float = 1.0, stream: NoiseStream | None = None):
        super().__init__(clipping_norm, noise_multiplier, stream or ScriptedNoise(0))
        self.clipped: list[Mapping[str, Tensor]] = []
        self.sums: list[dict[str, Tensor]] = []
        self.calls: list[str] = []

    def clip(self, per_example: Mapping[str, Tensor], *, is_real_B: Tensor | None = None) -> dict[str, Tensor]:
        self.clipped.append(per_example)
        self.calls.append("clip")
        return super().clip(per_example, is_real_B=is_real_B)

    def release(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.sums.append(dict(sums))
        return super().release(sums)


class PrivateReleases(OpenReleases):
    """A gate with nothing but DP-SGD behind it: the cut has no noise, yet is crossed as if it had."""

    is_noisy = True

    def __init__(self, per_example: PerExampleMechanism | None) -> None:
        self.per_example = per_example  # type: ignore[assignment]
        self.charged: list[tuple[list[str], int, int]] = []

    def adapter_gradient(
        self, sums: Mapping[str, Tensor], *, records: Sequence[str], round: int, step: int
    ) -> dict[str, Tensor]:
        assert self.per_example is not None
        self.charged.append((list(records), round, step))
        return self.per_example.release(sums)


def parts_of(family: str, bottom_blocks: int, top_blocks: int) -> Partition:
    """Split a tiny model that has no dropout in training either; no factor of its adapters is zero."""
    parts = partition(tiny_model(family, **NO_DROPOUT[family]), bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    generator = torch.Generator().manual_seed(0)
    for segment in parts:
        add_adapter(segment, LoraSettings(rank=2, alpha=4.0, dropout=0.0), seed=0)
        for parameter in adapter_parameters(segment).values():
            with torch.no_grad():
                parameter.normal_(std=0.1, generator=generator)
    return parts


def client_of(mechanism: PerExampleMechanism | None, parts: Partition | None = None, **changes: int) -> SplitClient:
    return split_client(
        PrivateReleases(mechanism),
        training=THREE_IN_FLIGHT.model_copy(update=changes),
        parts=parts or parts_of("llama", 1, 1),
    )


def own_parameters(parts: Partition) -> dict[str, nn.Parameter]:
    return {**adapter_parameters(parts.bottom), **adapter_parameters(parts.top)}


def alone(parts: Partition, text: Example) -> dict[str, Tensor]:
    """The gradient of one text's loss through the three segments, by plain autograd."""
    batch = collate([text], pad_token_id=PAD, length=T)
    logits_BTV = parts.top(parts.trunk(parts.bottom(batch.input_ids_BT))).logits
    own = own_parameters(parts)
    gradients = torch.autograd.grad(causal_lm_loss(logits_BTV, batch.labels_BT, T), list(own.values()))
    return dict(zip(own, gradients, strict=True))


def gradients_of(client: SplitClient, texts: Sequence[Example] = TEXTS) -> dict[str, Tensor]:
    """What a step hands to the optimiser."""
    taken: dict[str, Tensor] = {}
    own, applied = own_parameters(client.parts), client.trainer.optimiser.step

    def step(step_in_run: int) -> None:
        taken.update({name: parameter.grad.clone() for name, parameter in own.items() if parameter.grad is not None})
        applied(step_in_run)

    client.trainer.optimiser.step = step  # type: ignore[method-assign]
    client.trainer.step(client.link, texts, round=1, step=0)
    assert taken.keys() == own.keys()
    return taken


# Whose gradient it is


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("bottom_blocks", "top_blocks"), [(1, 1), (0, 1), (1, 0), (2, 1)])
def test_with_three_micro_batches_in_flight_each_example_has_the_gradient_that_it_has_alone(
    family: str, bottom_blocks: int, top_blocks: int
) -> None:
    mechanism = KeepingMechanism()
    client = client_of(mechanism, parts_of(family, bottom_blocks, top_blocks))
    expected = [alone(client.parts, text) for text in TEXTS]
    client.link = LateLink(client.link)
    client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.link.calls == ["forward"] * 3 + ["backward"] * 3 + ["step"]
    assert [call.keys() for call in mechanism.clipped] == [expected[0].keys()] * 3
    for name in expected[0]:
        found = torch.cat([micro_batch[name] for micro_batch in mechanism.clipped])
        assert_equal_to_rounding(found, torch.stack([gradient[name] for gradient in expected]), name)


@pytest.mark.parametrize("family", ["bloom", "deepseek_v3", "falcon", "gemma3_text", "mixtral", "opt", "qwen3_next"])
def test_whatever_a_familys_layers_look_like_each_example_has_the_gradient_that_it_has_alone(family: str) -> None:
    """The inputs of deepseek's attention have an axis more than others, those of opt's feed-forward layers one less."""
    parts = tiny_parts(family, bottom_blocks=2, top_blocks=1)
    batch, generator = collate(TEXTS[:3], pad_token_id=PAD), torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, T, D, generator=generator, requires_grad=True)
    for segment, inputs, run in (
        (parts.bottom, batch.input_ids_BT, parts.bottom),
        (parts.top, hidden_BTD, lambda hidden_BTD: parts.top(hidden_BTD).logits),
    ):
        own = adapter_parameters(segment)
        with PerExampleLayers(segment).recording(batch.input_ids_BT) as recorded:
            output = run(inputs)
        direction = torch.randn(output.shape, generator=generator)
        recorded.backward(output, direction, wrt=hidden_BTD if segment.kind == "top" else None)
        assert recorded.gradients.keys() == own.keys()
        alone_ = [torch.autograd.grad(run(inputs[i : i + 1]), [*own.values()], direction[i : i + 1]) for i in range(3)]
        for name, *each in zip(own, *alone_, strict=True):
            assert_equal_to_rounding(recorded.gradients[name], torch.stack(each), name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(6, 2), (6, 4), (6, 6)])
def test_with_a_wide_clip_and_hardly_any_noise_the_gradient_is_the_ordinary_one(
    family: str, dropout: float, batch_size: int, micro_batch_size: int
) -> None:
    """gpt2 has dropout of its own beside the adapter's; both paths draw the same masks."""
    ends = []
    for mechanism in (None, PerExampleMechanism(1e4, 1e-14)):
        parts = tiny_parts(family, dropout=dropout)
        ends.append(gradients_of(client_of(mechanism, parts, micro_batch_size=micro_batch_size)))
    for name, ordinary in ends[0].items():
        assert_equal_to_rounding(ends[1][name], ordinary, name)


def test_a_base_in_half_precision_has_the_ordinary_gradient_too() -> None:
    ends = []
    for mechanism in (None, PerExampleMechanism(1e4, 1e-14)):
        parts = parts_of("llama", 1, 1)
        for segment in parts:
            segment.model.bfloat16()
            for parameter in adapter_parameters(segment).values():
                parameter.data = parameter.data.float()
        # a power of two, by which half precision multiplies without rounding
        ends.append(gradients_of(client_of(mechanism, parts, batch_size=4, micro_batch_size=2), TEXTS[:4]))
    for name, ordinary in ends[0].items():
        assert_equal_to_rounding(ends[1][name], ordinary, name)


def test_a_layer_that_is_used_twice_has_the_gradient_of_both_uses() -> None:
    bottom = parts_of("llama", 1, 1).bottom
    batch, layers = collate(TEXTS[:2], pad_token_id=PAD), PerExampleLayers(bottom)
    recorded = []
    for uses in (1, 2):
        with layers.recording(batch.input_ids_BT) as each:
            output_BTD = sum((bottom(batch.input_ids_BT) for _ in range(uses)), torch.tensor(0.0))
        each.backward(output_BTD, torch.ones_like(output_BTD))
        recorded.append(each.gradients)
    for name, once in recorded[0].items():
        torch.testing.assert_close(recorded[1][name], 2 * once)


def test_a_server_that_returns_no_gradient_takes_none_from_the_top() -> None:
    class Mean(RecordingLink):
        def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
            super().backward(place, output_gradient_BTD)
            nothing: Future[Tensor | None] = Future()
            nothing.set_result(None)
            return nothing

    parts = parts_of("llama", 1, 1)
    expected = [alone(parts, text) for text in TEXTS]
    client = client_of(PerExampleMechanism(1e4, 1.0, ScriptedNoise(0)), parts)
    client.link = Mean(client.link)
    found = gradients_of(client)
    for name in adapter_parameters(parts.bottom):
        assert found[name].count_nonzero() == 0
    for name in adapter_parameters(parts.top):
        assert_equal_to_rounding(found[name] * len(TEXTS), sum(each[name] for each in expected), name)


# Clip, sum, noise


def test_an_example_is_clipped_once_over_bottom_and_top() -> None:
    parts = parts_of("llama", 1, 1)
    each = [alone(parts, text) for text in TEXTS]
    norms = [math.sqrt(sum(float(part.double().pow(2).sum()) for part in gradient.values())) for gradient in each]
    bottoms = adapter_parameters(parts.bottom).keys()
    of_bottom = [math.sqrt(sum(float(each[i][name].double().pow(2).sum()) for name in bottoms)) for i in range(6)]
    clip = sorted(norms)[3] * 0.999  # some examples are longer, some shorter
    assert any(norm > clip > bottom for norm, bottom in zip(norms, of_bottom, strict=True))
    mechanism = KeepingMechanism(clip)
    found = gradients_of(client_of(mechanism, parts))
    assert mechanism.sums[0].keys() == found.keys()
    for name, gradient in found.items():
        wanted = sum(min(1.0, clip / norm) * own[name] for norm, own in zip(norms, each, strict=True))
        assert_equal_to_rounding(gradient * len(TEXTS), wanted, name)


def test_the_noise_is_that_of_the_mechanism_once_a_step_over_the_constant_batch_size() -> None:
    silent, loud = ScriptedNoise(0), ScriptedNoise(1)
    quiet = gradients_of(client_of(PerExampleMechanism(0.5, 3.0, silent)), TEXTS[:5])
    noised = gradients_of(client_of(PerExampleMechanism(0.5, 3.0, loud)), TEXTS[:5])
    assert silent.stds == loud.stds == [3.0 * 2 * 0.5] * len(quiet)
    for name, gradient in quiet.items():
        torch.testing.assert_close(noised[name] - gradient, torch.full_like(gradient, 3.0 / 6))


def test_a_step_is_charged_once_with_the_records_of_all_its_micro_batches() -> None:
    client = client_of(PerExampleMechanism(1.0, 1.0))
    run_steps(client, TEXTS)
    assert client.trainer.releases.charged == [([text.record for text in TEXTS], 1, step) for step in range(2)]


def test_where_nothing_is_trained_nothing_is_charged() -> None:
    client = client_of(PerExampleMechanism(1.0, 1.0), parts_of("llama", 0, 0))
    client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.trainer.releases.charged == []


def test_noise_comes_from_the_cryptographic_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client, again = client_of(PerExampleMechanism(0.5, 1.0)), client_of(PerExampleMechanism(0.5, 1.0))

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("noise from a statistical generator")

    for name in ("normal", "randn", "randn_like", "rand", "rand_like", "Generator"):
        monkeypatch.setattr(torch, name, fail)
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(Tensor, name, fail)
    for name in ("step", "add_noise", "pre_step"):
        monkeypatch.setattr(DPOptimizer, name, fail)
    monkeypatch.setattr("opacus.optimizers.optimizer._generate_noise", fail)
    first, second = gradients_of(client), gradients_of(again)
    assert [name for name in first if torch.equal(first[name], second[name])] == []  # and a seed does not repeat it
    monkeypatch.setattr(NoiseStream, "gaussian", fail)
    with pytest.raises(AssertionError, match="noise from"):
        client.trainer.step(client.link, TEXTS, round=1, step=1)


# What changes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_changes_every_tensor_of_the_adapter_and_nothing_else(family: str) -> None:
    client = client_of(PerExampleMechanism(0.5, 1.0), parts_of(family, 1, 1))
    segments = (client.parts.bottom, client.parts.top)
    before = [{name: tensor.clone() for name, tensor in segment.state_dict().items()} for segment in segments]
    run_steps(client, TEXTS)
    for segment, kept in zip(segments, before, strict=True):
        changed = {name for name, tensor in segment.state_dict().items() if not torch.equal(tensor, kept[name])}
        assert changed == {name for name in kept if ".lora_" in name}
        assert len(changed) == len(adapter_parameters(segment)) > 0


def test_neither_hooks_nor_gradients_stay_behind() -> None:
    client = client_of(PerExampleMechanism(0.5, 1.0))
    client.trainer.step(client.link, TEXTS, round=1, step=0)
    for segment in (client.parts.bottom, client.parts.top):
        assert [name for name, module in segment.named_modules() if module._forward_hooks] == []
        assert [name for name, parameter in segment.named_parameters() if parameter.grad is not None] == []


def test_the_top_waits_for_a_bottom_that_trains_and_for_no_other() -> None:
    for bottom_blocks, wanted in (
        (1, ["backward", "backward", "backward", "step", "clip", "clip", "clip"]),
        (0, ["backward", "clip", "backward", "clip", "backward", "clip", "step"]),
    ):
        mechanism = KeepingMechanism()
        client = client_of(mechanism, parts_of("llama", bottom_blocks, 1))
        client.link = LateLink(client.link)
        client.link.calls = mechanism.calls
        client.trainer.step(client.link, TEXTS, round=1, step=0)
        assert mechanism.calls == ["forward"] * 3 + wanted


def test_no_more_gradients_are_kept_than_micro_batches_may_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[RecordedPass]] = []
    most, add = 0, GradientSum.add

    class Counted(RecordedPass):
        def __init__(self) -> None:
            super().__init__()
            alive.append(weakref.ref(self))

    def counted(self: GradientSum, *passes: RecordedPass, **beside: Any) -> None:
        nonlocal most
        most = max(most, sum(bool(each.gradients) for each in (reference() for reference in alive) if each))
        add(self, *passes, **beside)

    monkeypatch.setattr(splitfed.training.per_example, "RecordedPass", Counted)
    monkeypatch.setattr(GradientSum, "add", counted)
    client = client_of(PerExampleMechanism(0.5, 1.0), micro_batch_size=1, max_in_flight=2)
    client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert len(alive) == 12
    assert most == 2 + 2  # tops whose bottoms are on their way back, and the one that is back, with its bottom


def test_a_pass_that_never_comes_back_is_freed_at_once() -> None:
    """A lost round leaves some: no circle through autograd may keep their activations until a collector comes by."""
    bottom = parts_of("llama", 1, 1).bottom
    batch = collate(TEXTS[:2], pad_token_id=PAD)
    gc.collect()
    gc.disable()
    try:
        with PerExampleLayers(bottom).recording(batch.input_ids_BT) as recorded:
            output_BTD = bottom(batch.input_ids_BT)
        references = [weakref.ref(output_BTD), *(weakref.ref(start) for start in recorded._starts)]
        assert len(references) > 1
        del output_BTD, recorded
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_is_applied(value: float) -> None:
    class Nonsense(RecordingLink):
        def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
            gradient = super().backward(place, output_gradient_BTD)
            answer = gradient.result()
            assert answer is not None
            if place.micro_batch == 1:
                answer[1, 0, 0] = value
            return gradient

    mechanism = KeepingMechanism()
    client = client_of(mechanism)
    before = client.trainer.adapter_state()
    with pytest.raises(PrivacyError, match="gradient of an example holds a NaN or an infinite value; nothing was app"):
        client.trainer.step(Nonsense(client.link), TEXTS, round=1, step=0)
    assert mechanism.sums == []
    assert_same_bits(client.trainer.adapter_state(), before)
    assert all(parameter.grad is None for parameter in own_parameters(client.parts).values())


@pytest.mark.parametrize("size", [1e30, 2.74e35, 1e37])
def test_a_reply_that_is_finite_overflows_for_no_text_however_large_it_is(size: float) -> None:
    """Or the refusal would tell the server which texts make it overflow."""

    class Shouting(RecordingLink):
        def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
            gradient = super().backward(place, output_gradient_BTD)
            answer = gradient.result()
            assert answer is not None
            if place.micro_batch == 1:
                answer[1] = size * torch.linspace(-1, 1, answer[1].numel()).view_as(answer[1])
            return gradient

    mechanism = KeepingMechanism(0.5, 1e-6)
    client = client_of(mechanism)
    client.trainer.step(Shouting(client.link), TEXTS, round=1, step=0)
    assert all(torch.isfinite(gradients).all() for each in mechanism.clipped for gradients in each.values())
    assert sum(float(total.pow(2).sum()) for total in mechanism.sums[0].values()) <= (0.5 * len(TEXTS)) ** 2


def test_a_reply_of_a_usual_size_is_taken_to_the_bit() -> None:
    client = client_of(PerExampleMechanism(1.0, 1.0))
    bottom, batch = client.parts.bottom, collate(TEXTS[:3], pad_token_id=PAD)
    layers = PerExampleLayers(bottom)
    gradient_BTD = torch.randn(3, batch.input_ids_BT.shape[1], D, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1.0, 2.0**10):  # both below the bound, so the one is exactly so much more than the other
        with layers.recording(batch.input_ids_BT) as recorded:
            output_BTD = bottom(batch.input_ids_BT)
        recorded.backward(output_BTD, gradient_BTD * scale)
        found.append(recorded.gradients)
    assert found[0].keys() == adapter_parameters(bottom).keys()
    assert [name for name in found[0] if not torch.equal(found[0][name] * 2.0**10, found[1][name])] == []


def test_a_layer_without_a_grad_sampler_is_refused_by_name() -> None:
    class OddLinear(nn.Linear):
        pass

    parts = parts_of("llama", 1, 1)
    parts.top.model.model.layers[0].mlp.up_proj.lora_B["default"].__class__ = OddLinear
    with pytest.raises(
        PrivacyError, match=r"layer 'model\.layers\.3\.mlp\.up_proj\.lora_B\.default', a OddLinear; adapt"
    ):
        client_of(PerExampleMechanism(1.0, 1.0), parts)
    assert client_of(None, parts).trainer.is_training


def test_a_base_layer_that_is_trained_is_refused_by_name() -> None:
    parts = parts_of("llama", 1, 1)
    parts.bottom.model.model.layers[0].input_layernorm.requires_grad_(True)
    with pytest.raises(
        PrivacyError, match=r"'model\.layers\.0\.input_layernorm' is trained without being an adapter's"
    ):
        client_of(PerExampleMechanism(1.0, 1.0), parts)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 4)])
def test_a_layer_whose_input_has_no_row_for_each_token_of_each_sequence_is_refused_by_name(rows: slice) -> None:
    """As those of experts, which take tokens of whatever sequence."""
    bottom = parts_of("llama", 1, 1).bottom
    input_ids_BT = collate(TEXTS[:3], pad_token_id=PAD).input_ids_BT
    claimed_BT = input_ids_BT.repeat(2, 1)[rows]
    message = r"'model\.layers\.0\.self_attn\.q_proj\.lora_A\.default' takes an input of shape \[3, 12, 32\]"
    with pytest.raises(PrivacyError, match=message), PerExampleLayers(bottom).recording(claimed_BT):
        bottom(input_ids_BT)
    bottom(input_ids_BT)  # the recording is over
