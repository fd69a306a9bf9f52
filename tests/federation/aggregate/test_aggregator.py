"""What every rule promises, run over all of them."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from splitfed.federation import Turn, Update, UpdateRefused
from tests.federation.aggregate.adapters import (
    aggregate,
    assert_close,
    assert_same_bits,
    dense,
    initial,
    make,
    trained,
)

RULES = {
    "mean": {},
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean", "trim": 0.2},
    "multi-krum": {"rule": "multi-krum", "byzantine": 1},
    "fedavgm": {"server_optimiser": "fedavgm"},
    "fedadam": {"server_optimiser": "fedadam"},
    "fedyogi": {"server_optimiser": "fedyogi", "rule": "median"},
    "ffa": {"lora": "ffa"},
    "alternating": {"lora": "alternating", "server_optimiser": "fedavgm"},
    "flexlora": {"lora": "flexlora"},
    "flora": {"lora": "flora", "flora_rank": 2},
}
NAN = float("nan")
Q_A, Q_B = "blocks.0.q_proj.lora_A.weight", "blocks.0.q_proj.lora_B.weight"
BASE = trained(initial(), 99)
"""Both factors of both layers are away from zero."""


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def updates_for(rule, base, *, round=1, seed=0, clients=5):
    only = {"ffa": "lora_B", "alternating": "lora_B" if round % 2 else "lora_A"}.get(rule.get("lora"), "")
    return [(f"c{n}", Update(trained(base, 10 * seed + n, only=only), n)) for n in range(1, clients + 1)]


def test_the_order_of_updates_does_not_change_a_bit(rule):
    updates = updates_for(rule, BASE)
    shorter = {key: tensor for key, tensor in updates[2][1].state.items() if "blocks.0" in key}
    updates[2] = ("c3", replace(updates[2][1], state=shorter))
    updates[3] = ("c4", Update(trained(updates[3][1].state, 7, only="lora_B"), 4, updates[3][1].state))
    first = aggregate(make(**rule, norm_bound=0.8), BASE, updates)
    assert first.clients == sorted(first.clients)
    for order in list(permutations(updates))[1::7]:
        other = aggregate(make(**rule, norm_bound=0.8), BASE, order)
        assert_same_bits(first.adapter, other.adapter)
        assert (first.clients, first.notes) == (other.clients, other.notes)


def test_every_key_of_the_base_comes_back_float32_in_its_shape(rule):
    updates = [
        (client, replace(update, state={key: t.double() for key, t in update.state.items()}))
        for client, update in updates_for(rule, BASE)
    ]
    adapter = aggregate(make(**rule), BASE, updates).adapter
    assert {key: (t.shape, t.dtype) for key, t in adapter.items()} == {
        key: (t.shape, torch.float32) for key, t in BASE.items()
    }


def test_what_nobody_trained_keeps_its_value(rule):
    updates = [
        (client, replace(update, state={key: t for key, t in update.state.items() if "blocks.0" in key}))
        for client, update in updates_for(rule, BASE)
    ]
    aggregator = make(**rule)
    aggregate(aggregator, BASE, updates_for(rule, BASE))
    adapter = aggregate(aggregator, BASE, updates, round=3).adapter
    changed = {key for key in BASE if not torch.equal(adapter[key], BASE[key])}
    assert changed
    assert all("blocks.0" in key for key in changed)


FACTOR_RULES = [name for name in RULES if not RULES[name].get("server_optimiser") and name not in ("flexlora", "flora")]


@pytest.mark.parametrize("name", FACTOR_RULES)
def test_clients_that_agree_leave_the_factors_as_they_have_them_to_the_bit(name):
    base = {key: tensor.sign() * tensor.abs().clamp(min=2.0**-20) for key, tensor in BASE.items()}
    state = updates_for(RULES[name], base)[0][1].state
    state = {key: tensor.sign() * tensor.abs().clamp(min=2.0**-20) for key, tensor in state.items()}
    updates = [(f"c{n}", Update(state, weight)) for n, weight in enumerate([1, 2, 3, 5, 7, 11, 13])]
    assert_same_bits(aggregate(make(**RULES[name]), base, updates).adapter, state)


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_clients_that_agree_leave_the_product_as_they_have_it_to_rounding(name):
    rule = {"lora": name} | ({"flora_rank": 3} if name == "flora" else {})
    state = trained(BASE, 1)
    aggregator = make(**rule)
    adapter = aggregate(aggregator, BASE, [(f"c{n}", Update(state, n)) for n in (1, 2, 3, 5)]).adapter
    residual = dense(aggregator.residual())
    for layer, product in dense(adapter).items():
        torch.testing.assert_close(product + residual.get(layer, 0), dense(state)[layer], rtol=0, atol=1e-6)


BAD = {
    "nan": (lambda s: s | {Q_B: torch.full_like(s[Q_B], torch.nan)}, "has values from nan to nan"),
    "inf": (lambda s: s | {Q_B: s[Q_B].clone().index_fill_(0, torch.tensor(1), -torch.inf)}, "has values from -inf"),
    "out of range": (lambda s: s | {Q_B: s[Q_B] + 2048}, "must be between -2048 and 2048"),
    "another key": (
        lambda s: s | {"head.lora_B.weight": torch.ones(2, 2)},
        "'head.lora_B.weight' is no tensor of this",
    ),
    "another shape": (lambda s: s | {Q_B: torch.ones(8, 3)}, r"has shape \(8, 3\) and not \(7, 3\)"),
    "a larger rank": (lambda s: s | {Q_A: torch.ones(4, 5)}, r"has shape \(4, 5\) and not \(3, 5\)"),
    "too few dimensions": (lambda s: s | {Q_A: torch.ones(5)}, r"has shape \(5,\) and not \(3, 5\)"),
    "integers": (lambda s: s | {Q_B: torch.ones(7, 3, dtype=torch.int32)}, "is torch.int32"),
    "nothing": (lambda s: {}, "holds no tensor"),
    "too long": (lambda s: s | {Q_B: s[Q_B] + 100}, r"L2 norm of 458\..* above refuse_norm = 50"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_is_refused_in_one_sentence_and_changes_nothing(rule, bad):
    spoil, message = BAD[bad]
    good = updates_for(rule, BASE)
    aggregator = make(**rule, refuse_norm=50.0)
    aggregator.begin(BASE, 1)
    for number, (client, update) in enumerate(good):
        if number == 2:
            with pytest.raises(ValueError, match=message) as error:
                aggregator.add("evil", Update(spoil(dict(update.state)), 1000))
            assert str(error.value).count("\n") == 0
        aggregator.add(client, update)
    untouched = make(**rule)
    expected = aggregate(untouched, BASE, good)
    assert_same_bits(aggregator.result().adapter, expected.adapter)
    assert (aggregator.result().clients, aggregator.result().notes) == (expected.clients, expected.notes)
    assert_same_bits(aggregator.state(), untouched.state())


@pytest.mark.parametrize("weight", [0, -3, 1.5, True])
def test_a_weight_that_is_no_positive_integer_is_refused(rule, weight):
    aggregator = make(**rule)
    aggregator.begin(BASE, 1)
    with pytest.raises(ValueError, match="weight of an update is a positive integer"):
        aggregator.add("a", replace(updates_for(rule, BASE)[0][1], weight=weight))


def test_the_second_update_of_a_client_is_refused_and_the_first_counts(rule):
    updates = updates_for(rule, BASE)
    aggregator = make(**rule)
    aggregator.begin(BASE, 1)
    for client, update in updates:
        aggregator.add(client, update)
        with pytest.raises(ValueError, match=f"The update of '{client}' is counted in round 1 already"):
            aggregator.add(client, updates[0][1])
    assert_same_bits(aggregator.result().adapter, aggregate(make(**rule), BASE, updates).adapter)


def test_a_result_is_given_twice_and_the_round_is_closed_by_it(rule):
    updates = updates_for(rule, BASE)
    aggregator = make(**rule)
    first = aggregate(aggregator, BASE, updates)
    assert_same_bits(aggregator.result().adapter, first.adapter)
    with pytest.raises(ValueError, match="No round is open for the update of 'late'"):
        aggregator.add("late", updates[0][1])


def test_there_is_nothing_to_add_to_before_a_round_and_no_result_of_nothing(rule):
    aggregator = make(**rule)
    with pytest.raises(ValueError, match="begin one first"):
        aggregator.add("a", updates_for(rule, BASE)[0][1])
    aggregator.begin(BASE, 4)
    with pytest.raises(ValueError, match="Round 4 has no update to aggregate"):
        aggregator.result()


def test_an_update_may_be_changed_once_it_is_added(rule):
    updates = updates_for(rule, BASE)
    expected = aggregate(make(**rule), BASE, updates)
    aggregator = make(**rule)
    aggregator.begin(BASE, 1)
    for client, update in updates:
        state = {key: tensor.clone() for key, tensor in update.state.items()}
        aggregator.add(client, replace(update, state=state))
        for tensor in state.values():
            tensor.fill_(torch.nan)
    assert_same_bits(aggregator.result().adapter, expected.adapter)


def test_a_round_that_is_begun_again_forgets_the_updates_of_the_first_try(rule):
    updates = updates_for(rule, BASE)
    aggregator = make(**rule)
    aggregator.begin(BASE, 1)
    aggregator.add("gone", updates[0][1])
    again = aggregate(aggregator, BASE, updates)
    assert_same_bits(again.adapter, aggregate(make(**rule), BASE, updates).adapter)


def test_state_that_is_saved_and_loaded_continues_to_the_same_bits(rule):
    def rounds(aggregator, adapter, numbers):
        for number in numbers:
            adapter = aggregate(
                aggregator, adapter, updates_for(rule, adapter, round=number, seed=number), number
            ).adapter
        return adapter

    straight = make(**rule)
    expected = rounds(straight, initial(), range(1, 6))
    stopped = make(**rule)
    half_way = rounds(stopped, initial(), range(1, 4))
    saved = {key: tensor.clone() for key, tensor in stopped.state().items()}
    stopped.begin(half_way, 4)
    stopped.add("c1", updates_for(rule, half_way, round=4, seed=4)[0][1])
    assert_same_bits(stopped.state(), saved)
    restarted = make(**rule)
    restarted.load(saved)
    assert_same_bits(restarted.residual(), stopped.residual())
    assert_same_bits(rounds(restarted, half_way, range(4, 6)), expected)
    assert_same_bits(restarted.state(), straight.state())


def test_the_state_of_another_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"keeps no state|is no moment|has not both LoRA factors"):
        make(**rule).load({"third/x": torch.ones(1)})


def test_a_change_longer_than_the_bound_is_scaled_down_to_it():
    aggregator = make(norm_bound=0.5)
    long = {key: tensor + 0.25 for key, tensor in BASE.items()}
    elements = sum(tensor.numel() for tensor in BASE.values())
    norm = 0.25 * elements**0.5
    result = aggregate(aggregator, BASE, [("a", Update(long, 3))])
    for key, tensor in result.adapter.items():
        torch.testing.assert_close(tensor, BASE[key] + 0.25 * 0.5 / norm, rtol=0, atol=1e-7)
    assert result.notes["clipped"] == 1
    assert result.notes["step_norm"] == pytest.approx(0.5, rel=1e-5)


def test_every_rule_takes_long_changes_scaled_down_to_the_bound(rule):
    updates, scaled = updates_for(rule, BASE), []
    for client, update in updates:
        norm = sum(float((tensor - BASE[key]).square().sum()) for key, tensor in update.state.items()) ** 0.5
        state = {key: BASE[key] + (tensor - BASE[key]) * (0.2 / norm) for key, tensor in update.state.items()}
        scaled.append((client, Update(state, update.weight)))
    bounded, plain = make(**rule, norm_bound=0.2), make(**rule)
    result = aggregate(bounded, BASE, updates)
    assert result.notes["clipped"] == len(updates)
    assert_close(dense(result.adapter), dense(aggregate(plain, BASE, scaled).adapter), atol=1e-5)
    assert_close(dense(bounded.residual()), dense(plain.residual()), atol=1e-5)


def test_a_change_within_the_bound_is_left_to_the_bit(rule):
    updates = updates_for(rule, BASE)
    bounded = aggregate(make(**rule, norm_bound=100.0), BASE, updates)
    assert_same_bits(bounded.adapter, aggregate(make(**rule), BASE, updates).adapter)
    assert bounded.notes["clipped"] == 0


def test_a_change_as_long_as_refuse_norm_is_taken_and_a_longer_one_is_not():
    aggregator = make(refuse_norm=3.0)
    aggregator.begin({"x": torch.zeros(1)}, 1)
    aggregator.add("a", Update({"x": torch.tensor([3.0])}, 1))
    with pytest.raises(ValueError, match=r"L2 norm of 3\.00001, above refuse_norm = 3"):
        aggregator.add("b", Update({"x": torch.tensor([3.00001])}, 1))
    assert aggregator.result().clients == ["a"]


TURN = Turn({"trunk": torch.ones(2)}, {"trunk": torch.tensor([1.0, 5.0])})
"""A turn that changes the trunk's adapter by a norm of 4."""


