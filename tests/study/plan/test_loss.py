"""What was measured says what plans cost in loss."""

import math

import pytest

from splitfed.study.cost import SplitPoint
from splitfed.study.plan import LossTable
from splitfed.study.plan.levels import Target
from tests.study.plan.evidence_of import N_BLOCKS, D, T, loss_point

SAME = Target(N_BLOCKS, D, T)
AT = SplitPoint(1, 1)


def nats(table: LossTable, target: Target = SAME, at: SplitPoint = AT, noise: float = 0.0, **changes: object) -> float:
    return table.cost(target, at, noise=noise, **{"codec": "int8", "rank": 8, **changes}).nats  # type: ignore[arg-type]


def test_what_was_measured_comes_back_as_it_was() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.5, noise_multiplier=0.01), loss_point(2.2, codec="none")])
    assert nats(table) == 0
    assert nats(table, noise=0.01) == pytest.approx(0.5)
    assert nats(table, codec="none") == pytest.approx(0.2)


def test_the_cost_is_also_told_as_a_share_of_what_training_gained() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.5, noise_multiplier=0.01)])
    assert table.cost(SAME, AT, noise=0.01, codec="int8", rank=8).share == pytest.approx(0.25)
    learnt_nothing = LossTable([loss_point(4.0)])
    assert math.isnan(learnt_nothing.cost(SAME, AT, noise=0.0, codec="int8", rank=8).share)


def test_between_two_noises_the_cost_goes_by_their_logarithm() -> None:
    table = LossTable([loss_point(2.0), *(loss_point(2 + z * 100, noise_multiplier=z) for z in (0.001, 0.01))])
    assert nats(table, noise=math.sqrt(0.001 * 0.01)) == pytest.approx((0.1 + 1.0) / 2)
    assert nats(table, noise=0.0005) == pytest.approx(0.05)  # from none at all it is the noise itself


def test_noise_beyond_what_was_measured_costs_at_least_as_much_and_says_so() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.5, noise_multiplier=0.01)])
    beyond = table.cost(SAME, AT, noise=0.5, codec="int8", rank=8)
    assert (beyond.nats, beyond.is_beyond) == (pytest.approx(0.5), True)
    assert not table.cost(SAME, AT, noise=0.01, codec="int8", rank=8).is_beyond


def test_more_noise_never_counts_as_costing_less() -> None:
    table = LossTable([loss_point(loss, noise_multiplier=z) for z, loss in ((0.0, 2.0), (0.01, 4.6), (0.1, 4.1))])
    assert nats(table, noise=0.1) == pytest.approx(2.6)


def test_a_wider_model_and_longer_sequences_are_hurt_by_less_noise() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.2, noise_multiplier=0.01), loss_point(3.0, noise_multiplier=0.04)])
    assert nats(table, Target(N_BLOCKS, 4 * D, 4 * T), noise=0.01) == pytest.approx(nats(table, noise=0.04))


def test_the_nearest_relative_depth_that_trains_the_same_segments_is_taken() -> None:
    table = LossTable(
        [
            loss_point(2.0, bottom_blocks=0, top_blocks=0),
            loss_point(2.1),
            loss_point(2.3, bottom_blocks=2),
        ]
    )
    deep = Target(40, D, T)
    assert nats(table, deep, SplitPoint(0, 0)) == pytest.approx(0.0)
    assert nats(table, deep, SplitPoint(1, 1)) == pytest.approx(0.1)  # nearer to 0 + 0, which trains no ends
    assert nats(table, deep, SplitPoint(18, 10)) == pytest.approx(0.3)
    assert nats(table, deep, SplitPoint(15, 10)) == pytest.approx(0.2)  # half-way between two


def test_ranks_are_read_between_those_that_were_measured() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.4, rank=2), loss_point(1.9, rank=32)])
    assert nats(table, rank=4) == pytest.approx(nats(table) + 0.2)
    assert nats(table, rank=64) == pytest.approx(nats(table, rank=32))
    assert nats(table, rank=1) == pytest.approx(nats(table, rank=2))


def test_a_codec_that_does_no_more_than_seeds_do_costs_nothing() -> None:
    table = LossTable([loss_point(2.0), loss_point(2.02, codec="none"), loss_point(2.1, codec="bf16")])
    assert nats(table, codec="none") == nats(table)  # the seeds' standard deviation is 0.03
    assert nats(table, codec="bf16") == pytest.approx(0.1)


def test_only_settings_that_differ_in_nothing_else_say_what_a_codec_costs() -> None:
    table = LossTable([loss_point(2.0), loss_point(3.0, codec="none", rank=16), loss_point(2.0, bottom_blocks=0)])
    assert nats(table, codec="none") == nats(table)


def test_of_two_measurements_at_one_setting_that_of_more_runs_counts() -> None:
    table = LossTable(
        [loss_point(2.0), loss_point(2.5, noise_multiplier=0.1), loss_point(2.4, noise_multiplier=0.1, runs=9)]
    )
    assert nats(table, noise=0.1) == pytest.approx(0.4)


def test_a_table_without_a_run_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="No run without noise is among them"):
        LossTable([loss_point(2.0, noise_multiplier=0.1)])
