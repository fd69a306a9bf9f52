"""Robust rules: small cases by hand, and clients that send anything at all."""

import pytest
import torch

from splitfed.federation import Update
from tests.federation.aggregate.adapters import aggregate, initial, make, trained

ROBUST = {
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean", "trim": 0.3},
    "multi-krum": {"rule": "multi-krum", "byzantine": 2},
}


def one_element(base, n):
    return {key: tensor + 2000 * (torch.arange(tensor.numel()) == n).view_as(tensor) for key, tensor in base.items()}


ATTACKS = {
    "huge": lambda base, n: {key: torch.full_like(t, 2047.0) for key, t in base.items()},
    "opposite": lambda base, n: {key: torch.full_like(t, 2047.0 * (-1) ** n) for key, t in base.items()},
    "one element": one_element,
    "far and weighty": lambda base, n: {key: t + 3.0 for key, t in base.items()},
}


def one_number(values, **rule):
    base = {"x": torch.tensor([0.0])}
    updates = [(f"c{n}", Update({"x": torch.tensor([value])}, 1 + n)) for n, value in enumerate(values)]
    return aggregate(make(**rule), base, updates)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", ROBUST)
def test_two_of_seven_arbitrary_clients_move_no_element_beyond_the_others(rule, attack):
    base = trained(initial(), 99)
    honest = [trained(base, n) for n in range(5)]
    evil = [ATTACKS[attack](base, n) for n in range(2)]
    updates = [(f"evil{n}", Update(state, 10**6)) for n, state in enumerate(evil)]
    updates += [(f"honest{n}", Update(state, 1)) for n, state in enumerate(honest)]
    adapter = aggregate(make(**ROBUST[rule]), base, updates).adapter
    for key, tensor in adapter.items():
        values = torch.stack([state[key] for state in honest])
        assert (tensor >= values.amin(dim=0)).all()
        assert (tensor <= values.amax(dim=0)).all()
    plain = aggregate(make(), base, updates).adapter
    assert any((plain[key] - base[key]).abs().max() > 1 for key in base)


@pytest.mark.parametrize(
    ("values", "median"), [([5.0], 5.0), ([1.0, 4.0], 2.5), ([9.0, 1.0, 2.0], 2.0), ([9.0, 1.0, -2.0, 2.0], 1.5)]
)
def test_the_median_by_hand(values, median):
    result = one_number(values, rule="median")
    assert result.adapter["x"].item() == median
    assert result.clients == [f"c{n}" for n in range(len(values))]


@pytest.mark.parametrize(
    ("trim", "values", "mean"),
    [
        (0.1, [1.0, 2.0, 6.0], 3.0),
        (0.2, [100.0, 1.0, 2.0, 6.0, -100.0], 3.0),
        (0.2, [100.0, 1.0, 2.0, 5.0], 27.0),
        (0.49, [100.0, 1.0, 7.0, -100.0, 2.0], 2.0),
    ],
)
def test_the_trimmed_mean_by_hand(trim, values, mean):
    assert one_number(values, rule="trimmed-mean", trim=trim).adapter["x"].item() == mean


def test_a_trim_is_the_decimal_fraction_that_is_written():
    values = [-1000.0] * 29 + [0.0] * 42 + [1000.0] * 28 + [500.0]
    assert 0.29 * 100 < 29
    assert one_number(values, rule="trimmed-mean", trim=0.29).adapter["x"].item() == 0.0


def test_multi_krum_by_hand():
    # f = 1: a score is the sum of the squares to the 5 - 1 - 2 = 2 nearest: 1 + 16, 1 + 9, 1 + 9, 1 + 4 and 4 + 9.
    # One neighbour more or less, and the 7 would be left out.
    result = one_number([0.0, 1.0, 4.0, 5.0, 7.0], rule="multi-krum", byzantine=1)
    assert result.clients == ["c1", "c2", "c3", "c4"]
    assert result.adapter["x"].item() == (1 + 4 + 5 + 7) / 4


@pytest.mark.parametrize("arrival", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)])
def test_of_equal_scores_multi_krum_takes_the_first_in_the_order_of_names(arrival):
    # f = 1: the scores are 4 + 1, 1 + 1, 1 + 1, 1 + 1 and 4 + 1
    updates = [(f"c{n}", Update({"x": torch.tensor([n - 2.0])}, 1)) for n in arrival]
    result = aggregate(make(rule="multi-krum", byzantine=1), {"x": torch.zeros(1)}, updates)
    assert result.clients == ["c0", "c1", "c2", "c3"]
    assert result.adapter["x"].item() == -0.5


def test_multi_krum_needs_2f_3_updates_and_takes_more_after_it_said_so():
    aggregator = make(rule="multi-krum", byzantine=1)
    aggregator.begin({"x": torch.zeros(2)}, 1)
    for n in range(4):
        aggregator.add(str(n), Update({"x": torch.ones(2)}, 1))
    with pytest.raises(ValueError, match="byzantine = 1 takes 5 updates or more, and the round has 4"):
        aggregator.result()
    aggregator.add("4", Update({"x": torch.ones(2)}, 1))
    assert aggregator.result().clients == ["0", "1", "2", "3"]


def test_what_a_client_does_not_hold_counts_as_unchanged_in_distances_and_not_in_the_mean():
    base = {"x": torch.zeros(1), "y": torch.tensor([3.0])}
    states = [{"x": torch.tensor([2.0]), "y": torch.tensor([y])} for y in (3.5, 3.5, 3.5, 4.5)]
    states.append({"x": torch.tensor([2.0])})
    updates = [(f"c{n}", Update(state, 1)) for n, state in enumerate(states)]
    result = aggregate(make(rule="multi-krum", byzantine=1), base, updates)
    assert result.clients == ["c0", "c1", "c2", "c4"]
    assert {key: tensor.item() for key, tensor in result.adapter.items()} == {"x": 2.0, "y": 3.5}


@pytest.mark.parametrize("rule", ROBUST)
def test_weights_do_not_count(rule):
    base = trained(initial(), 99)
    states = [trained(base, n) for n in range(7)]
    one, other = (
        aggregate(make(**ROBUST[rule]), base, [(str(n), Update(s, weight**n)) for n, s in enumerate(states)]).adapter
        for weight in (1, 3)
    )
    assert all(torch.equal(one[key], other[key]) for key in base)
