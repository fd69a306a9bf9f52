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
    partition,
    residual_parameters,
    set_trained_factors,
    trained_parameters,
    trunk_slice,
)
from splitfed.models.factors import factor_of
from splitfed.training.optimiser import StepOptimiser
from splitfed.training.per_example import PerExampleLayers
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)


@pytest.fixture
def trunk() -> Trunk:
    """A trunk with a residual and with an adapter away from its start."""
    trunk = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).trunk
    add_adapter(trunk, LORA, seed=0, residual_rank=2)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(t.shape, generator=generator) / 8 for key, t in adapter_state(trunk).items()}
    load_adapter_state(trunk, state)
    return trunk


def gradients_at(trunk: Trunk, hidden_BTD: Tensor) -> dict[str, Tensor]:
    """Gradients of the sum of all outputs, taken off the parameters; frozen ones are left out."""
    trunk(hidden_BTD).sum().backward()
    found = {key: p.grad for key, p in adapter_parameters(trunk).items() if p.grad is not None}
    for parameter in adapter_parameters(trunk).values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_only_the_named_factors_of_the_adapter_are_trained(trunk: Trunk, factors: str) -> None:
    set_trained_factors(trunk, frozenset(factors))
    wanted = {key for key in adapter_parameters(trunk) if factor_of(key) in factors}
    assert trained_parameters(trunk).keys() == wanted
    trained = {id(parameter) for parameter in trunk.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in trained_parameters(trunk).values()}
    assert not any(parameter.requires_grad for parameter in residual_parameters(trunk).values())


def test_both_factors_are_trained_unless_something_else_is_said(trunk: Trunk) -> None:
    assert trained_parameters(trunk).keys() == adapter_parameters(trunk).keys()


@pytest.mark.parametrize("factors", [set(), {"C"}, {"A", "b"}, "lora_A"])
def test_other_factors_are_refused_and_nothing_changes(trunk: Trunk, factors: set[str] | str) -> None:
    with pytest.raises(ValueError, match='give "A", "B" or both'):
        set_trained_factors(trunk, factors)
    assert trained_parameters(trunk).keys() == adapter_parameters(trunk).keys()


def test_a_key_that_is_no_factors_is_refused() -> None:
    assert [factor_of(f"h.0.attn.lora_{factor}.weight") for factor in "AB"] == ["A", "B"]
    with pytest.raises(ValueError, match="names no LoRA factor"):
        factor_of("h.0.attn.weight")


def test_a_segment_without_an_adapter_has_nothing_to_train() -> None:
    bottom = partition(tiny_model("llama"), bottom_blocks=0, top_blocks=1).bottom
    add_adapter(bottom, LORA, seed=0, residual_rank=2)
    set_trained_factors(bottom, {"B"})
    assert trained_parameters(bottom) == residual_parameters(bottom) == {}


def test_slices_follow_what_is_trained(trunk: Trunk) -> None:
    part = trunk_slice(trunk, range(2, 3))
    set_trained_factors(trunk, {"B"})
    assert {factor_of(key) for key in trained_parameters(part)} == {"B"}


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_trained_factors_gradients_are_those_of_training_both(trunk: Trunk, factor: str) -> None:
    hidden_BTD = torch.randn(2, 5, 32)
    both = gradients_at(trunk, hidden_BTD)
    set_trained_factors(trunk, {factor})
    found = gradients_at(trunk, hidden_BTD)
    assert found.keys() == trained_parameters(trunk).keys()
    assert all(torch.equal(found[key], both[key]) for key in found)


def test_an_optimiser_leaves_a_frozen_factor_alone_whatever_it_had_gathered(trunk: Trunk) -> None:
    before = adapter_state(trunk)
    optimiser = StepOptimiser(adapter_parameters(trunk), training=TrainingSection(weight_decay=0.1, learning_rate=0.1))
    trunk(torch.randn(2, 5, 32)).sum().backward()
    set_trained_factors(trunk, {"B"})
    trunk(torch.randn(2, 5, 32)).sum().backward()
    optimiser.step(0)
    for key, tensor in adapter_state(trunk).items():
        assert torch.equal(tensor, before[key]) == (factor_of(key) == "A"), key


@pytest.mark.parametrize("factor", ["A", "B"])
def test_each_examples_gradient_is_told_with_one_factor_frozen(trunk: Trunk, factor: str) -> None:
    hidden_BTD = torch.randn(3, 5, 32)
    set_trained_factors(trunk, {factor})
    with PerExampleLayers(trunk).recording(torch.zeros(3, 5)) as recorded:
        output_BTD = trunk(hidden_BTD)
    recorded.backward(output_BTD.sum())
    assert recorded.gradients.keys() == trained_parameters(trunk).keys()
    for index in range(3):
        alone = gradients_at(trunk, hidden_BTD[index : index + 1])
        for key, gradients in recorded.gradients.items():
            assert_equal_to_rounding(gradients[index], alone[key], f"{key}, example {index}")