def test_a_turn_counts_for_the_length_of_the_change():
    aggregator = make(refuse_norm=4.9)
    aggregator.begin({"x": torch.zeros(1)}, 1)
    with pytest.raises(UpdateRefused, match=r"L2 norm of 5, above refuse_norm = 4\.9"):
        aggregator.add("a", Update({"x": torch.tensor([3.0])}, 1, turn=TURN))
    with pytest.raises(UpdateRefused, match=r"'trunk' has values from nan to nan"):
        aggregator.add("a", Update({"x": torch.ones(1)}, 1, turn=Turn(TURN.before, {"trunk": torch.full((2,), NAN)})))
    counted = aggregator.add("b", Update({"x": torch.ones(1)}, 1, turn=TURN))
    assert counted.turn is TURN
    assert torch.equal(aggregator.result().adapter["x"], torch.ones(1))


def test_a_turn_is_cut_short_with_the_rest_of_a_long_change():
    aggregator = make(norm_bound=2.5)
    aggregator.begin({"x": torch.zeros(1)}, 1)
    counted = aggregator.add("a", Update({"x": torch.tensor([3.0])}, 1, turn=TURN)).turn
    assert counted is not None
    assert torch.equal(counted.after["trunk"], torch.tensor([1.0, 3.0]))
    result = aggregator.result()
    assert torch.equal(result.adapter["x"], torch.tensor([1.5]))
    assert result.notes["clipped"] == 1


