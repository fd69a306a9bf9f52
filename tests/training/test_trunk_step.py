"""One frozen trunk serves every client, and no client notices the others."""

import gc
import zlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from splitfed.config import TrainingSection
from splitfed.errors import ProtocolError
from splitfed.models import (
    LoraSettings,
    Segment,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_residual,
    partition,
    residual_parameters,
)
from splitfed.training.trunk_step import TrunkTrainer
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import D, tiny_parts

B, T = 2, 6
TRAINING = TrainingSection(rounds=3, local_steps=2, batch_size=4, micro_batch_size=B, max_tokens=T, learning_rate=1e-2)


def tiny_trunk(*, dropout: float = 0.0) -> Segment:
    return tiny_parts(bottom_blocks=1, top_blocks=1, dropout=dropout).trunk


def trainer_of(trunk: Segment, *clients: str, round: int = 1, seed: int = 3) -> TrunkTrainer:
    trainer = TrunkTrainer(trunk, TRAINING, seed=seed)
    for client in clients:
        trainer.open_round(client, round, adapter_state(trunk), {})
    return trainer


def hidden(*name: int | str) -> Tensor:
    """Random hidden states [B, T, D], the same for the same name."""
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(zlib.crc32(repr(name).encode())))


def run_step(trainer: TrunkTrainer, client: str, step: int) -> list[Tensor]:
    """Two micro-batches of a client's own data; gives trunk outputs and smashed gradients."""
    seen = [
        trainer.forward(client, step, index, hidden(client, step, index), wants_smashed_gradient=True)
        for index in range(2)
    ]
    for index in range(2):
        gradient_BTD = trainer.backward(client, step, index, hidden(client, step, index, "gradient"))
        assert gradient_BTD is not None
        seen.append(gradient_BTD)
    trainer.step(client, step)
    return seen


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def run_round(trainer: TrunkTrainer, client: str) -> Tensor:
    """Both steps of a round; gives everything that came back, stacked."""
    return torch.stack([tensor_BTD for step in range(2) for tensor_BTD in run_step(trainer, client, step)])


# The base is there once


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if issubclass(type(found), Tensor) and found.device.type == "cpu"
    }
    return sum(storages.values())


def test_a_client_costs_its_adapter_and_two_moments_and_the_base_is_there_once() -> None:
    trunk = tiny_trunk()
    base = {name: (id(parameter), parameter.data_ptr()) for name, parameter in trunk.named_parameters()}
    adapter_bytes = sum(tensor.nbytes for tensor in adapter_state(trunk).values())
    n_tensors = len(adapter_state(trunk))
    base_bytes = sum(parameter.nbytes for parameter in trunk.parameters()) - adapter_bytes
    trainer = trainer_of(trunk, "first")
    run_step(trainer, "first", 0)
    before = tensor_bytes()
    clients = [f"client {number}" for number in range(8)]
    for client in clients:
        trainer.open_round(client, 1, adapter_state(trunk), {})
        run_step(trainer, client, 0)
    grown = tensor_bytes() - before
    assert grown == 8 * (3 * adapter_bytes + 4 * n_tensors)  # AdamW counts its steps in 4 bytes a tensor
    assert grown < 8 * base_bytes
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in trunk.named_parameters()} == base
    for client in clients:
        trainer.close(client)
    assert tensor_bytes() == before


def test_training_changes_nothing_but_the_slot() -> None:
    trunk = tiny_trunk()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    trainer = trainer_of(trunk, "a", "b")
    untouched, _ = trainer.result("b")
    run_round(trainer, "a")
    assert_same_bits(trunk.state_dict(), before)
    assert [name for name, parameter in trunk.named_parameters() if parameter.grad is not None] == []
    assert_same_bits(trainer.result("b")[0], untouched)
    after, _ = trainer.result("a")
    assert [name for name in after if torch.equal(after[name], untouched[name])] == []


