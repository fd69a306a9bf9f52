"""What the updates of a round come to, from numbers that can be worked out by hand."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.config import FederationSection, LoraSection, ModelSection, RunConfig, RunIdentity
from splitfed.config.aggregation import AggregationSection
from splitfed.errors import ProtocolError
from splitfed.federation import UpdateRefused
from splitfed.server.devices import Devices, shapes_of
from splitfed.server.round_updates import RoundUpdates
from splitfed.server.store import RunState
from splitfed.transport.adapters import RESIDUAL

TRUNK_A, TRUNK_B = "model.layers.1.q.lora_A.weight", "model.layers.1.q.lora_B.weight"
A, B = "model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_B.weight"
R, WIDE = 2, 3
WEIGHTS = {"a": 1, "b": 3, "c": 1, "d": 1, "e": 1}
VARIANTS = ["sflv1", "sflv2", "parallel", "async"]

State = dict[str, Tensor]
MakeUpdates = Callable[..., RoundUpdates]


def factors(a: float, b: float, *, trunk: bool = False) -> State:
    names = (TRUNK_A, TRUNK_B) if trunk else (A, B)
    return {names[0]: torch.full((R, WIDE), a), names[1]: torch.full((WIDE, R), b)}


START = RunState(0, factors(1.0, 0.0, trunk=True), factors(1.0, 0.0))


@pytest.fixture
def begun() -> MakeUpdates:
    """Begin round 1 of a run, with what each of its agents holds."""

    def make(
        variant: Any = "sflv1",
        *,
        lora: Any = "factors",
        state: RunState = START,
        own: Mapping[str, Any] = {},
        aggregation: Mapping[str, Any] = {},
        **keys: Any,
    ) -> RoundUpdates:
        run = RunConfig(
            run=RunIdentity(name="small"),
            model=ModelSection(base="demo", bottom_blocks=1, top_blocks=0),
            lora=LoraSection(rank=R, **keys),
            federation=FederationSection(agents=len(WEIGHTS), quorum=3, variant=variant),
            aggregation=AggregationSection(lora=lora, **aggregation),
        )
        ends = shapes_of(state.ends)
        devices = Devices(run, ends, {1: shapes_of(state.trunk), 2: {}} if state.trunk else {})
        for client, holds in own.items():
            devices.put(client, devices.device(**holds))
        updates = RoundUpdates(run, devices, WEIGHTS.__getitem__, state.aggregator)
        updates.begin(state, 1)
        return updates

    return make


def of_trunk(variant: str, b: float) -> State:
    """What the trunk has trained on a client's behalf alone."""
    return {} if variant in ("parallel", "async") else factors(1.0, b, trunk=True)


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_updates_come_to_their_weighted_mean_and_copies_of_the_trunk_too(begun: MakeUpdates) -> None:
    updates = begun()
    updates.take("a", 1, factors(1.0, 2.0, trunk=True), factors(1.0, 0.0))
    updates.take("b", 1, factors(1.0, 6.0, trunk=True), factors(1.0, 4.0))
    adapter, notes = updates.result({})
    assert same(adapter, {**factors(1.0, 5.0, trunk=True), **factors(1.0, 3.0)})
    assert set(notes) == {"step_norm"}
    assert updates.counted == {"a": 1, "b": 1}


@pytest.mark.parametrize("variant", ["sflv2", "parallel", "async"])
def test_a_trunk_adapter_that_is_no_mean_of_copies_stays_as_the_round_leaves_it(
    begun: MakeUpdates, variant: str
) -> None:
    updates, left = begun(variant), factors(1.0, 9.0, trunk=True)
    updates.take("a", 1, of_trunk(variant, 8.0), factors(1.0, 0.0))
    updates.take("b", 1, of_trunk(variant, 9.0), factors(1.0, 4.0))
    adapter, _ = updates.result(left)
    assert same(adapter, {**left, **factors(1.0, 3.0)})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_an_update_that_is_refused_changes_nothing(begun: MakeUpdates, variant: str, value: float) -> None:
    updates = begun(variant)
    with pytest.raises(UpdateRefused, match="must be between"):
        updates.take("a", 1, of_trunk(variant, 1.0), factors(1.0, value))
    assert updates.counted == {}
    updates.take("a", 1, of_trunk(variant, 1.0), factors(1.0, 2.0))
    adapter, _ = updates.result({} if variant == "sflv1" else factors(1.0, 1.0, trunk=True))
    assert same(adapter, {**factors(1.0, 1.0, trunk=True), **factors(1.0, 2.0)})


