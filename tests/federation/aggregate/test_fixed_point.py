"""What the weighted mean promises: exact in integers, in any order."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfed.federation.aggregate import MAX_TOTAL_WEIGHT, FixedPointMean

BELOW_2048 = float(np.nextafter(np.float32(2048), np.float32(0)))
VALUES = st.floats(-BELOW_2048, BELOW_2048, width=32)
WEIGHTS = st.integers(1, 2**27)
UPDATES = st.lists(st.tuples(hnp.arrays("float32", (5,), elements=VALUES), WEIGHTS), min_size=1, max_size=8)


def mean_of(updates):
    mean = FixedPointMean()
    for values, weight in updates:
        mean.add({"x": torch.from_numpy(values)}, weight)
    return mean.result()["x"].numpy()


def bits(values):
    return values.view("int32").tolist()


@given(updates=UPDATES, data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_order_of_updates_does_not_change_a_bit(updates, data):
    shuffled = data.draw(st.permutations(updates))
    assert bits(mean_of(updates)) == bits(mean_of(shuffled))


@given(updates=UPDATES)
@settings(max_examples=200, deadline=None)
@example(updates=[(np.full(5, BELOW_2048, "float32"), 2**30), (np.full(5, -BELOW_2048, "float32"), 2**30 - 1)])
@example(updates=[(np.full(5, BELOW_2048, "float32"), MAX_TOTAL_WEIGHT)])
@example(updates=[(np.full(5, 1e-13, "float32"), 3), (np.full(5, 1e-45, "float32"), 1)])
@example(updates=[(np.full(5, 2.0**-44, "float32"), 3), (np.zeros(5, "float32"), 1)])
def test_the_mean_is_within_the_resolution_and_one_rounding_of_the_exact_one(updates):
    result = mean_of(updates)
    total = sum(weight for _, weight in updates)
    for i, value in enumerate(result):
        exact = sum(Fraction(float(values[i])) * weight for values, weight in updates) / total
        half_ulp = Fraction(float(np.spacing(np.abs(value)))) / 2
        in_between = Fraction(2) ** -51 * abs(exact)  # the sum of the two limbs is rounded to float64 first
        assert abs(Fraction(float(value)) - exact) <= Fraction(1, 2**45) + half_ulp + in_between


@given(
    values=hnp.arrays("float32", (7,), elements=VALUES.filter(lambda x: x == 0 or abs(x) >= 2**-21)),
    weights=st.lists(WEIGHTS, min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_equal_updates_come_back_to_the_bit_whatever_their_weights(values, weights):
    assert bits(mean_of([(values, weight) for weight in weights])) == bits(values + np.float32(0))


def test_multiples_of_the_resolution_come_back_and_finer_values_are_rounded_to_one():
    step = 2.0**-44
    values = np.array([step, -step, 3 * step, 0.4 * step, 0.6 * step, 1000 + 2.0**-13], dtype="float32")
    result = mean_of([(values, 3), (values, 4)])
    assert result.tolist() == [step, -step, 3 * step, 0.0, step, 1000 + 2.0**-13]


def test_weights_count():
    result = mean_of([(np.array([1.0], "float32"), 3), (np.array([5.0], "float32"), 1)])
    assert result.tolist() == [2.0]


def test_shapes_and_names_are_kept_and_the_result_is_float32():
    mean = FixedPointMean()
    state = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.tensor(0.5, dtype=torch.float64)}
    mean.add(state, 2)
    result = mean.result()
    assert {name: (tuple(t.shape), t.dtype) for name, t in result.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((), torch.float32),
    }


def test_the_mean_can_be_read_and_added_to_again():
    mean = FixedPointMean()
    mean.add({"x": torch.tensor([1.0])}, 1)
    assert mean.result()["x"].item() == 1.0
    mean.add({"x": torch.tensor([2.0])}, 1)
    assert mean.result()["x"].item() == 1.5
    assert mean.total_weight == 2


def test_an_update_is_not_changed_and_not_kept():
    mean, x = FixedPointMean(), torch.tensor([1.25], requires_grad=True)
    mean.add({"x": x}, 1)
    with torch.no_grad():
        x.fill_(7.0)
    assert mean.result()["x"].item() == 1.25


def test_there_is_no_mean_of_nothing():
    with pytest.raises(ValueError, match="no mean of no updates"):
        FixedPointMean().result()


@pytest.mark.parametrize("weight", [0, -1, 1.0, True, None, 2**31])
def test_a_weight_that_is_not_a_positive_integer_in_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight"):
        FixedPointMean().add({"x": torch.ones(1)}, weight)


def test_a_total_weight_that_could_overflow_is_refused():
    mean = FixedPointMean()
    mean.add({"x": torch.ones(1)}, 2**30)
    with pytest.raises(ValueError, match="past 2147483647"):
        mean.add({"x": torch.ones(1)}, 2**30)
    mean.add({"x": torch.ones(1)}, 2**30 - 1)
    assert mean.result()["x"].item() == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2048.0, -2048.0, 1e30])
@pytest.mark.parametrize("position", [0, 99])
def test_a_value_out_of_range_is_refused_and_leaves_the_mean_as_it_was(value, position):
    mean = FixedPointMean()
    mean.add({"a": torch.ones(100), "x": torch.ones(100)}, 1)
    bad = torch.ones(100)
    bad[position] = value
    with pytest.raises(ValueError, match="'x' has values from"):
        mean.add({"a": torch.zeros(100), "x": bad}, 5)
    assert mean.total_weight == 1
    assert torch.equal(mean.result()["a"], torch.ones(100))


def test_each_tensor_is_averaged_over_the_updates_that_hold_it():
    mean = FixedPointMean()
    mean.add({"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}, 1)
    mean.add({"a": torch.tensor([4.0])}, 2)
    mean.add({"c": torch.tensor([7.0]), "b": torch.tensor([20.0])}, 4)
    assert {name: tensor.item() for name, tensor in mean.result().items()} == {"a": 3.0, "b": 18.0, "c": 7.0}
    assert mean.total_weight == 7


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(2), "b": torch.ones(2, 1)}, r"'b' has shape \(2, 1\) and not \(2,\)"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"'b' has shape \(3,\) and not \(2,\)"),
        ({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}, r"'b' is torch\.int64"),
        ({}, "holds no tensor"),
    ],
)
def test_an_update_that_disagrees_with_an_earlier_one_is_refused_and_changes_nothing(state, message):
    mean = FixedPointMean()
    mean.add({"a": torch.zeros(2), "b": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match=message):
        mean.add(state, 1)
    assert torch.equal(mean.result()["a"], torch.zeros(2))


def test_an_empty_tensor_is_refused():
    with pytest.raises(ValueError, match=r"shape \(0,\); no mean"):
        FixedPointMean().add({"x": torch.ones(0)}, 1)