def test_what_is_given_and_what_is_returned_is_the_callers_own() -> None:
    trunk = tiny_trunk()
    start = adapter_state(trunk)
    kept = {name: tensor.clone() for name, tensor in start.items()}
    trainer = TrunkTrainer(trunk, TRAINING, seed=3)
    trainer.open_round("a", 1, start, {})
    adapter, _ = trainer.result("a")
    smashed_BTD = hidden("mine")
    for index in range(2):
        trainer.forward("a", 0, index, smashed_BTD, wants_smashed_gradient=True)
    gradients = [trainer.backward("a", 0, index, hidden("gradient")) for index in range(2)]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])  # of the same data twice: one does not add to the other
    assert smashed_BTD.requires_grad is False
    assert smashed_BTD.grad is None
    trainer.step("a", 0)
    assert_same_bits(start, kept)
    assert_same_bits(adapter, kept)


# Clients beside each other


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_interleaved_clients_get_what_each_alone_would(dropout: float) -> None:
    trunk = tiny_trunk(dropout=dropout)
    alone = {client: trainer_of(trunk, client) for client in ("a", "b")}
    wanted = {client: run_round(trainer, client) for client, trainer in alone.items()}

    together = trainer_of(trunk, "a", "b")
    found: dict[str, list[Tensor]] = {"a": [], "b": []}
    for step in range(2):
        for index in range(2):
            for client in ("b", "a"):
                smashed_BTD = hidden(client, step, index)
                found[client].append(together.forward(client, step, index, smashed_BTD, wants_smashed_gradient=True))
        for index in range(2):
            for client in ("a", "b"):
                gradient_BTD = together.backward(client, step, index, hidden(client, step, index, "gradient"))
                assert gradient_BTD is not None
                found[client].append(gradient_BTD)
        for client in ("b", "a"):
            together.step(client, step)
    for client, trainer in alone.items():
        assert torch.equal(torch.stack(found[client]), wanted[client])
        for one, other in zip(together.result(client), trainer.result(client), strict=True):
            assert_same_bits(one, other)


def test_gradients_are_those_of_the_trunk_itself() -> None:
    """Against autograd on the module itself; AdamW's first moment after a step shows the gradient that it took."""
    trunk = tiny_trunk()
    trainer = trainer_of(trunk, "a")
    _, _, *smashed_gradients = run_step(trainer, "a", 0)
    parameters = adapter_parameters(trunk)
    trunk.train()
    for index in range(2):
        smashed_BTD = hidden("a", 0, index).requires_grad_()
        trunk(smashed_BTD).backward(hidden("a", 0, index, "gradient"))
        assert smashed_BTD.grad is not None
        assert_equal_to_rounding(smashed_gradients[index], smashed_BTD.grad, "smashed gradient")
    _, optimiser = trainer.result("a")
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        first_moment = parameter.grad * (1 - 0.9)  # AdamW's beta1
        assert_equal_to_rounding(optimiser[f"{name}/exp_avg"], first_moment, name)


# A round starts where it is told to


def test_reopening_a_round_forgets_everything_of_the_first_attempt() -> None:
    trunk = tiny_trunk(dropout=0.3)
    start = adapter_state(trunk)
    undisturbed = trainer_of(trunk, "a")
    wanted = run_round(undisturbed, "a")
    disturbed = trainer_of(trunk, "a")
    run_step(disturbed, "a", 0)
    disturbed.forward("a", 1, 0, hidden("lost"))
    disturbed.backward("a", 1, 0, hidden("a gradient that was gathered and not applied"))
    disturbed.forward("a", 1, 1, hidden("in flight"))
    assert disturbed.steps_done("a") == 1
    disturbed.open_round("a", 1, start, {})
    assert disturbed.steps_done("a") == 0
    assert torch.equal(run_round(disturbed, "a"), wanted)
    for one, other in zip(undisturbed.result("a"), disturbed.result("a"), strict=True):
        assert_same_bits(one, other)