@pytest.mark.parametrize("variant", ["sflv2", "parallel"])
def test_what_one_trains_itself_the_trunk_trains_for_the_others(begun: MakeUpdates, variant: str) -> None:
    """The bottom of a holds the block that the trunk runs for b: its own update counts 1, the trunk's for b 3."""
    updates = begun(variant, own={"a": {"bottom_blocks": 2}, "b": {}})
    left = factors(1.0, 4.0, trunk=True)
    updates.take("a", 1, {}, {**factors(1.0, 8.0, trunk=True), **factors(1.0, 0.0)})
    updates.take("b", 1, left if variant == "sflv2" else {}, factors(1.0, 0.0))
    adapter, _ = updates.result(left)
    assert same(adapter, {**factors(1.0, 5.0, trunk=True), **factors(1.0, 0.0)})


@pytest.mark.parametrize("variant", ["sflv2", "parallel"])
def test_the_trunk_counts_for_nobody_that_keeps_the_block_to_itself(begun: MakeUpdates, variant: str) -> None:
    """Both a and b hold the block that the trunk runs for c; only b shares it: its own 8 counts 3, the 4 for c 1."""
    holds = {"bottom_blocks": 2}
    updates = begun(variant, own={"a": {**holds, "personal": [TRUNK_A, TRUNK_B]}, "b": holds, "c": {}})
    left = factors(1.0, 4.0, trunk=True)
    updates.take("a", 1, {}, factors(1.0, 0.0))
    updates.take("b", 1, {}, {**factors(1.0, 8.0, trunk=True), **factors(1.0, 0.0)})
    updates.take("c", 1, left if variant == "sflv2" else {}, factors(1.0, 0.0))
    adapter, _ = updates.result(left)
    assert same(adapter, {**factors(1.0, 7.0, trunk=True), **factors(1.0, 0.0)})


@pytest.mark.parametrize("variant", ["sflv2", "parallel", "async"])
@pytest.mark.parametrize("takes_part", [False, True])
def test_a_block_that_one_who_joins_amid_a_round_holds_keeps_what_the_trunk_trained_before(
    begun: MakeUpdates, variant: str, takes_part: bool
) -> None:
    """What the trunk has for b counts 3 and for c 1; a, if it takes part at once, counts 1 with its 9."""
    updates, left = begun(variant, own={"b": {}, "c": {}}), factors(1.0, 4.0, trunk=True)
    for client in "bc":
        updates.take(client, 1, left if variant == "sflv2" else {}, factors(1.0, 0.0))
    updates._devices.put("a", updates._devices.device(bottom_blocks=2))
    if takes_part:
        updates.take("a", 1, {}, {**factors(1.0, 9.0, trunk=True), **factors(1.0, 0.0)})
    adapter, _ = updates.result(left)
    mean = (3 * 4.0 + 4.0 + 9.0) / 5 if takes_part else 4.0
    assert same(adapter, {**factors(1.0, mean, trunk=True), **factors(1.0, 0.0)})


def test_a_late_update_counts_by_its_change(begun: MakeUpdates) -> None:
    """Late for round 1, from 0 to 5; round 2 starts from 1, and a goes to 3: 1 + 5 and 3, a mean of 4.5."""
    updates = begun()
    updates.begin(RunState(1, factors(1.0, 1.0, trunk=True), factors(1.0, 1.0)), 2, late=[1])
    updates.take("c", 1, factors(1.0, 5.0, trunk=True), factors(1.0, 5.0))
    updates.take("a", 2, factors(1.0, 3.0, trunk=True), factors(1.0, 3.0))
    adapter, _ = updates.result({})
    assert same(adapter, {**factors(1.0, 4.5, trunk=True), **factors(1.0, 4.5)})
    assert updates.counted == {"c": 1, "a": 2}


def test_a_late_update_of_a_smaller_rank_counts_by_its_change_too(begun: MakeUpdates) -> None:
    """Its product B A goes from 2 to 6 while that of the run stays 2: the mean with one that stays is 4."""
    state = RunState(0, {}, factors(1.0, 1.0))
    updates = begun(lora="flexlora", least_rank=1, state=state, own={"a": {"rank": 1}, "c": {}})
    start = updates.start_of("a")
    updates.begin(RunState(1, {}, factors(1.0, 1.0)), 2, late=[1])
    updates.take("a", 1, {}, {A: start[A], B: 3 * start[B]})
    updates.take("c", 2, {}, factors(1.0, 1.0))
    adapter, _ = updates.result({})
    torch.testing.assert_close(adapter[B] @ adapter[A], torch.full((WIDE, WIDE), 4.0))
    assert updates.counted == {"a": 1, "c": 2}


