from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitfed.config import TrainingSection
from splitfed.models import (
    LoraSettings,
    Trunk,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    load_residual,
    partition,
    remove_adapter,
    residual_parameters,
)
from splitfed.training.optimiser import StepOptimiser
from tests.equivalence.tiny_models import tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)
KEY = "model.layers.2.self_attn.q_proj.lora_A.weight"


def trunk_with(lora: LoraSettings = LORA, *, residual_rank: int = 3, family: str = "llama") -> Trunk:
    trunk = partition(tiny_model(family), bottom_blocks=1, top_blocks=1).trunk
    add_adapter(trunk, lora, seed=0, residual_rank=residual_rank)
    return trunk


def some_residual(trunk: Trunk, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randn((rank, t.shape[1]) if "lora_A" in key else (t.shape[0], rank), generator=generator) / 8
        for key, t in residual_parameters(trunk).items()
    }


def test_no_residual_is_there_unless_asked_for() -> None:
    assert residual_parameters(trunk_with(residual_rank=0)) == {}
    with pytest.raises(ValueError, match="cannot have rank -1"):
        trunk_with(residual_rank=-1)


def test_a_residual_has_the_adapters_keys_and_starts_as_zeros_that_change_nothing() -> None:
    trunk = trunk_with()
    residual = residual_parameters(trunk)
    assert residual.keys() == adapter_parameters(trunk).keys()
    assert (residual[KEY].shape, residual[KEY.replace("_A", "_B")].shape) == ((3, 32), (32, 3))
    assert not any(parameter.any() for parameter in residual.values())
    hidden_BTD = torch.randn(2, 5, 32)
    assert torch.equal(trunk(hidden_BTD), trunk_with(residual_rank=0)(hidden_BTD))


def test_the_adapter_is_the_same_with_a_residual_under_it() -> None:
    alone, over = adapter_state(trunk_with(residual_rank=0)), adapter_state(trunk_with())
    assert alone.keys() == over.keys()
    assert all(torch.equal(alone[key], over[key]) for key in alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trunk_whose_adapters_are_taken_off_is_as_it_was_and_takes_another(family: str) -> None:
    trunk = trunk_with(family=family)
    load_residual(trunk, some_residual(trunk))
    hidden_BTD = torch.randn(2, 5, 32)
    bare = partition(tiny_model(family), bottom_blocks=1, top_blocks=1).trunk
    remove_adapter(trunk)
    assert torch.equal(trunk(hidden_BTD), bare(hidden_BTD))
    assert adapter_state(trunk) == residual_parameters(trunk) == {}
    assert [name for name, _ in trunk.named_parameters()] == [name for name, _ in bare.named_parameters()]
    add_adapter(trunk, replace(LORA, rank=2), seed=0)
    assert {tensor.shape[0] for key, tensor in adapter_state(trunk).items() if "lora_A" in key} == {2}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_residual_adds_its_product_at_the_adapters_scale(family: str) -> None:
    """The base's layers with the product added to their weights give the same output."""
    trunk = trunk_with(family=family)
    residual = some_residual(trunk)
    load_residual(trunk, residual)
    merged = partition(tiny_model(family), bottom_blocks=1, top_blocks=1).trunk
    layers = {merged.whole_model_name(name): layer for name, layer in merged.model.named_modules()}
    with torch.no_grad():
        for key, a_RI in residual.items():
            if "lora_A" in key:
                name = key.removesuffix(".lora_A.weight")
                product_OI = 2.0 * residual[f"{name}.lora_B.weight"] @ a_RI  # alpha / rank = 2
                layers[name].weight += product_OI.T if family == "gpt2" else product_OI
    hidden_BTD = torch.randn(2, 5, 32)
    torch.testing.assert_close(trunk(hidden_BTD), merged(hidden_BTD), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(trunk(hidden_BTD), trunk_with(residual_rank=0, family=family)(hidden_BTD), atol=1e-2)


def test_a_residual_of_smaller_rank_fills_up_with_zeros_and_an_empty_one_is_zero() -> None:
    trunk, small = trunk_with(), trunk_with(residual_rank=2)
    load_residual(trunk, some_residual(trunk))
    residual = some_residual(small, rank=2)
    load_residual(trunk, residual)
    load_residual(small, residual)
    hidden_BTD = torch.randn(2, 5, 32)
    torch.testing.assert_close(trunk(hidden_BTD), small(hidden_BTD), rtol=1e-5, atol=1e-5)
    for nothing in ({}, some_residual(trunk, rank=0)):
        load_residual(trunk, residual)
        load_residual(trunk, nothing)
        assert not any(parameter.any() for parameter in residual_parameters(trunk).values())


def test_a_residual_that_does_not_fit_is_refused_and_nothing_changed() -> None:
    trunk = trunk_with()
    good = some_residual(trunk)
    load_residual(trunk, {**good, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)})
    without = {key: tensor for key, tensor in good.items() if key != KEY}
    for bad, reason in (
        (without, "no tensor"),
        ({**good, KEY: torch.zeros(4, 32)}, r"shape \[4, 32\], which does not fit into \[3, 32\]"),
        ({**good, KEY: torch.zeros(3, 31)}, r"shape \[3, 31\]"),
        ({**good, KEY: torch.zeros(3)}, r"shape \[3\]"),
        ({**good, KEY: torch.zeros(2, 32)}, "no rank in common"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_residual(trunk, bad)
        assert all(torch.equal(parameter, good[key]) for key, parameter in residual_parameters(trunk).items())


def test_a_residual_never_trains() -> None:
    trunk = trunk_with()
    residual = some_residual(trunk)
    load_residual(trunk, residual)
    optimiser = StepOptimiser(adapter_parameters(trunk), training=TrainingSection(learning_rate=0.1, weight_decay=0.1))
    before = adapter_state(trunk)
    for step in range(2):  # B moves in the first, A in the second
        trunk(torch.randn(2, 5, 32)).sum().backward()
        assert all(parameter.grad is None for parameter in residual_parameters(trunk).values())
        optimiser.step(step)
    assert not any(torch.equal(tensor, before[key]) for key, tensor in adapter_state(trunk).items())
    assert all(torch.equal(parameter, residual[key]) for key, parameter in residual_parameters(trunk).items())


def test_a_residual_does_not_drop_and_keeps_float32_on_a_base_of_half_precision() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    trunk = partition(model, bottom_blocks=1, top_blocks=1).trunk
    add_adapter(trunk, replace(LORA, dropout=0.5), seed=0, residual_rank=3)
    layer = trunk.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.5
    assert isinstance(layer.lora_dropout["residual"], torch.nn.Identity)
    assert {parameter.dtype for parameter in residual_parameters(trunk).values()} == {torch.float32}
    assert trunk(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_loading_the_adapter_leaves_the_residual_alone() -> None:
    trunk = trunk_with()
    residual = some_residual(trunk)
    load_residual(trunk, residual)
    load_adapter_state(trunk, {key: tensor + 1 for key, tensor in adapter_state(trunk).items()})
    assert all(torch.equal(parameter, residual[key]) for key, parameter in residual_parameters(trunk).items())