def test_a_backward_of_the_first_attempt_is_refused_by_the_second() -> None:
    trunk = tiny_trunk()
    trainer = trainer_of(trunk, "a")
    trainer.forward("a", 0, 0, hidden("first attempt"))
    trainer.open_round("a", 1, adapter_state(trunk), {})
    with pytest.raises(ProtocolError, match="without its forward"):
        trainer.backward("a", 0, 0, hidden("gradient"))


def test_a_closed_slot_is_not_open() -> None:
    trainer = trainer_of(tiny_trunk(), "a")
    trainer.close("a")
    trainer.close("a")
    assert trainer.steps_done("a") == 0
    with pytest.raises(ProtocolError, match="has not been opened"):
        trainer.forward("a", 0, 0, hidden("a"))


def test_a_rounds_result_does_not_depend_on_what_came_before_or_beside_it() -> None:
    """Round 2 from what round 1 left: on a fresh trunk, and on one that other clients have used and are using."""
    trunk = tiny_trunk(dropout=0.3)
    first = trainer_of(trunk, "a")
    run_round(first, "a")
    adapter, optimiser = first.result("a")

    fresh = TrunkTrainer(tiny_trunk(dropout=0.3), TRAINING, seed=3)
    fresh.open_round("a", 2, adapter, optimiser)
    wanted = run_round(fresh, "a")

    busy = trainer_of(trunk, "b", "c")
    run_round(busy, "b")
    busy.forward("c", 0, 0, hidden("c, left in flight"))
    torch.manual_seed(99)
    busy.open_round("a", 2, adapter, optimiser)
    assert torch.equal(run_round(busy, "a"), wanted)
    assert_same_bits(busy.result("a")[0], fresh.result("a")[0])


def test_the_optimisers_state_carries_over_rounds() -> None:
    trunk = tiny_trunk()
    kept, dropped = trainer_of(trunk, "a"), trainer_of(trunk, "a")
    for trainer in (kept, dropped):
        run_round(trainer, "a")
    adapter, optimiser = kept.result("a")
    kept.open_round("a", 2, adapter, optimiser)
    dropped.open_round("a", 2, adapter, {})
    for trainer in (kept, dropped):
        run_step(trainer, "a", 0)
    assert {state.item() for name, state in kept.result("a")[1].items() if name.endswith("/step")} == {3}
    name = min(adapter)
    assert not torch.equal(kept.result("a")[0][name], dropped.result("a")[0][name])


# Dropout


@dataclass(frozen=True)
class At:
    """A place in a run."""

    seed: int = 3
    client: str = "a"
    round: int = 1
    step: int = 0
    index: int = 0


def output_at(trunk: Segment, at: At) -> Tensor:
    """The trunk's output for one and the same input, under one and the same adapter."""
    trainer = TrunkTrainer(trunk, TRAINING, seed=at.seed)
    trainer.open_round("slot", at.round, adapter_state(trunk), {}, client=at.client)
    for done in range(at.step):
        trainer.step("slot", done)
    return trainer.forward("slot", at.step, at.index, hidden("the same"))


def test_dropout_is_a_function_of_seed_client_round_step_and_micro_batch() -> None:
    trunk = tiny_trunk(dropout=0.3)
    places = [At(), At(seed=4), At(client="b"), At(round=2), At(step=1), At(index=1)]
    outputs = []
    for number, at in enumerate(places):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        outputs.append(output_at(trunk, at))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(output_at(trunk, at), outputs[-1])
    assert len(torch.unique(torch.stack(outputs).flatten(1), dim=0)) == len(places)


def test_two_sessions_of_one_client_draw_the_same_dropout() -> None:
    trunk = tiny_trunk(dropout=0.3)
    trainer = TrunkTrainer(trunk, TRAINING, seed=3)
    for slot in ("session 1", "session 2"):
        trainer.open_round(slot, 1, adapter_state(trunk), {}, client="a")
    first, second = (trainer.forward(slot, 0, 0, hidden("same")) for slot in ("session 1", "session 2"))
    assert torch.equal(first, second)


