"""A run that is weaker than what a device's owner insists on is refused, in one sentence, before anything is sent."""

from typing import Any

import pytest

from splitfed.agent.policy import agree, refuse_weak_noise
from splitfed.config import AgentPrivacySection, ModelSection, PrivacySection, RunConfig, RunIdentity
from splitfed.errors import ConfigError, JoinRefused


def run(*, bottom_blocks: int = 1, top_blocks: int = 1, **privacy: Any) -> RunConfig:
    model = ModelSection(base="demo", bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    return RunConfig(run=RunIdentity(name="wards"), model=model, privacy=PrivacySection(**privacy))


def test_an_owner_who_says_nothing_takes_the_run_as_it_is() -> None:
    asked = run(noise_multiplier=0.1, clipping_norm_smashed=3.0)
    assert agree(AgentPrivacySection(), asked) == asked.privacy


def test_an_owner_who_says_nothing_wants_noise_on_every_channel() -> None:
    with pytest.raises(JoinRefused, match=r"'wards' sends smashed data without noise.*protected_channels"):
        agree(AgentPrivacySection(), run(noise_multiplier=0.0))
    with pytest.raises(JoinRefused, match="sends the adapter update without noise"):
        agree(AgentPrivacySection(), run(adapter="none"))


def test_a_refusal_speaks_of_a_key_only_where_the_owner_has_set_it() -> None:
    with pytest.raises(JoinRefused, match=r"nothing in this agent's \[privacy\] allows that; .* name there the"):
        agree(AgentPrivacySection(), run(adapter="none"))
    with pytest.raises(JoinRefused, match=r"this device's owner insists on its protection \(protected_channels\); ask"):
        agree(AgentPrivacySection(protected_channels=["adapter"]), run(adapter="none"))


def test_metric_privacy_is_for_an_owner_who_says_so() -> None:
    asked = run(bottom_blocks=0, smashed="metric", eta=2.0)
    with pytest.raises(JoinRefused, match="sends smashed data under metric privacy, which has no epsilon"):
        agree(AgentPrivacySection(), asked)
    agree(AgentPrivacySection(protected_channels=["output_gradient", "adapter"]), asked)
    agree(AgentPrivacySection(smashed="metric", eta=1.0), asked)
    with pytest.raises(ConfigError, match="epsilon_budget = 3 cannot be kept: smashed data would leave under metric"):
        agree(AgentPrivacySection(protected_channels=["adapter"], epsilon_budget=3.0), asked)


def test_what_is_not_trained_on_the_device_needs_no_protection() -> None:
    agree(AgentPrivacySection(), run(bottom_blocks=0, top_blocks=0, adapter="none"))


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        ({"noise_multiplier": 0.0}, {}),
        ({"adapter": "none"}, {}),
        ({"protected_channels": []}, {"noise_multiplier": 0.0}),
        ({"protected_channels": ["smashed", "output_gradient"]}, {"adapter": "none"}),
        ({"noise_multiplier": 0.5}, {"noise_multiplier": 0.0}),
        ({"adapter": "dp-sgd"}, {"adapter": "none"}),
        ({"least_noise_multiplier": 0.1}, {"noise_multiplier": 0.1}),
        ({"least_noise_multiplier": 0.1}, {"epsilon": 8.0}),
        ({"largest_clipping_norm_smashed": 3.0}, {"clipping_norm_smashed": 3.0}),
        ({"most_bottom_blocks": 1, "most_top_blocks": 1}, {}),
    ],
    ids=str,
)
def test_a_run_that_the_owner_allows_is_taken(policy: dict[str, Any], asked: dict[str, Any]) -> None:
    agree(AgentPrivacySection(**policy), run(**asked))


@pytest.mark.parametrize(
    ("policy", "asked", "said"),
    [
        ({"protected_channels": ["output_gradient"]}, {"noise_multiplier": 0.0}, "output gradients without noise"),
        ({"protected_channels": ["adapter"]}, {"adapter": "none"}, "adapter update without noise"),
        ({"least_noise_multiplier": 0.1}, {"noise_multiplier": 0.05}, "noise_multiplier = 0.05, .* insists on 0.1"),
        (
            {"least_noise_multiplier": 0.1},
            {"noise_multiplier": 1.0, "noise_multiplier_adapter": 0.05},
            "noise_multiplier_adapter = 0.05, .* insists on 0.1",
        ),
        (
            {"largest_clipping_norm_smashed": 1.0},
            {"clipping_norm_smashed": 3.0},
            "clipping_norm_smashed = 3, .* allows 1 ",
        ),
        (
            {"largest_clipping_norm_output_gradient": 1e-3},
            {},
            r"clipping_norm_output_gradient = 0.01, .* allows 0.001 ",
        ),
        ({"most_bottom_blocks": 0}, {}, "bottom_blocks = 1, but its owner allows 0"),
        ({"most_top_blocks": 0}, {}, "top_blocks = 1, but its owner allows 0"),
    ],
    ids=str,
)
def test_a_weaker_run_is_refused_in_one_sentence(policy: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(JoinRefused, match=said) as refusal:
        agree(AgentPrivacySection(**policy), run(**asked))
    assert "'wards'" in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("unit", ["token", "metric"])
def test_a_unit_that_the_split_point_does_not_have_is_refused_with_the_reason(unit: str) -> None:
    policy = AgentPrivacySection(smashed=unit, eta=1.0 if unit == "metric" else None)  # type: ignore[arg-type]
    agree(policy, run(bottom_blocks=0))
    with pytest.raises(ConfigError, match=rf'smashed = "{unit}" needs bottom_blocks = 0, not 1: an attention block'):
        agree(policy, run(bottom_blocks=1))


def test_a_token_s_label_is_no_unit_once_the_top_holds_a_block() -> None:
    policy = AgentPrivacySection(output_gradient="token")
    agree(policy, run(top_blocks=0))
    with pytest.raises(ConfigError, match='output_gradient = "token" needs top_blocks = 0, not 2: an attention block'):
        agree(policy, run(top_blocks=2))


def test_a_budget_over_a_channel_that_is_open_is_refused() -> None:
    policy = AgentPrivacySection(epsilon_budget=5.0, protected_channels=[])
    with pytest.raises(ConfigError, match="epsilon_budget = 5 cannot be kept: the adapter update would leave"):
        agree(policy, run(adapter="none"))
    with pytest.raises(ConfigError, match="cannot be kept: smashed data would leave"):
        agree(policy, run(noise_multiplier=0.0))


def test_the_least_noise_is_a_sequence_s_whatever_unit_the_run_chooses() -> None:
    """128 rows of a token each have 128 times its squared signal: √128 times less noise for the sequence."""
    policy = AgentPrivacySection(least_noise_multiplier=1.0)
    agree(policy, run(bottom_blocks=0, smashed="token", noise_multiplier=12.0))
    with pytest.raises(JoinRefused, match=r"noise_multiplier = 1 \(0\.0884 for a sequence\), .* insists on 1 "):
        agree(policy, run(bottom_blocks=0, smashed="token", noise_multiplier=1.0))


def test_noise_that_was_calibrated_is_held_against_the_policy_too() -> None:
    settled = PrivacySection(noise_multiplier=0.05)
    with pytest.raises(JoinRefused, match=r"insists on 0\.1"):
        refuse_weak_noise(AgentPrivacySection(least_noise_multiplier=0.1), settled, run())
