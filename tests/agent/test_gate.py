"""The owner's policy decides what is clipped and noised, and an owner who changes nothing has noise on."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitfed.agent.gate import open_gate, settle
from splitfed.config import PrivacySection
from splitfed.errors import WeightsError
from splitfed.models import Bottom, partition
from splitfed.privacy import Ledger, read_ledger
from splitfed.training.link import Place
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

B, T, D = 3, 10, 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


@pytest.fixture
def bottom() -> Bottom:
    return partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).bottom


def test_noise_is_on_unless_the_owner_turns_it_off(ledger: Ledger) -> None:
    assert open_gate(PrivacySection(clipping_norm_smashed=4.0), ledger, "r").is_noisy is True
    assert open_gate(PrivacySection(noise_multiplier=0, clipping_norm_smashed=4.0), ledger, "r").is_noisy is False


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
    gate = open_gate(PrivacySection(noise_multiplier=0, clipping_norm_smashed=4.0), ledger, "r")
    x_BTD = 100 * torch.randn(B, T, D)
    assert torch.equal(gate.smashed(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert torch.equal(gate.output_gradient(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert ledger.spent("smashed") is None
    assert ledger.spent("output_gradient") is None


def test_the_owner_s_clip_is_kept(bottom: Bottom) -> None:
    policy = PrivacySection(clipping_norm_smashed=3.0)
    assert settle(policy, bottom) == policy


def test_a_clip_that_is_left_out_is_usual_in_the_model_and_always_the_same(bottom: Bottom) -> None:
    settled = settle(PrivacySection(), bottom)
    torch.manual_seed(1)
    assert settle(PrivacySection(), bottom) == settled
    norm = settled.clipping_norm_smashed
    assert norm is not None
    norms_BT = bottom(torch.randint(VOCABULARY, (64, 16))).norm(dim=-1)
    assert 0.3 < (norms_BT < norm).float().mean().item() < 0.7


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_bottom_whose_output_has_no_norm_is_refused(bottom: Bottom, value: float) -> None:
    with torch.no_grad():
        bottom.model.get_input_embeddings().weight.fill_(value)
        for parameter in bottom.model.base_model.layers.parameters():
            parameter.zero_()
    with pytest.raises(WeightsError, match="norm"):
        settle(PrivacySection(), bottom)
