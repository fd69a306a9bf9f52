"""Rows of a table, chosen by their columns."""

import pytest

from splitfed.study.choose import strongest, where

ROWS = [
    {"attack": "a", "noise": 0.1, "recovered": 0.2},
    {"attack": "b", "noise": 0.1, "recovered": 0.7},
    {"attack": "c", "noise": 0.1, "recovered": 0.7},
    {"attack": "a", "noise": 0.0, "recovered": 0.9},
]


def test_rows_with_all_values_are_taken_in_their_order() -> None:
    assert where(ROWS, attack="a") == [ROWS[0], ROWS[3]]
    assert where(ROWS, attack="a", noise=0.0) == [ROWS[3]]
    assert where(ROWS) == ROWS


def test_a_column_that_is_not_there_is_an_error_and_not_an_empty_answer() -> None:
    with pytest.raises(KeyError, match="codec"):
        where(ROWS, codec="none")


def test_the_strongest_attack_is_found_for_each_value_ascending() -> None:
    assert list(strongest(ROWS, "noise").items()) == [(0.0, ROWS[3]), (0.1, ROWS[1])]