def test_a_turn_of_one_that_trains_nothing_else_is_bounded_too(rule):
    aggregator = make(**rule, norm_bound=1.0)
    aggregator.begin(BASE, 1)
    counted = aggregator.add("a", Update({}, 1, turn=TURN)).turn
    assert counted is not None
    assert torch.equal(counted.after["trunk"], torch.tensor([1.0, 2.0]))
    assert aggregator.clipped == 1


def test_what_a_turn_and_the_mean_share_is_one_change():
    """A block that one agent trains itself, and the trunk for another: its change is that of the turn alone."""
    aggregator = make(norm_bound=2.0)
    aggregator.begin({"trunk": torch.zeros(2)}, 1)
    counted = aggregator.add("a", Update(TURN.after, 1, turn=TURN))
    assert torch.equal(counted.state["trunk"], torch.tensor([1.0, 3.0]))
    assert torch.equal(aggregator.result().adapter["trunk"], torch.tensor([1.0, 3.0]))


def test_a_late_update_puts_its_own_change_on_the_rounds_base():
    own_base = trained(BASE, 3)
    late = trained(own_base, 4)
    on_time = trained(BASE, 5)
    adapter = aggregate(make(), BASE, [("late", Update(late, 1, own_base)), ("a", Update(on_time, 3))]).adapter
    for key in BASE:
        moved = BASE[key].double() + late[key].double() - own_base[key].double()
        torch.testing.assert_close(
            adapter[key].double(), 0.25 * moved + 0.75 * on_time[key].double(), rtol=0, atol=1e-7
        )