def test_evaluation_drops_nothing_waits_for_nothing_and_leaves_no_trace() -> None:
    trunk = tiny_trunk(dropout=0.3)
    trainer = trainer_of(trunk, "a")
    outputs = [trainer.forward("a", 0, index, hidden("same"), trains=False) for index in range(5)]
    trunk.eval()
    with torch.no_grad():
        wanted_BTD = trunk(hidden("same"))
    for output_BTD in outputs:
        assert torch.equal(output_BTD, wanted_BTD)
    with pytest.raises(ProtocolError, match="without its forward"):
        trainer.backward("a", 0, 0, hidden("gradient"))
    assert trainer.result("a")[1] == {}
    assert trainer.step("a", 0).version == 1


# Order


def test_the_schedule_goes_by_the_step_in_the_run() -> None:
    """The first AdamW step moves each element by the learning rate: linear from 1e-2 over 6 steps."""
    trunk = tiny_trunk()
    for round, wanted in ((1, 1e-2), (2, 1e-2 * 4 / 6), (3, 1e-2 * 2 / 6)):
        trainer = trainer_of(trunk, "a", round=round)
        before, _ = trainer.result("a")
        run_step(trainer, "a", 0)
        after, _ = trainer.result("a")
        moved = max((after[name] - before[name]).abs().max().item() for name in after)
        assert moved == pytest.approx(wanted, rel=1e-3)


def test_a_step_past_the_rounds_last_is_refused() -> None:
    trainer = trainer_of(tiny_trunk(), "a")
    run_round(trainer, "a")
    with pytest.raises(ProtocolError, match="step 2 of a round of 2 steps"):
        trainer.forward("a", 2, 0, hidden("a"))


def test_a_micro_batch_that_is_sent_twice_is_refused() -> None:
    trainer = trainer_of(tiny_trunk(), "a")
    trainer.forward("a", 0, 0, hidden("a"))
    with pytest.raises(ProtocolError, match="micro-batch 0 of step 0 twice"):
        trainer.forward("a", 0, 0, hidden("a"))


# The entrance


def half(y_BTD: Tensor) -> Tensor:
    """A denoiser of its own kind: nothing about it is linear, and a row depends on itself alone."""
    return torch.tanh(y_BTD) / 2


def test_a_denoiser_stands_at_the_entrance_in_training_and_in_evaluation() -> None:
    trunk = tiny_trunk()
    trainer = TrunkTrainer(trunk, TRAINING, seed=3, denoiser=half)
    trainer.open_round("a", 1, adapter_state(trunk), {})
    wanted_BTD = trunk.eval()(half(hidden("noisy")))
    for trains in (True, False):
        output_BTD = trainer.forward("a", 0, 0, hidden("noisy"), trains=trains)
        assert_equal_to_rounding(output_BTD, wanted_BTD, "trunk output")
    assert not torch.allclose(output_BTD, trunk(hidden("noisy")))


def test_the_smashed_gradient_is_that_of_what_came_through_the_denoiser() -> None:
    trunk = tiny_trunk()
    trainer = TrunkTrainer(trunk, TRAINING, seed=3, denoiser=half)
    trainer.open_round("a", 1, adapter_state(trunk), {})
    trainer.forward("a", 0, 0, hidden("noisy"), wants_smashed_gradient=True)
    found_BTD = trainer.backward("a", 0, 0, hidden("gradient"))
    smashed_BTD = hidden("noisy").requires_grad_()
    trunk.train()(half(smashed_BTD)).backward(hidden("gradient"))
    assert found_BTD is not None
    assert smashed_BTD.grad is not None
    assert_equal_to_rounding(found_BTD, smashed_BTD.grad, "smashed gradient")
    trainer.step("a", 0)
    _, optimiser = trainer.result("a")
    for name, parameter in adapter_parameters(trunk).items():
        assert parameter.grad is not None
        assert_equal_to_rounding(optimiser[f"{name}/exp_avg"], parameter.grad * (1 - 0.9), name)