def test_a_round_that_is_begun_again_counts_nothing_of_its_first_attempt(begun: MakeUpdates) -> None:
    updates = begun("parallel")
    updates.take("a", 1, {}, factors(1.0, 100.0))
    updates.begin(START, 1)
    assert updates.counted == {}
    updates.take("b", 1, {}, factors(1.0, 2.0))
    adapter, _ = updates.result(factors(1.0, 0.0, trunk=True))
    assert same(adapter, {**factors(1.0, 0.0, trunk=True), **factors(1.0, 2.0)})


def test_only_what_a_round_trains_is_sent(begun: MakeUpdates) -> None:
    updates = begun(lora="alternating")
    assert updates.trained == {TRUNK_B, B}
    assert updates.shapes("a", 1) == {B: (WIDE, R)}
    updates.begin(START, 2)
    assert updates.trained == {TRUNK_A, A}
    assert updates.shapes("a", 2) == {A: (R, WIDE)}


def test_an_agent_starts_from_its_own_rank(begun: MakeUpdates) -> None:
    updates = begun(lora="flexlora", least_rank=1, own={"a": {"rank": 1}})
    assert shapes_of(updates.start_of("a")) == {A: (1, WIDE), B: (WIDE, 1)}
    assert same(updates.start_of("b"), START.ends)


def test_what_the_rule_keeps_frozen_goes_out_with_the_start_and_survives_a_restart(begun: MakeUpdates) -> None:
    updates = begun(lora="flora")
    updates.take("a", 1, factors(1.0, 1.0, trunk=True), factors(1.0, 1.0))
    updates.result({})
    residual = updates.residual
    assert residual.keys() == {TRUNK_A, TRUNK_B, A, B}
    state = RunState(1, START.trunk, START.ends, aggregator=updates.aggregator_state)
    resumed = begun(lora="flora", state=state)
    assert same(resumed.residual, residual)
    assert same(resumed.start_of("a"), {**START.ends, **{f"{RESIDUAL}{name}": residual[name] for name in (A, B)}})


@pytest.mark.parametrize(
    ("variant", "lora", "still"),
    [
        ("sflv1", "factors", {f"{TRUNK_A}/m", f"{B}/m"}),
        ("sflv1", "flexlora", set()),
        ("parallel", "flexlora", {f"{TRUNK_A}/m"}),
    ],
)
def test_moments_of_replaced_factors_are_forgotten(
    begun: MakeUpdates, variant: str, lora: str, still: set[str]
) -> None:
    moments = {f"{TRUNK_A}/m": torch.ones(1), f"{B}/m": torch.ones(1)}
    assert begun(variant, lora=lora).still_true(moments).keys() == still


def test_one_that_joins_while_a_rounds_end_is_written_changes_nothing_about_the_moments_that_are_kept(
    begun: MakeUpdates,
) -> None:
    """The trunk's adapter is not replaced: nobody held that block when the result was worked out."""
    updates, left = begun("parallel", lora="flexlora", own={"b": {}}), factors(1.0, 9.0, trunk=True)
    updates.take("b", 1, {}, factors(1.0, 1.0))
    adapter, _ = updates.result(left)
    assert torch.equal(adapter[TRUNK_B], left[TRUNK_B])
    updates._devices.put("a", updates._devices.device(bottom_blocks=2))
    moments = {f"{TRUNK_A}/m": torch.ones(1), f"{B}/m": torch.ones(1)}
    assert updates.still_true(moments).keys() == {f"{TRUNK_A}/m"}


