"""What holds for a whole run: which devices it allows."""

from typing import Any

import pytest

from splitfed.config import LoraSection, ModelSection, PrivacySection, RunConfig, RunIdentity
from splitfed.errors import JoinRefused


def run_of_ranks(least: int | None, most: int) -> RunConfig:
    return RunConfig(
        run=RunIdentity(name="small"), model=ModelSection(base="demo"), lora=LoraSection(rank=most, least_rank=least)
    )


@pytest.mark.parametrize(("least", "most", "rank"), [(None, 4, 4), (4, 4, 4), (2, 4, 2), (2, 4, 3), (2, 4, 4)])
def test_a_rank_of_the_run_is_allowed(least: int | None, most: int, rank: int) -> None:
    run_of_ranks(least, most).check_rank(rank)


@pytest.mark.parametrize(
    ("least", "most", "rank", "has"),
    [(None, 4, 2, "rank 4 for all"), (4, 4, 2, "rank 4 for all"), (2, 4, 1, "ranks 2 to 4"), (2, 4, 5, "ranks 2 to 4")],
)
def test_another_rank_is_refused_in_the_words_of_the_agents_file(
    least: int | None, most: int, rank: int, has: str
) -> None:
    said = rf"^\[agent\] rank is {rank}, but the run 'small' has {has}; set it accordingly, or leave it out\.$"
    with pytest.raises(JoinRefused, match=said):
        run_of_ranks(least, most).check_rank(rank)


@pytest.mark.parametrize(
    ("privacy", "rule"),
    [
        ({"noise_multiplier": 0.0}, "factors"),
        ({"noise_multiplier": 1.0}, "ffa"),
        ({"noise_multiplier": 1.0, "adapter": "dp-sgd"}, "ffa"),
        ({"noise_multiplier": 1.0, "adapter": "none"}, "factors"),
    ],
)
def test_one_factor_is_trained_where_what_comes_of_it_is_noised(privacy: dict[str, Any], rule: str) -> None:
    run = run_of_ranks(None, 4).model_copy(update={"privacy": PrivacySection.model_validate(privacy)})
    assert run.rule.lora == rule


def test_a_run_at_an_agents_own_rank_keeps_the_rule_of_the_run() -> None:
    run = run_of_ranks(2, 4)
    own = run.model_copy(update={"lora": run.lora.model_copy(update={"rank": 2})})
    assert own.rule.lora == run.rule.lora == "flexlora"