def test_a_clients_own_denoiser_goes_before_the_trainers() -> None:
    trunk = tiny_trunk()
    trainer = TrunkTrainer(trunk, TRAINING, seed=3, denoiser=half)
    trainer.open_round("own", 1, adapter_state(trunk), {}, denoiser=torch.sin)
    trainer.open_round("none", 1, adapter_state(trunk), {})
    trunk.eval()
    for slot, denoiser in (("own", torch.sin), ("none", half)):
        output_BTD = trainer.forward(slot, 0, 0, hidden("noisy"), trains=False)
        assert_equal_to_rounding(output_BTD, trunk(denoiser(hidden("noisy"))), slot)


def test_another_denoiser_holds_from_the_next_round() -> None:
    trunk = tiny_trunk()
    trainer = trainer_of(trunk, "a")
    trainer.denoiser = half
    trunk.eval()
    before_BTD = trainer.forward("a", 0, 0, hidden("noisy"), trains=False)
    assert_equal_to_rounding(before_BTD, trunk(hidden("noisy")), "before")
    trainer.open_round("a", 2, adapter_state(trunk), {})
    after_BTD = trainer.forward("a", 0, 0, hidden("noisy"), trains=False)
    assert_equal_to_rounding(after_BTD, trunk(half(hidden("noisy"))), "after")


def test_without_a_denoiser_not_a_bit_changes() -> None:
    trunk = tiny_trunk(dropout=0.3)
    plain, identity = trainer_of(trunk, "a"), TrunkTrainer(trunk, TRAINING, seed=3, denoiser=lambda y_BTD: y_BTD)
    identity.open_round("a", 1, adapter_state(trunk), {})
    assert torch.equal(run_round(plain, "a"), run_round(identity, "a"))
    assert_same_bits(plain.result("a")[0], identity.result("a")[0])


# A residual under the adapter


def trunk_with_residual() -> tuple[Segment, dict[str, Tensor]]:
    """A trunk of two blocks with a residual of zeros, and one to be put in its place."""
    trunk = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).trunk
    add_adapter(trunk, LoraSettings(rank=2, alpha=4.0), seed=0, residual_rank=3)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in residual_parameters(trunk).items()}
    return trunk, {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("blocks", [None, range(2, 3)])
def test_another_residual_holds_from_the_next_round_and_leaves_a_late_one_its_own(blocks: range | None) -> None:
    trunk, residual = trunk_with_residual()
    alone, late = (TrunkTrainer(trunk, TRAINING, seed=3) for _ in range(2))
    for trainer in (alone, late):
        trainer.open_round("late", 1, adapter_state(trunk), {}, blocks=blocks)
    wanted = run_round(alone, "late")

    found = [late.forward("late", 0, index, hidden("late", 0, index), wants_smashed_gradient=True) for index in (0, 1)]
    late.load_residual(residual)  # the others' next round begins between its forward and its backward
    late.open_round("next", 2, adapter_state(trunk), {}, blocks=blocks)
    next_BTD = late.forward("next", 0, 0, hidden("next"), trains=False)
    for index in (0, 1):
        gradient_BTD = late.backward("late", 0, index, hidden("late", 0, index, "gradient"))
        assert gradient_BTD is not None
        found.append(gradient_BTD)
    late.step("late", 0)
    assert torch.equal(torch.stack([*found, *run_step(late, "late", 1)]), wanted)
    assert_same_bits(late.result("late")[0], alone.result("late")[0])

    part = late.trunk_over(blocks).eval()
    assert not torch.allclose(next_BTD, part(hidden("next")), atol=1e-2)
    load_residual(trunk, residual)
    assert_equal_to_rounding(next_BTD, part(hidden("next")), "the next round's trunk output")
