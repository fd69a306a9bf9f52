"""Averaging factor by factor: FedAvg in closed form, what it loses for LoRA, and where it loses nothing."""

import pytest
import torch

from splitfed.federation import Update, trained_factors
from tests.federation.aggregate.adapters import (
    aggregate,
    assert_close,
    assert_same_bits,
    dense,
    dense_mean,
    initial,
    make,
    trained,
)

BASE = trained(initial(), 99)


def test_the_mean_is_the_closed_form_of_fedavg_for_uneven_counts():
    counts = [1, 7, 100, 12345]
    states = [trained(BASE, n) for n in range(4)]
    result = aggregate(make(), BASE, [(str(n), Update(states[n], counts[n])) for n in range(4)])
    for key in BASE:
        closed = sum(state[key].double() * n for state, n in zip(states, counts, strict=True)) / sum(counts)
        assert torch.equal(result.adapter[key], closed.float())
    assert result.clients == ["0", "1", "2", "3"]
    step = sum(((result.adapter[key] - BASE[key]).double() ** 2).sum() for key in BASE) ** 0.5
    assert result.notes == {"clipped": 0, "step_norm": pytest.approx(float(step), rel=1e-6)}


def test_the_mean_of_the_factors_is_not_the_mean_of_the_products_and_the_gap_is_the_one_that_is_stated():
    updates = [("a", Update(trained(BASE, 1), 5)), ("b", Update(trained(BASE, 2), 5))]
    product, exact = dense(aggregate(make(), BASE, updates).adapter), dense_mean(updates)
    for layer in product:
        states = [update.state for _, update in updates]
        b, a = ([state[f"{layer}.lora_{name}.weight"].double() for state in states] for name in "BA")
        gap = (b[0] - b[1]) @ (a[0] - a[1]) / 4
        torch.testing.assert_close(product[layer], exact[layer] - gap, rtol=0, atol=1e-6)
        assert gap.norm() > 1e-2


@pytest.mark.parametrize(("lora", "round"), [("ffa", 1), ("ffa", 2), ("alternating", 1), ("alternating", 2)])
def test_with_one_factor_frozen_the_mean_of_the_products_is_exact(lora, round):
    (factor,) = trained_factors(lora, round)
    updates = [(f"c{n}", Update(trained(BASE, n, only=f"lora_{factor}"), n)) for n in (1, 4, 9)]
    adapter = aggregate(make(lora=lora), BASE, updates, round).adapter
    assert_close(dense(adapter), dense_mean(updates))
    frozen = {key: tensor for key, tensor in adapter.items() if f"lora_{factor}" not in key}
    assert_same_bits(frozen, {key: BASE[key] for key in frozen})


@pytest.mark.parametrize("rule", [{}, {"rule": "median"}, {"server_optimiser": "fedadam"}])
@pytest.mark.parametrize(
    ("lora", "round", "frozen"), [("ffa", 2, "A"), ("alternating", 3, "A"), ("alternating", 2, "B")]
)
def test_an_update_that_changed_a_frozen_factor_is_refused(rule, lora, round, frozen):
    aggregator = make(lora=lora, **rule)
    aggregator.begin(BASE, round)
    with pytest.raises(ValueError, match=rf"lora_{frozen}.weight' changed, and it is frozen in round {round}"):
        aggregator.add("a", Update(trained(BASE, 1, size=1e-6), 1))
    good = trained(BASE, 1, only="lora_A" if frozen == "B" else "lora_B")
    aggregator.add("a", Update(good, 1))
    assert aggregator.result().clients == ["a"]


def test_an_update_may_leave_the_frozen_factor_out():
    updates = [(f"c{n}", Update(trained(BASE, n, only="lora_B"), n)) for n in (1, 2)]
    shorter = [
        (client, Update({key: t for key, t in update.state.items() if "lora_B" in key}, update.weight))
        for client, update in updates
    ]
    one, other = (aggregate(make(lora="ffa"), BASE, given).adapter for given in (updates, shorter))
    assert_same_bits(one, other)


def test_an_update_of_frozen_factors_alone_is_refused():
    aggregator = make(lora="ffa", rule="median")
    aggregator.begin(BASE, 1)
    with pytest.raises(ValueError, match="holds no tensor"):
        aggregator.add("a", Update({key: t for key, t in BASE.items() if "lora_A" in key}, 1))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("factors", ["AB", "AB", "AB"]),
        ("flora", ["AB", "AB", "AB"]),
        ("flexlora", ["AB", "AB", "AB"]),
        ("ffa", ["B", "B", "B"]),
        ("alternating", ["B", "A", "B"]),
    ],
)
def test_which_factors_a_round_trains(rule, expected):
    assert ["".join(sorted(trained_factors(rule, round))) for round in (1, 2, 3)] == expected
