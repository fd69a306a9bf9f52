"""What attacks recovered says what a plan leaks."""

import math
from dataclasses import replace

import pytest

from splitfed.study.cost import SplitPoint
from splitfed.study.plan import LeakageTable
from splitfed.study.plan.levels import Target
from tests.study.plan.evidence_of import LEAK, N_BLOCKS, D, T, leakage_points

SAME = Target(N_BLOCKS, D, T)
TABLE = LeakageTable(leakage_points({0.0: (1.0, 0.9), 0.01: (0.8, 0.5), 0.1: (0.4, 0.1)}))


def test_what_was_measured_comes_back_and_the_larger_of_two_counts() -> None:
    found = TABLE.leakage(SAME, SplitPoint(1, 1), noise=0.01)
    assert (found.tokens, found.labels, found.most) == (0.8, 0.5, 0.8)


def test_noise_beyond_what_was_measured_hides_no_more() -> None:
    assert TABLE.leakage(SAME, SplitPoint(1, 1), noise=100.0).tokens == 0.4


def test_between_two_noises_it_goes_by_their_logarithm() -> None:
    assert TABLE.leakage(SAME, SplitPoint(1, 1), noise=math.sqrt(0.01 * 0.1)).tokens == pytest.approx(0.6)


def test_longer_sequences_have_more_noise_a_token_and_a_wider_model_has_not() -> None:
    assert TABLE.leakage(Target(N_BLOCKS, D, 100 * T), SplitPoint(1, 1), noise=0.01).tokens == pytest.approx(0.4)
    assert TABLE.leakage(Target(N_BLOCKS, 100 * D, T), SplitPoint(1, 1), noise=0.01).tokens == pytest.approx(0.8)


def test_tokens_go_by_the_bottom_and_labels_by_the_top() -> None:
    points = [
        replace(LEAK, bottom_blocks=blocks, top_blocks=blocks, recovers=target, recovered=share)
        for blocks, target, share in ((0, "tokens", 0.9), (2, "tokens", 0.6), (0, "labels", 0.8), (2, "labels", 0.5))
    ]
    found = LeakageTable(points).leakage(SAME, SplitPoint(2, 0), noise=0.0)
    assert (found.tokens, found.labels) == (0.6, 0.8)


def test_of_several_measurements_at_one_depth_the_worst_counts() -> None:
    points = [*leakage_points({0.01: (0.2, 0.1)}), replace(LEAK, noise_multiplier=0.01, top_blocks=2, recovered=0.7)]
    assert LeakageTable(points).leakage(SAME, SplitPoint(1, 1), noise=0.01).tokens == 0.7


def test_a_table_without_an_attack_on_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="No attack on labels is among them"):
        LeakageTable([LEAK])