def test_the_norm_of_a_late_change_is_from_its_own_base():
    own_base = {key: tensor + 5 for key, tensor in BASE.items()}
    aggregator = make(refuse_norm=1.0)
    aggregator.begin(BASE, 2)
    aggregator.add("late", Update({key: tensor + 0.01 for key, tensor in own_base.items()}, 1, own_base))
    with pytest.raises(ValueError, match="above refuse_norm"):
        aggregator.add("not late", Update(own_base, 1))


@pytest.mark.parametrize(
    ("own_base", "message"),
    [
        ({}, "is not in what the late update started from"),
        ({key: tensor[:1] for key, tensor in BASE.items()}, "is not in what the late update started from"),
        ({key: tensor * torch.nan for key, tensor in BASE.items()}, "has values from nan"),
    ],
)
def test_a_late_update_without_a_base_to_compare_it_with_is_refused(rule, own_base, message):
    aggregator = make(**rule)
    aggregator.begin(BASE, 1)
    with pytest.raises(ValueError, match=message):
        aggregator.add("late", replace(updates_for(rule, BASE)[0][1], base=own_base))


def test_a_late_change_that_leaves_the_range_on_the_rounds_base_is_refused():
    aggregator = make(rule="median")
    aggregator.begin({"x": torch.tensor([2000.0])}, 1)
    with pytest.raises(ValueError, match="'x' has values from 2100"):
        aggregator.add("late", Update({"x": torch.tensor([100.0])}, 1, {"x": torch.tensor([0.0])}))
