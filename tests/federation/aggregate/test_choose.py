"""The [aggregation] section: what goes together, and what it makes."""

import pytest
from pydantic import ValidationError

from splitfed.config.aggregation import AggregationSection
from splitfed.federation import make_aggregator


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trim": 0.1}, 'trim and rule = "trimmed-mean" belong together'),
        ({"rule": "trimmed-mean"}, 'trim and rule = "trimmed-mean" belong together'),
        ({"byzantine": 1}, 'byzantine and rule = "multi-krum" belong together'),
        ({"rule": "multi-krum"}, 'byzantine and rule = "multi-krum" belong together'),
        ({"norm_bound": 2.0, "refuse_norm": 1.5}, "refuse_norm = 1.5 refuses every update that norm_bound = 2"),
        ({"server_learning_rate": 1.0}, "server_learning_rate needs server_optimiser"),
        ({"momentum": 0.5}, "momentum needs server_optimiser"),
        ({"server_optimiser": "fedavgm", "beta2": 0.5}, 'beta2 needs server_optimiser = "fedadam" or "fedyogi"'),
        ({"server_optimiser": "fedavgm", "tau": 0.5}, 'tau needs server_optimiser = "fedadam" or "fedyogi"'),
        ({"flora_rank": 4}, 'flora_rank needs lora = "flora"'),
        ({"lora": "flexlora", "flora_rank": 4}, 'flora_rank needs lora = "flora"'),
        (
            {"lora": "flexlora", "rule": "median"},
            'rule = "median" works factor by factor, and lora = "flexlora" averages',
        ),
        ({"lora": "flora", "server_optimiser": "fedadam"}, 'server_optimiser = "fedadam" works factor by factor'),
        ({"rule": "trimmed-mean", "trim": 0.5}, "less than 0.5"),
        ({"rule": "multi-krum", "byzantine": 0}, "greater than or equal to 1"),
        ({"norm_bound": 0.0}, "greater than 0"),
        ({"momentum": 1.0, "server_optimiser": "fedavgm"}, "less than 1"),
        ({"lora": "flora", "flora_rank": 0}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        AggregationSection.model_validate(keys)


@pytest.mark.parametrize(
    ("asked", "has_unlike_ranks", "is_noised", "expected"),
    [
        (None, False, False, "factors"),
        (None, False, True, "ffa"),
        (None, True, False, "flexlora"),
        (None, True, True, "flexlora"),
        ("factors", False, True, "factors"),
        ("flora", True, True, "flora"),
        ("alternating", False, True, "alternating"),
    ],
)
def test_the_lora_rule_that_is_left_out_is_decided_by_the_run(asked, has_unlike_ranks, is_noised, expected):
    section = AggregationSection(lora=asked, norm_bound=3.0)
    decided = section.decided(has_unlike_ranks=has_unlike_ranks, is_noised=is_noised)
    assert decided == AggregationSection(lora=expected, norm_bound=3.0)
    assert decided.decided(has_unlike_ranks=has_unlike_ranks, is_noised=is_noised) == decided


@pytest.mark.parametrize("lora", ["factors", "ffa", "alternating"])
def test_unlike_ranks_and_a_rule_for_factors_are_refused(lora):
    with pytest.raises(ValueError, match=f'lora = "{lora}" averages factor by factor, and agents of unlike ranks'):
        AggregationSection(lora=lora).decided(has_unlike_ranks=True, is_noised=False)


def test_unlike_ranks_and_a_robust_rule_are_refused():
    with pytest.raises(ValueError, match='rule = "median" works factor by factor, and lora = "flexlora"'):
        AggregationSection(rule="median").decided(has_unlike_ranks=True, is_noised=False)


def test_the_least_updates_of_a_round():
    assert AggregationSection().least_updates == 1
    assert AggregationSection(rule="multi-krum", byzantine=2).least_updates == 7


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="An adapter of rank 0 has nothing to train"):
        make_aggregator(AggregationSection(), 0)
