"""Clients that train one trunk adapter: whose gradient counts for what, with which version, and who waits for whom."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from splitfed.errors import ProtocolError, RoundLost, ServerUnreachable
from splitfed.federation.variants import Staleness
from splitfed.models import Segment, adapter_parameters, adapter_state
from splitfed.training.joint_pace import JointPace
from splitfed.training.together import FreeCalls, JointCalls, at_once
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import Applied, TrunkTrainer
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.training.split_client import D
from tests.training.test_trunk_step import TRAINING, B, T, assert_same_bits, hidden, tiny_trunk

EPSILON = 2.0**-20
"""What two ways to the same float32 gradient may differ by, for numbers near 1."""


@dataclass
class FakeTrunk:
    """Answers with what it was asked; keeps shares, steps and the norms of others."""

    shares: list[dict[str, float]] = field(default_factory=list)
    stepped: list[tuple[list[str], int, float | None]] = field(default_factory=list)

    def forward_together(self, calls: Sequence[TrunkForward]) -> list[Tensor]:
        return [call.smashed_BTD for call in calls]

    def backward_together(self, calls: Sequence[TrunkBackward]) -> list[Tensor]:
        self.shares.append({call.slot: call.share for call in calls})
        return [call.output_gradient_BTD for call in calls]

    def step_together(self, slots: Sequence[str], step: int, *, others: float | None = None) -> Applied:
        self.stepped.append((list(slots), step, others))
        return Applied(len(self.stepped), others or 0.0)


class Cohort:
    """Joint calls of a few clients on a trunk, by short names.

    Attributes:
        now_s: What the clock says.
    """

    def __init__(self, slots: str, trunk: Any) -> None:
        self.now_s = 0.0
        self.trunk = trunk
        self.calls = JointCalls(slots, at_once(trunk), clock=lambda: self.now_s)

    def forward(self, slot: str, step: int = 0, micro_batch: int = 0, *, tokens: int = 1) -> Future[Tensor]:
        x_BTD = hidden(slot, step, micro_batch)
        return self.calls.forward(TrunkForward(slot, step, micro_batch, x_BTD), tokens=tokens)

    def backward(self, slot: str, step: int = 0, micro_batch: int = 0) -> Future[Tensor | None]:
        return self.calls.backward(TrunkBackward(slot, step, micro_batch, hidden(slot, step, micro_batch, "gradient")))

    def step_all(self, step: int, *, takes_s: float = 1.0) -> None:
        """Let everyone make a whole local step."""
        for call in (self.forward, self.backward):
            for slot in list(self.calls.slots):
                call(slot, step)
        self.now_s += takes_s
        for slot in list(self.calls.slots):
            self.calls.step(slot, step)


def cohort(slots: str = "abc") -> tuple[Cohort, FakeTrunk]:
    trunk = FakeTrunk()
    return Cohort(slots, trunk), trunk


# Joint steps: shares


def test_a_gradient_counts_by_its_tokens_and_no_tokens_count_as_one() -> None:
    group, trunk = cohort()
    for slot, tokens in {"c": 3, "a": 0, "b": 4}.items():
        group.forward(slot, tokens=tokens)
    for slot in "bca":
        group.backward(slot)
    assert trunk.shares == [{"a": 1 / 8, "b": 4 / 8, "c": 3 / 8}]


def test_tokens_are_those_of_a_steps_first_micro_batch_whatever_comes_later() -> None:
    group, trunk = cohort("ab")
    for micro_batch, tokens in ((0, 3), (1, 1000)):
        group.forward("a", 0, micro_batch, tokens=tokens)
        group.forward("b", 0, micro_batch, tokens=1)
    for micro_batch in (0, 1):
        group.backward("a", 0, micro_batch)
        group.backward("b", 0, micro_batch)
    assert trunk.shares == [{"a": 3 / 4, "b": 1 / 4}] * 2


@pytest.mark.parametrize("had_asked", [False, True])
def test_who_goes_before_its_forward_is_run_has_no_share_whether_it_had_asked_or_not(had_asked: bool) -> None:
    group, trunk = cohort()
    if had_asked:
        group.forward("c", tokens=10)
    group.forward("a", tokens=1)
    group.calls.leave("c")
    group.forward("b", tokens=3)
    for slot in "ab":
        group.backward(slot)
    assert trunk.shares == [{"a": 1 / 4, "b": 3 / 4}]


def test_who_goes_amid_a_step_leaves_the_shares_of_the_others_as_they_are() -> None:
    group, trunk = cohort()
    for slot, tokens in {"a": 1, "b": 3, "c": 4}.items():
        group.forward(slot, tokens=tokens)
    group.backward("a")
    group.backward("b")
    group.calls.leave("c")
    assert trunk.shares == [{"a": 1 / 8, "b": 3 / 8}]
    for slot in "ab":
        group.calls.step(slot, 0)
    for slot in "ab":
        group.forward(slot, 1, tokens=1)
    for slot in "ab":
        group.backward(slot, 1)
    assert trunk.shares[1] == {"a": 1 / 2, "b": 1 / 2}


def test_the_norms_of_the_clients_own_segments_are_weighed_like_their_gradients() -> None:
    group, trunk = cohort("ab")
    group.forward("a", tokens=1)
    group.forward("b", tokens=3)
    for slot in "ab":
        group.backward(slot)
    applied = [group.calls.step(slot, 0, squared_norm=norm) for slot, norm in (("a", 8.0), ("b", 4.0))]
    assert trunk.stepped == [(["a", "b"], 0, 8 / 4 + 4 * 3 / 4)]
    assert [answer.result(0) for answer in applied] == [Applied(1, 5.0)] * 2


# Joint steps: what is not due


def test_a_call_of_another_step_fails_alone_and_the_others_go_on() -> None:
    group, trunk = cohort("ab")
    for asked in (group.forward("a", 1), group.backward("a", 7), group.calls.step("a", 2)):
        with pytest.raises(ProtocolError, match="came; step 0 is due"):
            asked.result(0)
    group.step_all(0)
    assert trunk.stepped == [(["a", "b"], 0, None)]
    with pytest.raises(ProtocolError, match="A forward of step 0 came; step 1 is due"):
        group.forward("a", 0).result(0)


def test_a_client_alone_that_asks_for_a_backward_without_its_forward_is_refused_by_the_trunk() -> None:
    _, trainer = shared_trainer("a", joint=True)
    group = Cohort("a", trainer)
    with pytest.raises(ProtocolError, match="without its forward"):
        group.backward("a").result(0)
    assert group.calls.step("a", 0).result(0).version == 1


def test_evaluation_waits_for_nobody() -> None:
    group, _ = cohort("ab")
    x_BTD = hidden("a")
    assert group.calls.forward(TrunkForward("a", 0, 0, x_BTD, trains=False)).result(0) is x_BTD


def test_a_round_that_is_over_keeps_nobody() -> None:
    group, trunk = cohort("ab")
    waiting = group.forward("a")
    group.calls.close(ServerUnreachable("The server is shutting down."))
    for asked in (waiting, group.forward("b"), group.calls.mean_gradient("a", 0, {}, tokens=1)):
        with pytest.raises(ServerUnreachable, match="shutting down"):
            asked.result(0)
    assert trunk.shares == []


# The mean gradient


def gradient(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((2,), value)}


def test_the_mean_gradient_is_weighted_by_tokens_and_the_same_for_all() -> None:
    group, _ = cohort("ab")
    first = group.calls.mean_gradient("b", 0, gradient(4.0), tokens=3)
    assert not first.done()
    second = group.calls.mean_gradient("a", 0, gradient(8.0), tokens=1)
    assert torch.equal(first.result(0)["w"], torch.full((2,), 5.0))
    assert torch.equal(second.result(0)["w"], first.result(0)["w"])


def test_a_gradient_that_comes_again_is_counted_once_before_and_after_the_mean() -> None:
    group, _ = cohort("ab")
    lost = group.calls.mean_gradient("a", 0, gradient(8.0), tokens=1)
    again = group.calls.mean_gradient("a", 0, gradient(8.0), tokens=1)
    group.calls.mean_gradient("b", 0, gradient(4.0), tokens=1)
    assert isinstance(lost.exception(0), RoundLost)
    assert torch.equal(again.result(0)["w"], torch.full((2,), 6.0))
    after = group.calls.mean_gradient("a", 0, gradient(100.0), tokens=1)
    assert torch.equal(after.result(0)["w"], torch.full((2,), 6.0))


def test_a_mean_of_nothing_is_given_again_as_any_other() -> None:
    """Where the ends are cut before the first and after the last block, they have nothing to train."""
    group, _ = cohort("ab")
    asked = [group.calls.mean_gradient(slot, 0, {}, tokens=1) for slot in "ab"]
    asked.append(group.calls.mean_gradient("a", 0, {}, tokens=1))
    assert [answer.result(0) for answer in asked] == [{}] * 3


def test_the_mean_of_one_step_is_not_given_for_another() -> None:
    group, _ = cohort("ab")
    for step, value in enumerate((2.0, 6.0)):
        asked = [group.calls.mean_gradient(slot, step, gradient(value), tokens=1) for slot in "ab"]
        assert torch.equal(asked[0].result(0)["w"], torch.full((2,), value))
    for step in (0, 3):
        with pytest.raises(ProtocolError, match=f"Gradients of step {step} came; those of step 2 are due"):
            group.calls.mean_gradient("a", step, gradient(1.0), tokens=1).result(0)


def test_the_mean_goes_on_without_one_that_leaves_and_says_nothing_to_it() -> None:
    group, _ = cohort()
    lost = group.calls.mean_gradient("c", 0, gradient(100.0), tokens=9)
    kept = [group.calls.mean_gradient("a", 0, gradient(2.0), tokens=1)]
    group.calls.leave("c")
    kept.append(group.calls.mean_gradient("b", 0, gradient(2.0), tokens=1))
    assert torch.equal(kept[0].result(0)["w"], torch.full((2,), 2.0))
    assert isinstance(lost.exception(0), RoundLost)
    assert isinstance(group.calls.mean_gradient("c", 0, gradient(1.0), tokens=1).exception(0), ProtocolError)
    assert isinstance(group.calls.mean_gradient("c", 1, gradient(1.0), tokens=1).exception(0), RoundLost)


def test_each_tensors_mean_is_over_those_that_have_it() -> None:
    group, _ = cohort("ab")
    one = group.calls.mean_gradient("a", 0, {**gradient(2.0), "own": torch.ones(1)}, tokens=1)
    other = group.calls.mean_gradient("b", 0, gradient(4.0), tokens=1)
    assert one.result(0).keys() == {"w", "own"}
    assert other.result(0).keys() == {"w"}
    assert torch.equal(one.result(0)["own"], torch.ones(1))


# Who holds up joint steps


def test_nobody_holds_up_a_cohort_of_which_no_three_steps_are_known_beside_the_first() -> None:
    group, _ = cohort()
    for step in range(3):
        group.step_all(step)
    for slot in "ab":
        group.forward(slot, 3)
    group.now_s += 1000
    assert group.calls.holding_up(2.0) == set()


def test_who_keeps_the_others_waiting_beyond_the_margin_holds_them_up() -> None:
    group, _ = cohort()
    for step in range(4):
        group.step_all(step, takes_s=2.0)
    for slot in "ac":
        group.forward(slot, 4)
    group.now_s += 3 * 2.0
    assert group.calls.holding_up(3.0) == set()
    group.now_s += 0.1
    assert group.calls.holding_up(3.0) == {"b"}
    group.forward("b", 4)
    assert group.calls.holding_up(3.0) == set()


def test_a_round_goes_by_the_steps_of_rounds_before() -> None:
    """Two rounds of two steps, of 5 s and 1 s: the second step is the third that is known."""
    pace, held = JointPace(), []
    for _ in range(3):
        group, _ = cohort()
        group.calls = JointCalls("abc", at_once(group.trunk), clock=lambda group=group: group.now_s, pace=pace)  # type: ignore[misc]
        group.step_all(0, takes_s=5.0)
        group.step_all(1, takes_s=1.0)
        group.step_all(2, takes_s=1.0)
        for slot in "ab":
            group.forward(slot, 3)
        group.now_s += 3.5
        held.append(group.calls.holding_up(3.0))
    assert held == [set(), {"c"}, {"c"}]


def test_a_rounds_first_step_goes_by_first_steps() -> None:
    pace = JointPace()
    first, _ = cohort()
    first.calls = JointCalls("abc", at_once(first.trunk), clock=lambda: first.now_s, pace=pace)
    for slot in "ab":
        first.forward(slot)
    first.now_s += 4.0
    assert first.calls.holding_up(3.0) == set()  # of no round before
    first.step_all(0, takes_s=1.0)
    for step in range(1, 5):
        first.step_all(step, takes_s=0.1)
    second, _ = cohort()
    second.calls = JointCalls("abc", at_once(second.trunk), clock=lambda: second.now_s, pace=pace)
    second.forward("a")
    second.forward("b")
    second.now_s = 15.0
    assert second.calls.holding_up(3.0) == set()
    second.now_s = 15.1
    assert second.calls.holding_up(3.0) == {"c"}


def test_half_of_a_cohort_do_not_hold_up_the_rest_one_after_the_other_either() -> None:
    group, _ = cohort("abcde")
    for step in range(4):
        group.step_all(step)
    for step, slow in ((4, "e"), (5, "d")):
        for slot in list(group.calls.slots):
            if slot != slow:
                group.forward(slot, step)
        group.now_s += 100
        assert group.calls.holding_up(3.0) == {slow}
        group.calls.leave(slow)
        for call in (group.backward, group.calls.step):
            for slot in list(group.calls.slots):
                call(slot, step)
    for slot in "ab":
        group.forward(slot, 6)
    group.now_s += 1000
    assert group.calls.holding_up(3.0) == set()


def test_two_wait_for_each_other() -> None:
    group, _ = cohort("ab")
    for step in range(4):
        group.step_all(step)
    group.forward("a", 4)
    group.now_s += 1000
    assert group.calls.holding_up(3.0) == set()


def test_more_than_half_do_not_hold_up_the_rest() -> None:
    group, _ = cohort()
    for step in range(4):
        group.step_all(step)
    group.forward("a", 4)
    group.now_s += 100
    assert group.calls.holding_up(3.0) == set()
    group.forward("b", 4)
    assert group.calls.holding_up(3.0) == {"c"}


# One's fault is not another's


def shared_trainer(*slots: str, joint: bool, round: int = 1) -> tuple[Segment, TrunkTrainer]:
    trunk = tiny_trunk()
    trainer = TrunkTrainer(trunk, TRAINING, seed=3)
    trainer.open_shared("all", adapter_state(trunk), {})
    for slot in slots:
        trainer.open_round(slot, round, shared="all", joint=joint)
    return trunk, trainer


def joint_step(group: Cohort, *, without: str = "") -> list[Tensor]:
    """A step of those that are well; gives their outputs."""
    well = [slot for slot in "abc" if slot not in without]
    outputs = [group.forward(slot) for slot in well]
    for slot in well:
        group.backward(slot)
    for slot in well:
        group.calls.step(slot, 0).result(0)
    return [output.result(0) for output in outputs]


def test_a_backward_of_another_shape_fails_alone_and_the_others_step_as_if_it_had_gone() -> None:
    adapters = []
    for is_hostile in (True, False):
        _, trainer = shared_trainer(*"abc", joint=True)
        group = Cohort("abc", trainer)
        for slot in "abc":
            group.forward(slot)
        kept = [group.backward(slot) for slot in "ab"]
        if is_hostile:
            odd = group.calls.backward(TrunkBackward("c", 0, 0, torch.ones(B, T + 1, D)))
            with pytest.raises(ProtocolError, match=r"output gradient has shape \[2, 7, 32\]"):
                odd.result(0)
        group.calls.leave("c")
        for slot in "ab":
            group.calls.step(slot, 0)
        assert [answer.exception(0) for answer in kept] == [None, None]
        adapters.append(trainer.shared_result("all")[0])
    assert_same_bits(*adapters)


def test_a_forward_that_is_not_finite_fails_alone_and_the_others_have_the_bits_of_a_pass_without_it() -> None:
    results = []
    for is_hostile in (True, False):
        _, trainer = shared_trainer(*"abc", joint=True)
        group = Cohort("abc", trainer)
        if is_hostile:
            odd = group.calls.forward(TrunkForward("c", 0, 0, torch.full((B, T, D), torch.inf)), tokens=1)
            outputs = [group.forward(slot) for slot in "ab"]
            with pytest.raises(ProtocolError, match="output of 'c' in step 0 is not finite; lower the learning rate"):
                odd.result(0)
        else:
            group.calls.leave("c")
            outputs = [group.forward(slot) for slot in "ab"]
        results.append(torch.stack([output.result(0) for output in outputs]))
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("joint", [True, False])
def test_gradients_that_would_spoil_a_shared_adapter_are_not_applied_and_not_kept(value: float, joint: bool) -> None:
    _, trainer = shared_trainer("a", "b", joint=joint)
    before, _ = trainer.shared_result("all")
    trainer.forward("a", 0, 0, hidden("a"))
    trainer.backward("a", 0, 0, torch.full((B, T, D), value))
    with pytest.raises(ProtocolError, match=r"squared norm .* were not applied; lower the learning rate"):
        _ = trainer.step_together(["a"], 0) if joint else trainer.step("a", 0)
    assert_same_bits(trainer.shared_result("all")[0], before)
    trainer.forward("b", 0, 0, hidden("b"))
    trainer.backward("b", 0, 0, hidden("b", "gradient"))
    trainer.step("b", 0)
    adapter, optimiser = trainer.shared_result("all")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (adapter | optimiser).values())
    assert any(not torch.equal(adapter[name], before[name]) for name in adapter)


# The fence


def gradient_by_hand(trunk: Segment, state: Mapping[str, Tensor], x_BTD: Tensor, output_gradient_BTD: Tensor) -> Any:
    """Give what autograd says of the trunk with this adapter: the adapter's gradients, and that at the entrance."""
    local = {id(parameter): name for name, parameter in trunk.named_parameters()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    named = {local[id(parameter)]: leaves[name] for name, parameter in adapter_parameters(trunk).items()}
    entrance_BTD = x_BTD.clone().requires_grad_()
    trunk.train()
    output_BTD = functional_call(trunk, named, (entrance_BTD,), {"attention_mask": None, "position_ids": None})
    *found, smashed_BTD = torch.autograd.grad(output_BTD, [*leaves.values(), entrance_BTD], output_gradient_BTD)
    return dict(zip(leaves, found, strict=True)), smashed_BTD


def test_a_step_between_a_forward_and_its_backward_leaves_the_gradient_that_of_the_forwards_version() -> None:
    trunk, trainer = shared_trainer("a", "b", joint=False)
    calls = FreeCalls(at_once(trainer), Staleness(most=9, clients=2))
    start, _ = trainer.shared_result("all")
    x_BTD, output_gradient_BTD = hidden("a"), hidden("a", "gradient")
    calls.forward(TrunkForward("a", 0, 0, x_BTD, wants_smashed_gradient=True))
    for step in range(2):
        calls.forward(TrunkForward("b", step, 0, hidden("b", step)))
        calls.backward(TrunkBackward("b", step, 0, hidden("b", step, "gradient")))
        calls.step("b", step).result(0)
    moved, optimiser = trainer.shared_result("all")
    smashed_gradient_BTD = calls.backward(TrunkBackward("a", 0, 0, output_gradient_BTD)).result(0)
    applied = calls.step("a", 0).result(0)
    _, optimiser_after = trainer.shared_result("all")
    own, own_smashed_BTD = gradient_by_hand(trunk, start, x_BTD, output_gradient_BTD)
    of_another, another_smashed_BTD = gradient_by_hand(trunk, moved, x_BTD, output_gradient_BTD)
    assert smashed_gradient_BTD is not None
    assert_equal_to_rounding(smashed_gradient_BTD, own_smashed_BTD, "the smashed gradient")
    assert not torch.allclose(smashed_gradient_BTD, another_smashed_BTD, atol=1e-3)
    for name in own:
        moment = f"{name}/exp_avg"
        used = (optimiser_after[moment] - 0.9 * optimiser[moment]) / 0.1  # AdamW's first moment, solved for it
        torch.testing.assert_close(used, own[name], rtol=1e-4, atol=64 * EPSILON)
    assert applied.squared_norm == pytest.approx(sum(float(g.double().square().sum()) for g in own.values()), rel=1e-5)
    assert any(not torch.allclose(of_another[name], own[name], atol=1e-2) for name in own)
    assert max(calls.ages) == 2


def test_each_micro_batch_of_a_step_is_computed_with_the_version_of_its_own_forward() -> None:
    trunk, trainer = shared_trainer("a", "b", joint=False)
    calls = FreeCalls(at_once(trainer), Staleness(most=9, clients=2))
    versions = []
    for micro_batch in range(2):
        versions.append(trainer.shared_result("all")[0])
        calls.forward(TrunkForward("a", 0, micro_batch, hidden("a", micro_batch)))
        calls.forward(TrunkForward("b", micro_batch, 0, hidden("b", micro_batch)))
        calls.backward(TrunkBackward("b", micro_batch, 0, hidden("b", micro_batch, "gradient")))
        calls.step("b", micro_batch).result(0)
    _, optimiser = trainer.shared_result("all")
    for micro_batch in (1, 0):
        calls.backward(TrunkBackward("a", 0, micro_batch, hidden("a", micro_batch, "gradient")))
    calls.step("a", 0).result(0)
    _, optimiser_after = trainer.shared_result("all")
    parts = [
        gradient_by_hand(trunk, state, hidden("a", index), hidden("a", index, "gradient"))[0]
        for index, state in enumerate(versions)
    ]
    for name in parts[0]:
        moment = f"{name}/exp_avg"
        used = (optimiser_after[moment] - 0.9 * optimiser[moment]) / 0.1
        torch.testing.assert_close(used, parts[0][name] + parts[1][name], rtol=1e-4, atol=64 * EPSILON)


@pytest.mark.parametrize(("exponent", "factor"), [(0.5, 3**-0.5), (1.0, 1 / 3)])
def test_a_step_with_two_others_in_between_moves_by_less(exponent: float, factor: float) -> None:
    moves = {}
    for each in (0.0, exponent):
        _, trainer = shared_trainer("a", "b", joint=False)
        calls = FreeCalls(at_once(trainer), Staleness(most=9, clients=2, exponent=each))
        calls.forward(TrunkForward("a", 0, 0, hidden("a")))
        for step in range(2):
            calls.forward(TrunkForward("b", step, 0, hidden("b", step)))
            calls.backward(TrunkBackward("b", step, 0, hidden("b", step, "gradient")))
            calls.step("b", step).result(0)
        before, _ = trainer.shared_result("all")
        calls.backward(TrunkBackward("a", 0, 0, hidden("a", "gradient")))
        calls.step("a", 0).result(0)
        after, _ = trainer.shared_result("all")
        moves[each] = torch.cat([(after[name] - before[name]).flatten() for name in sorted(after)])
    torch.testing.assert_close(moves[exponent], factor * moves[0.0], rtol=1e-3, atol=1e-6)


def test_a_free_step_goes_by_its_clients_place_in_the_schedule_however_many_others_came_before() -> None:
    """The first step of a warm-up has the rate 0, and so it has for one that makes it after two of another's."""
    trunk = tiny_trunk()
    trainer = TrunkTrainer(trunk, TRAINING.model_copy(update={"warmup_steps": 2}), seed=3)
    trainer.open_shared("all", adapter_state(trunk), {})
    calls = FreeCalls(at_once(trainer), Staleness(most=9, clients=2))
    moves = []
    for slot, step in (("b", 0), ("b", 1), ("a", 0), ("a", 1)):
        if step == 0:
            trainer.open_round(slot, 1, shared="all")
        before, _ = trainer.shared_result("all")
        calls.forward(TrunkForward(slot, step, 0, hidden(slot, step)))
        calls.backward(TrunkBackward(slot, step, 0, hidden(slot, step, "gradient")))
        calls.step(slot, step).result(0)
        after, _ = trainer.shared_result("all")
        moves.append(any(not torch.equal(after[name], before[name]) for name in after))
    assert moves == [False, True, False, True]


# Free steps: who waits


@dataclass
class Versions:
    """A trunk that is nothing but its version: knows how old each step is as it is applied, and what it counts for."""

    version: int = 0
    begun: dict[str, int] = field(default_factory=dict)
    applied: list[tuple[str, int, float]] = field(default_factory=list)

    def forward_together(self, calls: Sequence[TrunkForward]) -> list[Tensor]:
        for call in calls:
            self.begun.setdefault(call.slot, self.version)
        return [call.smashed_BTD for call in calls]

    def backward_together(self, calls: Sequence[TrunkBackward]) -> list[Tensor]:
        return [call.output_gradient_BTD for call in calls]

    def step(self, slot: str, step: int, *, rate: Callable[[int], float], others: float | None = None) -> Applied:
        age = self.version - self.begun.pop(slot)
        self.version += 1
        self.applied.append((slot, age, rate(age)))
        return Applied(self.version, 0.0)


EMPTY = torch.zeros(0)


class Free:
    """Clients that make steps of a forward or two as they like.

    Attributes:
        steps: Steps that each has made, or waits for.
        open: Forwards of the step that each has begun.
        waiting: Those whose step is not applied yet, or cannot begin yet.
    """

    def __init__(self, clients: int, spare: int, more: int = 0) -> None:
        self.trunk = Versions()
        self.staleness = Staleness(clients - 1 + spare, clients)
        self.calls = FreeCalls(at_once(cast(TrunkTrainer, self.trunk)), self.staleness)
        self.open = dict.fromkeys("abcdefg"[: clients + more], 0)
        self.steps = dict.fromkeys(self.open, 0)
        self.waiting: dict[str, Future[Any]] = {}

    def forward(self, client: str) -> None:
        self.waiting[client] = self.calls.forward(TrunkForward(client, self.steps[client], self.open[client], EMPTY))
        self.open[client] += 1
        self._look()

    def step(self, client: str) -> None:
        self.waiting[client] = self.calls.step(client, self.steps[client])
        self.steps[client] += 1
        self.open[client] = 0
        self._look()

    def leave(self, client: str) -> None:
        self.calls.leave(client)
        self._look()
        assert client not in self.waiting
        del self.open[client]

    @property
    def able(self) -> list[str]:
        return [client for client in self.open if client not in self.waiting]

    def _look(self) -> None:
        self.waiting = {client: answer for client, answer in self.waiting.items() if not answer.done()}


moves = st.lists(st.tuples(st.sampled_from(["forward", "step", "step", "leave"]), st.integers(0, 4)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), moves)
def test_no_step_is_older_than_allowed_and_nobody_waits_for_ever_whoever_is_fast(
    clients: int, spare: int, more: int, script: list[tuple[str, int]]
) -> None:
    free = Free(clients, spare, more)
    for what, index in script:
        if what == "leave" and len(free.open) > 1 and index == 0:
            free.leave(next(iter(free.open)))
        elif free.able:
            client = free.able[index % len(free.able)]
            if what == "step" and free.open[client]:
                free.step(client)
            else:
                free.forward(client)
        assert free.able or not free.open, "all wait for each other"
    while begun := [client for client in free.able if free.open[client]]:
        free.step(begun[-1])
    assert not free.waiting
    assert all(age <= free.staleness.most for _, age, _ in free.trunk.applied)
    assert free.calls.ages == Counter(age for _, age, _ in free.trunk.applied)
    assert all(rate == (1 + age) ** -0.5 for _, age, rate in free.trunk.applied)


def test_a_fast_client_waits_where_its_step_would_make_a_slow_ones_too_old() -> None:
    free = Free(clients=2, spare=1)
    free.forward("a")
    for _ in range(2):
        free.forward("b")
        free.step("b")
    assert list(free.waiting) == ["b"]
    free.step("a")
    assert not free.waiting
    assert [age for slot, age, _ in free.trunk.applied if slot == "a"] == [1]


def test_one_more_than_counted_on_begins_once_another_has_stepped_or_gone() -> None:
    free = Free(clients=2, spare=0, more=2)
    for client in "abcd":
        free.forward(client)
    assert list(free.waiting) == ["c", "d"]
    free.step("a")
    assert list(free.waiting) == ["d"]
    free.leave("b")
    assert not free.waiting
    free.step("c")
    free.step("d")
    assert free.trunk.applied == [("a", 0, 1.0), ("c", 0, 1.0), ("d", 1, 2**-0.5)]


def test_what_still_comes_from_a_client_that_left_holds_nobody_up() -> None:
    free = Free(clients=2, spare=0)
    free.forward("a")
    free.calls.leave("a")
    free.calls.forward(TrunkForward("a", 0, 1, EMPTY))
    with pytest.raises(RoundLost, match="takes part again when it is asked"):
        free.calls.step("a", 0).result(0)
    for _ in range(5):
        free.forward("b")
        free.step("b")
    assert not free.waiting


def test_a_round_that_is_over_lets_those_go_whose_steps_wait() -> None:
    free = Free(clients=2, spare=0)
    free.forward("a")
    for _ in range(2):
        free.forward("b")
        free.step("b")
    more = free.calls.forward(TrunkForward("c", 0, 0, EMPTY))
    (waiting,) = free.waiting.values()
    free.calls.close(RoundLost("Round 1 is over; wait for the next one."))
    for asked in (waiting, more, free.calls.step("a", 0), free.calls.forward(TrunkForward("a", 0, 1, EMPTY))):
        with pytest.raises(RoundLost, match="Round 1 is over; wait"):
            asked.result(0)
    assert len(free.trunk.applied) == 1


def test_a_bound_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(
        ValueError, match="max_staleness is 1, but 3 clients at work make up to 2 steps in between; raise"
    ):
        Staleness(most=1, clients=3)
