"""A server that takes noise away at its trunk's entrance, by what the base model alone shows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitfed.config import AgentPrivacySection, PrivacySection
from splitfed.privacy.denoise import TableDenoiser
from splitfed.privacy.mixture import MixtureDenoiser
from splitfed.training.trunk_step import TrunkTrainer
from tests.service.conftest import server_config, write_texts
from tests.service.local import agent_config, run_agent_here, serving


def denoisers_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **privacy: Any) -> list[Any]:
    """Run two rounds; gives what each round's slots were opened with."""
    found: list[Any] = []
    open_round = TrunkTrainer.open_round

    def remember(self: TrunkTrainer, *arguments: Any, **named: Any) -> None:
        open_round(self, *arguments, **named)
        found.append(self.denoiser)

    monkeypatch.setattr(TrunkTrainer, "open_round", remember)
    blocks = privacy.pop("bottom_blocks", 1)
    config = server_config(folder, model={"bottom_blocks": blocks, "top_blocks": 1})
    config = config.model_copy(update={"privacy": PrivacySection(**privacy)})
    data = write_texts(folder / "a.jsonl", "a", 6)
    with serving(config) as server:
        policy = AgentPrivacySection(protected_channels=[])
        run_agent_here(agent_config(folder, "a", server.address, data, privacy=policy))
    assert load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    return found


def test_each_round_has_a_denoiser_for_the_bottom_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = denoisers_of_a_run(tmp_path, monkeypatch, noise_multiplier=0.005, denoise=True)
    assert isinstance(first, MixtureDenoiser)
    y_BTD = torch.randn(1, 8, 128)
    assert not torch.equal(first(y_BTD), second(y_BTD))


def test_embeddings_are_known_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"bottom_blocks": 0, "noise_multiplier": 0.005, "denoise": True}
    first, _ = denoisers_of_a_run(tmp_path, monkeypatch, **asked)
    assert isinstance(first, TableDenoiser)


def test_metric_noise_is_taken_away_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"bottom_blocks": 0, "smashed": "metric", "eta": 100.0, "denoise": True}
    first, _ = denoisers_of_a_run(tmp_path, monkeypatch, **asked)
    assert isinstance(first, TableDenoiser)


@pytest.mark.parametrize("asked", [{}, {"noise_multiplier": 0.005}, {"noise_multiplier": 0.0}], ids=str)
def test_nothing_is_taken_away_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    assert denoisers_of_a_run(tmp_path, monkeypatch, **asked) == [None, None]
