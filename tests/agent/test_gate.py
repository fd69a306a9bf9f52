"""The owner's policy decides what is clipped and noised, and an owner who changes nothing has noise on."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitfed.agent.gate import open_gate
from splitfed.config import PrivacySection
from splitfed.privacy import Ledger, read_ledger
from splitfed.training.link import Place

B, T, D = 3, 10, 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def test_noise_is_on_unless_the_owner_turns_it_off(ledger: Ledger) -> None:
    assert open_gate(PrivacySection(), ledger, "r").is_noisy is True
    assert open_gate(PrivacySection(noise_multiplier=0), ledger, "r").is_noisy is False


def test_each_channel_has_its_own_clip_and_noise_to_match(ledger: Ledger) -> None:
    """Zeros come out as noise of standard deviation z·2·C·√T, with another C and other noise for each channel."""
    z, norms = 0.5, {"smashed": 4.0, "output_gradient": 0.01}
    policy = PrivacySection(
        noise_multiplier=z,
        clipping_norm_smashed=norms["smashed"],
        clipping_norm_output_gradient=norms["output_gradient"],
    )
    gate = open_gate(policy, ledger, "r")
    zeros_BTD = torch.zeros(B, T, D)
    released = {
        "smashed": gate.smashed(zeros_BTD, records=["x"] * B, round=1, place=Place(0, 0)),
        "output_gradient": gate.output_gradient(zeros_BTD, records=["x"] * B, round=1, place=Place(0, 0)),
    }
    for channel, noise_BTD in released.items():
        expected = z * 2 * norms[channel] * math.sqrt(T)
        assert noise_BTD.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * B * T * D))
    first, second = (noise_BTD.flatten() for noise_BTD in released.values())
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / math.sqrt(B * T * D)
    assert [(row.channel, row.noise_multiplier, row.run) for row in read_ledger(ledger.path).rows] == [
        ("smashed", z, "r"),
        ("output_gradient", z, "r"),
    ]


def test_without_noise_everything_passes_as_it_is_and_nothing_is_guaranteed(ledger: Ledger) -> None:
    gate = open_gate(PrivacySection(noise_multiplier=0), ledger, "r")
    x_BTD = 100 * torch.randn(B, T, D)
    assert torch.equal(gate.smashed(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert torch.equal(gate.output_gradient(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert ledger.spent("smashed") is None
    assert ledger.spent("output_gradient") is None
