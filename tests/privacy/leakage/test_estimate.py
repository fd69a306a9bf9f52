"""A measured success rate states how sure it is."""

import random

import pytest

from splitfed.privacy.leakage import AttackResult


def result(successes=30, trials=100, clusters=(), chance=0.1):
    return AttackResult("guess", "tokens", successes, trials, chance, clusters)


def of_sequences(*clusters, chance=0.1):
    successes, trials = zip(*clusters, strict=True)
    return AttackResult.per_sequence("guess", "tokens", successes=successes, trials=trials, chance=chance)


def test_the_interval_of_independent_trials_is_wilsons():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert result(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert result(0, 20).interval() == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("concentration", [3, 1e6])
def test_a_95_percent_interval_holds_the_true_rate_with_trials_that_agree_within_a_sequence_too(rate, concentration):
    """Sequences whose own rates spread by a beta distribution; the second value is next to none."""
    draw, repetitions, held = random.Random(7), 400, 0
    for _ in range(repetitions):
        clusters = []
        for _ in range(150):
            own = draw.betavariate(rate * concentration, (1 - rate) * concentration)
            trials = draw.randint(5, 40)
            clusters.append((sum(draw.random() < own for _ in range(trials)), trials))
        low, high = of_sequences(*clusters).interval()
        held += low <= rate <= high
    assert held / repetitions >= 0.92  # three standard errors below 0.95


def test_sequences_that_are_wholly_right_or_wholly_wrong_count_as_one_trial_each():
    assert of_sequences(*[(8, 8)] * 20, *[(0, 8)] * 30).effective_trials == pytest.approx(49)
    assert of_sequences(*[(1, 1)] * 20, *[(0, 1)] * 30).effective_trials == pytest.approx(49)


def test_equally_successful_sequences_are_worth_all_their_trials_and_no_more():
    assert of_sequences(*[(2, 8)] * 20).effective_trials == 160
    assert of_sequences(*[(2, 8)] * 20).interval() == result(40, 160).interval()


@pytest.mark.parametrize("rate", [0, 1])
def test_where_all_trials_agree_a_sequence_counts_as_one_trial(rate):
    assert of_sequences(*[(64 * rate, 64)] * 50).interval() == result(50 * rate, 50).interval()


def test_one_trial_that_goes_wrong_shows_no_more_of_how_much_they_depend_than_none():
    """Else the better result would have the longer interval."""
    all_right, one_wrong = of_sequences(*[(64, 64)] * 6), of_sequences(*[(64, 64)] * 5, (63, 64))
    assert one_wrong.effective_trials == all_right.effective_trials == 6
    assert one_wrong.interval()[0] < all_right.interval()[0]
    assert of_sequences((1, 64), *[(0, 64)] * 5).effective_trials == 6


@pytest.mark.parametrize("rate", [0.03, 0.97, 0.99])
@pytest.mark.parametrize("concentration", [1, 3, 1e6])
def test_a_95_percent_interval_holds_the_true_rate_near_the_edges_with_few_sequences_too(rate, concentration):
    draw, repetitions, held = random.Random(7), 400, 0
    for _ in range(repetitions):
        clusters = []
        for _ in range(30):
            own = draw.betavariate(rate * concentration, (1 - rate) * concentration)
            trials = draw.randint(20, 40)
            clusters.append((sum(draw.random() < own for _ in range(trials)), trials))
        low, high = of_sequences(*clusters).interval()
        held += low <= rate <= high
    assert held / repetitions >= 0.92


@pytest.mark.parametrize("clusters", [[(0, 9)], [(9, 9)], [(3, 9)], [(0, 9), (9, 9)], [(1, 9), (2, 9), (0, 4)]])
def test_the_interval_holds_the_measured_rate_and_is_never_shorter_than_that_of_independent_trials(clusters):
    measured = of_sequences(*clusters)
    (low, high), (other_low, other_high) = measured.interval(), result(measured.successes, measured.trials).interval()
    assert 0 <= low <= measured.rate <= high <= 1
    assert high - low >= other_high - other_low


def test_more_confidence_asks_for_a_longer_interval():
    (low, high), (lower, higher) = result().interval(0.9), result().interval(0.99)
    assert lower < low < 0.3 < high < higher


def test_chance_is_beaten_only_if_the_whole_interval_is_above_it():
    assert result(30, 100, chance=0.2).beats_chance()
    assert not result(30, 100, chance=0.25).beats_chance()
    assert not result(30, 100, chance=0.4).beats_chance()


def test_sequences_without_a_trial_do_not_count():
    assert of_sequences((1, 2), (0, 0), (2, 2)).clusters == ((1, 2), (2, 2))


def test_a_row_has_every_figure_by_name():
    row = of_sequences((1, 2), (2, 2), chance=0.25).as_row()
    low, high = of_sequences((1, 2), (2, 2)).interval()
    assert row == {
        "target": "tokens",
        "attack": "guess",
        "rate": 0.75,
        "low": low,
        "high": high,
        "chance": 0.25,
        "successes": 3,
        "trials": 4,
        "sequences": 2,
    }
    assert result(3, 4).as_row()["sequences"] == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 0, "successes": 0},
        {"successes": 101},
        {"successes": -1},
        {"clusters": ((31, 30), (-1, 70))},
        {"clusters": ((30, 99),)},
        {"chance": -0.1},
        {"chance": float("nan")},
    ],
)
def test_counts_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least one trial|add up to|Chance is a rate"):
        result(**wrong)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, float("nan")])
def test_a_confidence_outside_its_range_is_refused(confidence):
    with pytest.raises(ValueError, match="A confidence is between 0 and 1"):
        result().interval(confidence)
