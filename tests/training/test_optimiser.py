"""The optimiser is torch's AdamW under transformers' schedule, and its state is all that it remembers."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from splitfed.config import TrainingSection
from splitfed.training.optimiser import StepOptimiser, without

STEPS = 6
SHAPES = {"a.lora_A.weight": (2, 5), "a.lora_B.weight": (4, 2)}


def settings(schedule: str = "linear", **changes: float) -> TrainingSection:
    fields = {"learning_rate": 3e-2, "weight_decay": 0.1, "warmup_steps": 2, **changes}
    return TrainingSection.model_validate({"rounds": 2, "local_steps": STEPS // 2, "schedule": schedule, **fields})


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("schedule", "warmup_steps"),
    [("constant", 0), *product(["constant_with_warmup", "linear", "cosine"], [0, 2])],
)
def test_every_step_is_that_of_adamw_under_transformers_schedule(schedule: str, warmup_steps: int) -> None:
    training = settings(schedule, warmup_steps=warmup_steps)
    ours, theirs = parameters(), parameters()
    optimiser = StepOptimiser(ours, training=training)
    adamw = torch.optim.AdamW(theirs.values(), lr=3e-2, weight_decay=0.1)
    scheduler = get_scheduler(schedule, adamw, num_warmup_steps=warmup_steps, num_training_steps=STEPS)
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimiser.step(step)
        adamw.step()
        scheduler.step()
        assert_same_bits(values(ours), values(theirs))


def test_a_state_taken_up_elsewhere_continues_to_the_bit() -> None:
    undisturbed, first_half = parameters(), parameters()
    whole_run, before = StepOptimiser(undisturbed, training=settings()), StepOptimiser(first_half, training=settings())
    for step in range(STEPS):
        set_gradients(undisturbed, step)
        whole_run.step(step)
    for step in range(STEPS // 2):
        set_gradients(first_half, step)
        before.step(step)
    second_half = {name: nn.Parameter(value) for name, value in values(first_half).items()}
    after = StepOptimiser(second_half, training=settings())
    after.load(before.state())
    for step in range(STEPS // 2, STEPS):
        set_gradients(second_half, step)
        after.step(step)
    assert_same_bits(values(second_half), values(undisturbed))
    assert_same_bits(after.state(), whole_run.state())


def test_a_state_is_a_copy_on_both_sides() -> None:
    named = parameters()
    optimiser = StepOptimiser(named, training=settings())
    set_gradients(named, 0)
    optimiser.step(0)
    taken = optimiser.state()
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    set_gradients(named, 1)
    optimiser.step(1)
    assert_same_bits(taken, kept)
    optimiser.load(taken)
    assert_same_bits(optimiser.state(), kept)
    set_gradients(named, 2)
    optimiser.step(2)
    assert_same_bits(taken, kept)


def test_there_is_no_state_before_the_first_step_and_an_empty_one_starts_afresh() -> None:
    fresh, used = parameters(), parameters()
    optimiser = StepOptimiser(used, training=settings())
    assert optimiser.state() == {}
    set_gradients(used, 7)
    optimiser.step(0)
    assert optimiser.state().keys() == {f"{n}/{m}" for n in SHAPES for m in ("step", "exp_avg", "exp_avg_sq")}
    optimiser.load({})
    assert optimiser.state() == {}
    with torch.no_grad():
        for name, parameter in used.items():
            parameter.copy_(fresh[name])
    set_gradients(used, 1)
    set_gradients(fresh, 1)
    optimiser.step(1)
    StepOptimiser(fresh, training=settings()).step(1)
    assert_same_bits(values(used), values(fresh))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        pytest.param("a.lora_A.weight/exp_avg", None, id="a moment is missing"),
        pytest.param("b.lora_A.weight/step", torch.tensor(1.0), id="a parameter is foreign"),
        pytest.param("a.lora_B.weight/exp_avg", torch.zeros(4, 3), id="the rank differs"),
    ],
)
def test_a_state_of_another_adapter_is_refused_and_changes_nothing(name: str, tensor: Tensor | None) -> None:
    named = parameters()
    optimiser = StepOptimiser(named, training=settings())
    set_gradients(named, 0)
    optimiser.step(0)
    before, foreign = optimiser.state(), optimiser.state()
    if tensor is None:
        del foreign[name]
    else:
        foreign[name] = tensor
    with pytest.raises(ValueError, match=f"another adapter: '{name}'"):
        optimiser.load(foreign)
    assert_same_bits(optimiser.state(), before)


def test_without_parameters_every_call_does_nothing_and_a_state_is_still_foreign() -> None:
    optimiser = StepOptimiser({}, training=settings())
    optimiser.step(0)
    optimiser.clear_gradients()
    optimiser.load({})
    assert optimiser.state() == {}
    with pytest.raises(ValueError, match="another adapter"):
        optimiser.load({"a.lora_A.weight/step": torch.tensor(1.0)})


def test_the_learning_rate_is_a_function_of_the_step_in_the_run_only() -> None:
    """Whatever was stepped before, in whatever order: the first AdamW step moves by the rate alone."""
    training = settings(weight_decay=0.0)
    moved = {}
    for order in ([0, 3, 5], [5, 3, 0], [3, 3, 0, 5]):
        named = parameters()
        optimiser = StepOptimiser(named, training=training)
        for step in order:
            optimiser.load({})
            before = values(named)["a.lora_A.weight"]
            set_gradients(named, 0)
            optimiser.step(step)
            moved.setdefault(step, []).append((named["a.lora_A.weight"] - before).abs().max().item())
    # linear schedule, 2 steps of warm-up, 6 in all: 0/2, then (6 - step) / 4 of the peak
    assert moved[0] == [0.0, 0.0, 0.0]
    assert moved[3] == pytest.approx([3e-2 * 3 / 4] * 4, rel=1e-4)
    assert moved[5] == pytest.approx([3e-2 * 1 / 4] * 3, rel=1e-4)


def test_gradients_are_cleared_by_a_step_and_on_request() -> None:
    named = parameters()
    optimiser = StepOptimiser(named, training=settings())
    set_gradients(named, 0)
    optimiser.step(0)
    assert [parameter.grad for parameter in named.values()] == [None, None]
    set_gradients(named, 1)
    optimiser.clear_gradients()
    assert [parameter.grad for parameter in named.values()] == [None, None]


def test_given_gradients_take_the_place_of_those_that_autograd_gathered() -> None:
    ours, theirs = parameters(), parameters()
    set_gradients(theirs, 1)
    given = {name: parameter.grad.double() for name, parameter in theirs.items() if parameter.grad is not None}
    set_gradients(ours, 0)
    optimiser = StepOptimiser(ours, training=settings())
    optimiser.set_gradients(given)
    optimiser.step(2)
    StepOptimiser(theirs, training=settings()).step(2)
    assert_same_bits(values(ours), values(theirs))


def test_moments_of_some_parameters_can_be_left_out_and_the_others_go_on() -> None:
    named = parameters()
    optimiser = StepOptimiser(named, training=settings())
    set_gradients(named, 0)
    optimiser.step(0)
    kept = without(optimiser.state(), {"a.lora_A.weight"})
    assert {key.rpartition("/")[0] for key in kept} == {"a.lora_B.weight"}
    optimiser.load(kept)
    assert_same_bits(optimiser.state(), kept)
    set_gradients(named, 1)
    optimiser.step(1)
    state = optimiser.state()
    assert (state["a.lora_A.weight/step"], state["a.lora_B.weight/step"]) == (1, 2)


def test_the_proximal_term_pulls_to_what_the_round_started_from_and_counts_for_the_norm() -> None:
    named = parameters()
    optimiser = StepOptimiser(named, training=settings(proximal=0.5))
    optimiser.hold_to(values(named))
    moved, still = named["a.lora_A.weight"], named["a.lora_B.weight"]
    with torch.no_grad():
        moved += 2.0
        still += 4.0
    moved.grad, still.requires_grad = torch.ones_like(moved), False
    optimiser.pull_to_start()
    torch.testing.assert_close(moved.grad, torch.full_like(moved, 1.0 + 0.5 * 2.0))
    assert still.grad is None
    assert optimiser.squared_norm() == pytest.approx(4.0 * moved.numel())
    still.requires_grad = True
    optimiser.pull_to_start()
    torch.testing.assert_close(still.grad, torch.full_like(still, 0.5 * 4.0))
