from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.config import PrivacySection
from splitfed.errors import BudgetExhausted
from splitfed.privacy import Ledger, gaussian_epsilon, read_ledger
from splitfed.training.generated_releases import GeneratedReleases

ONCE, TWICE = 1 / 2.0**2, 2 / 2.0**2
NOISY = PrivacySection(noise_multiplier=2.0, clipping_norm_smashed=3.0)
OPEN = PrivacySection(noise_multiplier=0.0, clipping_norm_smashed=3.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def gate(ledger: Ledger, privacy: PrivacySection = NOISY, **own: Any) -> GeneratedReleases:
    return GeneratedReleases(privacy, ledger, "small", 4, 16, **own)


def test_a_sequence_is_charged_once_before_it_can_release_a_row(ledger: Ledger) -> None:
    mechanism = gate(ledger).open("ab", 3)
    (row,) = read_ledger(ledger.path).rows
    assert (row.channel, row.kind, row.records, row.sequences) == ("smashed", "generate", ("ab",), 1)
    assert (row.noise_multiplier, row.unit, row.units, row.run, row.round, row.step) == (
        2.0,
        "sequence",
        1.0,
        "small",
        4,
        3,
    )
    assert mechanism is not None
    assert (mechanism.tokens, mechanism.noise_std) == (16, 2.0 * 2 * 3.0 * 4)
    for _ in range(16):
        mechanism.release(torch.zeros(1, 1, 4))
    assert len(read_ledger(ledger.path).rows) == 1


def test_sequences_of_one_record_add_up_and_those_of_two_do_not(ledger: Ledger) -> None:
    releases = gate(ledger)
    releases.open("ab", 0)
    releases.open("cd", 1)
    one = gaussian_epsilon(ONCE, 1e-5)
    assert ledger.spent(None) == pytest.approx(one, rel=1e-5)
    releases.open("ab", 2)
    assert ledger.spent(None) == pytest.approx(gaussian_epsilon(TWICE, 1e-5), rel=1e-5)


def test_where_the_devices_own_adapter_saw_raw_records_every_record_is_charged(ledger: Ledger) -> None:
    releases = gate(ledger, is_coupled=True)
    releases.open("ab", 0)
    releases.open("cd", 1)
    assert ledger.spent(None) == pytest.approx(gaussian_epsilon(TWICE, 1e-5), rel=1e-5)


def test_without_noise_one_charge_says_that_nothing_is_guaranteed(ledger: Ledger) -> None:
    releases = gate(ledger, OPEN)
    assert not releases.is_noisy
    assert releases.open("ab", 0) is None
    assert releases.open("cd", 1) is None
    (row,) = read_ledger(ledger.path).rows
    assert row.noise_multiplier == 0
    assert ledger.spent(None) is None


def test_the_budget_is_looked_at_for_all_sequences_before_the_first(ledger: Ledger) -> None:
    ledger.set_policy(epsilon_budget=gaussian_epsilon(ONCE, 1e-5) * 1.01)
    releases = gate(ledger)
    releases.check_budget(["ab", "cd"])
    with pytest.raises(BudgetExhausted, match="What is to be generated"):
        releases.check_budget(["ab", "cd", "ab"])
    assert read_ledger(ledger.path).rows == []
    releases.open("ab", 0)
    with pytest.raises(BudgetExhausted):
        releases.open("ab", 1)


def test_what_is_measured_on_is_charged_as_that_and_costs_the_same(ledger: Ledger) -> None:
    releases = gate(ledger, kind="evaluate")
    releases.open("ab", 0)
    releases.open("cd", 1)
    rows = read_ledger(ledger.path).rows
    assert [(row.channel, row.kind, row.records, row.step) for row in rows] == [
        ("smashed", "evaluate", ("ab",), 0),
        ("smashed", "evaluate", ("cd",), 1),
    ]
    assert ledger.spent(None) == pytest.approx(gaussian_epsilon(ONCE, 1e-5), rel=1e-5)
    assert releases.charged() == {"sequences": 2, "tokens": 16, "noise_multiplier": 2.0}
    assert releases.summary() == [
        "charged: 2 sequences of 16 tokens with noise multiplier 2, unit sequence, relation replace-one",
        f"privacy in total: {ledger.total_statement()}",
    ]
    ledger.set_policy(epsilon_budget=1e-3)
    with pytest.raises(BudgetExhausted, match="What is to be measured on"):
        releases.check_budget(["ab"])