def test_a_run_in_which_nobody_trains_anything_but_the_shared_trunk_keeps_its_ends(begun: MakeUpdates) -> None:
    updates = begun("parallel", state=RunState(0, START.trunk, {}))
    updates.take("a", 1, {}, {})
    left = factors(1.0, 7.0, trunk=True)
    assert updates.result(left) == (left, {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_of_another_form_is_its_senders_mistake(begun: MakeUpdates, variant: str) -> None:
    odd = {A: torch.ones(R + 1, WIDE), B: torch.ones(WIDE, R)}
    with pytest.raises(ProtocolError, match=r"update of 'a' cannot be averaged: .*shape"):
        begun(variant).take("a", 1, of_trunk(variant, 1.0), odd)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_that_is_too_long_is_refused_in_every_variant(begun: MakeUpdates, variant: str) -> None:
    updates = begun(variant, aggregation={"refuse_norm": 4.0})
    with pytest.raises(UpdateRefused, match="above refuse_norm = 4"):
        updates.take("a", 1, of_trunk(variant, 0.0), factors(1.0, 2.0))  # √6 · 2 > 4
    updates.take("b", 1, of_trunk(variant, 0.0), factors(1.0, 1.0))
    assert updates.counted == {"b": 1}


def test_a_turn_that_is_too_long_is_refused_though_the_ends_are_as_they_were(begun: MakeUpdates) -> None:
    updates = begun("sflv2", aggregation={"refuse_norm": 4.0})
    after = factors(1.0, 2.0, trunk=True)
    with pytest.raises(UpdateRefused, match="above refuse_norm = 4"):
        updates.take("a", 1, after, factors(1.0, 0.0), before=START.trunk)
    assert updates.counted == {}


@pytest.mark.parametrize("state", [START, RunState(0, START.trunk, {})], ids=["with ends", "without"])
def test_a_long_turn_is_cut_short_and_the_metrics_say_so(begun: MakeUpdates, state: RunState) -> None:
    updates = begun("sflv2", state=state, aggregation={"norm_bound": math.sqrt(6.0)})
    after = factors(1.0, 2.0, trunk=True)
    counted = updates.take("a", 1, after, state.ends, before=state.trunk)
    torch.testing.assert_close(counted, factors(1.0, 1.0, trunk=True))
    _, notes = updates.result(counted)
    assert notes == {"clipped": 1}


def test_a_held_update_that_is_refused_at_the_end_is_named_and_its_optimiser_goes_on_from_before(
    begun: MakeUpdates,
) -> None:
    """What the trunk trained for c, whose own change is short, makes it too long; a holds that block itself."""
    own = {"a": {"bottom_blocks": 2}, "b": {"bottom_blocks": 2}, "c": {}}
    updates = begun("parallel", own=own, aggregation={"refuse_norm": 4.0})
    short = {**factors(1.0, 1.0, trunk=True), **factors(1.0, 1.0)}
    for client in "ab":
        updates.take(client, 1, {}, short)
    updates.take("c", 1, {}, factors(1.0, 1.0))
    adapter, _ = updates.result(factors(1.0, 9.0, trunk=True))
    assert same(adapter, short)
    assert updates.refused.keys() == {"c"}
    assert updates.counted == {"a": 1, "b": 1}


def test_a_round_whose_held_updates_are_all_refused_leaves_what_it_started_from(begun: MakeUpdates) -> None:
    updates = begun("parallel", own={"a": {"bottom_blocks": 2}, "c": {}}, aggregation={"refuse_norm": 4.0})
    updates.take("c", 1, {}, factors(1.0, 1.0))
    assert updates.result(factors(1.0, 9.0, trunk=True)) == ({**START.trunk, **START.ends}, {})
    assert updates.refused.keys() == {"c"}


def test_a_rule_for_which_too_few_updates_are_left_at_the_end_leaves_what_the_round_started_from(
    begun: MakeUpdates, caplog: pytest.LogCaptureFixture
) -> None:
    """Each client's own change is short; what the trunk trained on the behalf of e makes that of e too long."""
    rule = {"rule": "multi-krum", "byzantine": 1, "refuse_norm": 8.0}
    updates = begun(
        "parallel", own={client: {"bottom_blocks": 2 if client == "a" else 1} for client in "abcde"}, aggregation=rule
    )
    updates.take("a", 1, {}, {**factors(1.0, 1.0, trunk=True), **factors(1.0, 1.0)})
    for client in "bcde":
        updates.take(client, 1, {}, factors(1.0, 3.0 if client == "e" else 1.0))
    shared = factors(1.0, 3.0, trunk=True)
    for _ in range(2):  # asked again where a round could not be written
        assert updates.result(shared) == ({**START.trunk, **START.ends}, {})
        assert updates.counted == {}
    assert updates.refused.pop("e").endswith("above refuse_norm = 8.")
    assert set(updates.refused.values()) == {"Only 4 updates can be merged, and byzantine = 1 needs 5."}
    assert updates.refused.keys() == set("abcd")
    assert "Only 4 updates can be merged" in caplog.text


@pytest.mark.parametrize("variant", ["sflv2", "parallel", "async"])
def test_a_round_of_clients_that_keep_all_of_their_own_leaves_the_ends_as_they_were(
    begun: MakeUpdates, variant: str
) -> None:
    """A client that shares its bottom has joined, and has no part in this round."""
    updates, left = begun(variant, own={"a": {}, "b": {"personal": [A, B]}}), factors(1.0, 9.0, trunk=True)
    updates.take("b", 1, of_trunk(variant, 9.0), {})
    assert updates.result(left) == ({**left, **START.ends}, {})
    assert (updates.refused, updates.counted) == ({}, {"b": 1})


def test_who_is_left_out_by_the_rule_is_named(begun: MakeUpdates) -> None:
    updates = begun(aggregation={"rule": "multi-krum", "byzantine": 1})
    for client, value in zip("abcde", (1.0, 1.0, 9.0, 1.0, 1.0), strict=True):
        updates.take(client, 1, factors(1.0, 0.0, trunk=True), factors(1.0, value))
    _, notes = updates.result({})
    assert updates.left_out == ["c"]
    assert notes.keys() == {"step_norm"}
