"""Means over seeds, and how far apart seeds are."""

import statistics

import pytest

from splitfed.study.spread import Spread, apart, blocks_held, by_depth, over_seeds

ROWS = [
    {"codec": "none", "noise": 0, "seed": 0, "held_out_loss": 1.0},
    {"codec": "none", "noise": 0, "seed": 1, "held_out_loss": 2.0},
    {"codec": "int8", "noise": 0, "seed": 0, "held_out_loss": 1.5},
    {"codec": "int8", "noise": 0, "seed": 1, "held_out_loss": 2.5},
    {"codec": "int8", "noise": 0, "seed": 2, "held_out_loss": None},
]


def test_a_spread_is_a_mean_and_a_sample_standard_deviation() -> None:
    found = Spread.of([1.0, 2.0, 4.0])
    assert found == Spread(statistics.mean([1, 2, 4]), statistics.stdev([1, 2, 4]), 3)
    assert str(found) == "2.333 ± 1.528"


def test_one_run_has_no_spread_and_says_so() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 0.0, 1)
    assert str(Spread.of([2.0])) == "2.000 (one run)"


def test_a_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no run to take the mean of"):
        Spread.of([])


def test_rows_that_are_alike_in_the_columns_are_put_together() -> None:
    assert over_seeds(ROWS, ["codec"]) == {"none": Spread.of([1.0, 2.0]), "int8": Spread.of([1.5, 2.5])}
    assert list(over_seeds(ROWS, ["codec", "noise"])) == [("none", 0), ("int8", 0)]
    assert over_seeds(ROWS, ["codec"], lambda row: row["seed"] + 1)["int8"] == Spread.of([1, 2, 3])


def test_no_column_is_refused() -> None:
    with pytest.raises(ValueError, match="No column is named"):
        over_seeds(ROWS, [])


def test_runs_of_one_seed_are_compared_with_each_other() -> None:
    found = apart(ROWS[2:4], ROWS[:2], ["codec"])
    assert found == {"int8": Spread(0.5, 0.0, 2)}  # the seeds differ by 1, the codec by 0.5 in each


def test_a_seed_that_only_one_side_has_is_left_out() -> None:
    assert apart(ROWS[2:4], ROWS[:1], ["codec"]) == {"int8": Spread(0.5, 0.0, 1)}


def test_split_points_are_in_the_order_of_what_a_device_holds() -> None:
    assert by_depth(["2+2", "0+1", "1+0", "0+0", "0+1", "10+0"]) == ["0+0", "0+1", "1+0", "2+2", "10+0"]


@pytest.mark.parametrize("text", ["", "1", "1+", "a+b", "1+2+3"])
def test_what_is_no_split_point_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a split point"):
        blocks_held(text)
