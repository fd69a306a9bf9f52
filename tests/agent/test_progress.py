"""What a person reads of an agent's work: losses, bytes, and what is guaranteed, in full."""

import io
from typing import Any

import pytest
from rich.console import Console

from splitfed.agent.progress import Progress
from splitfed.config import PrivacySection
from splitfed.privacy import RELATION, UNIT

LINE: dict[str, Any] = {
    "round": 2,
    "training_loss": 3.25,
    "held_out_loss": None,
    "epsilon": {"smashed": 12.34567, "output_gradient": 0.5, "adapter": 0.0},
    "total": "none: the adapter update is not protected",
    "delta": 1e-5,
    "unit": UNIT,
    "relation": RELATION,
    "bytes_up": 2_500_000,
    "bytes_down": 1_000_000,
    "seconds": 7.0,
}


@pytest.fixture
def progress(caplog: pytest.LogCaptureFixture) -> Progress:
    caplog.set_level("INFO", "splitfed")
    return Progress(Console(file=io.StringIO()))


def test_noise_off_is_a_warning_that_nothing_is_guaranteed(
    progress: Progress, caplog: pytest.LogCaptureFixture
) -> None:
    progress.policy(PrivacySection(noise_multiplier=0.0), is_training=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "nothing is guaranteed" in record.getMessage()


SETTLED = PrivacySection(
    noise_multiplier=0.75,
    clipping_norm_smashed=3.5,
    clipping_norm_output_gradient=0.25,
    delta=1e-6,
    noise_multiplier_adapter=1.5,
)


@pytest.mark.parametrize(
    ("changes", "is_training", "said"),
    [
        (
            {},
            True,
            [
                "privacy of the smashed data: unit sequence, noise multiplier 0.75, clip 3.5",
                "privacy of the output gradients: unit sequence, noise multiplier 0.75, clip 0.25",
                "privacy of the adapter update: dp-sgd, noise multiplier 1.5, clip 0.1",
            ],
        ),
        ({"adapter": "none"}, True, ['the adapter update leaves unprotected (adapter = "none")']),
        ({}, False, ["nothing is trained on this device, so no adapter update leaves it"]),
        (
            {"smashed": "metric", "eta": 2.0},
            True,
            ["privacy of the smashed data: metric privacy, eta 2, and no epsilon"],
        ),
    ],
    ids=str,
)
def test_a_policy_is_told_with_all_that_it_rests_on(
    progress: Progress, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], is_training: bool, said: list[str]
) -> None:
    progress.policy(SETTLED.model_copy(update=changes), is_training=is_training)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == f"noise is on; every epsilon is for delta 1e-06 and the relation {RELATION}"
    assert set(said) <= set(messages)


def test_a_round_is_told_with_loss_traffic_and_time(progress: Progress, caplog: pytest.LogCaptureFixture) -> None:
    progress.round_is_over(LINE, rounds=5)
    assert "round 2 of 5 is over: loss 3.250, 2.5 MB up, 1.0 MB down, 7.0 s" in caplog.text


def test_a_held_out_loss_is_told_where_there_is_one(progress: Progress, caplog: pytest.LogCaptureFixture) -> None:
    progress.round_is_over({**LINE, "held_out_loss": 3.5}, rounds=5)
    assert "loss 3.250, held out 3.500," in caplog.text


@pytest.mark.parametrize(
    ("relation", "buys"), [("zero-out", "lowers epsilon"), ("replace-one", "lowers no epsilon under replace-one")]
)
def test_a_secret_sample_is_told_with_what_it_buys(
    progress: Progress, caplog: pytest.LogCaptureFixture, relation: str, buys: str
) -> None:
    progress.policy(SETTLED.model_copy(update={"sample_rate": 0.05, "relation": relation}), is_training=True)
    assert f"each step draws each example with probability 0.05, in secret, which {buys}" in caplog.messages


def test_a_channel_that_costs_next_to_nothing_is_told_all_the_same(
    progress: Progress, caplog: pytest.LogCaptureFixture
) -> None:
    progress.policy(SETTLED, is_training=False)
    progress.round_is_over({**LINE, "epsilon": dict.fromkeys(LINE["epsilon"], 0.0)}, rounds=5)
    charged = [message for message in caplog.messages if message.startswith("charged to the ")]
    rest = f"so far: epsilon 0, delta 1e-05, unit {UNIT}, relation {RELATION}"
    assert charged == [f"charged to the {name} {rest}" for name in ("smashed data", "output gradients")]


def test_an_epsilon_is_told_with_its_channel_delta_unit_and_relation(
    progress: Progress, caplog: pytest.LogCaptureFixture
) -> None:
    progress.round_is_over(LINE, rounds=5)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("charged to the")]
    rest = f"delta 1e-05, unit {UNIT}, relation {RELATION}"
    assert said == [  # rounded up, never down; nothing of what has not left
        f"charged to the smashed data so far: epsilon 12.35, {rest}",
        f"charged to the output gradients so far: epsilon 0.5, {rest}",
    ]


def test_a_channel_without_noise_is_told_to_have_no_epsilon(
    progress: Progress, caplog: pytest.LogCaptureFixture
) -> None:
    progress.round_is_over({**LINE, "epsilon": {"smashed": None}}, rounds=5)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("charged to the")]
    assert said == ["charged to the smashed data so far: no epsilon"]


def test_every_round_ends_with_the_guarantee_in_total(progress: Progress, caplog: pytest.LogCaptureFixture) -> None:
    progress.round_is_over(LINE, rounds=5)
    assert caplog.records[-1].getMessage() == "privacy in total: none: the adapter update is not protected"


def test_steps_are_told_a_few_times_a_round(progress: Progress, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(20):
        progress.step_is_over(1, 3, step, 20, loss=4.0)
    assert [record.args for record in caplog.records] == [(1, 3, step, 20, 4.0) for step in (4, 8, 12, 16, 20)]


def test_the_fetching_of_the_base_model_is_told_in_tenths(progress: Progress, caplog: pytest.LogCaptureFixture) -> None:
    for done_bytes in range(0, 10_000_001, 100_000):
        progress.fetched(done_bytes, 10_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        f"base model: {megabytes}.0 of 10.0 MB fetched" for megabytes in range(1, 11)
    ]


def test_at_a_terminal_a_bar_takes_the_place_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "splitfed")
    drawn = io.StringIO()
    progress = Progress(Console(file=drawn, force_terminal=True, width=120))
    for step in range(4):
        progress.step_is_over(2, 3, step, 4, loss=4.125)
    progress.finish("run")
    assert "round 2 of 3" in drawn.getvalue()
    assert "8/12" in drawn.getvalue()
    assert "4.125" in drawn.getvalue()
    assert [record.getMessage() for record in caplog.records] == ["the run run is over"]
