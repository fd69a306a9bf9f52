"""What an agent has ready before it joins a run: its weight in every mean."""

from pathlib import Path
from typing import Any

import pytest

import splitfed
from splitfed.agent.policy import agree
from splitfed.agent.prepare import prepare
from splitfed.config import AgentConfig, AgentPrivacySection, AgentSection, DataSection, RunConfig
from splitfed.privacy import Ledger
from tests.service.conftest import server_config, write_texts


@pytest.mark.parametrize(
    ("privacy", "weight"),
    [
        ({"noise_multiplier": 0.0}, None),
        ({"noise_multiplier": 0.0, "aggregation_weight": 5}, 5),
        ({"noise_multiplier": 1.0}, 1),
        ({"noise_multiplier": 1.0, "aggregation_weight": 5}, 5),
        ({"noise_multiplier": 1.0, "adapter": "none"}, 1),
    ],
    ids=str,
)
def test_the_number_of_examples_is_the_weight_only_where_nothing_is_noised(
    tmp_path: Path, privacy: dict[str, Any], weight: int | None
) -> None:
    file = write_texts(tmp_path / "a.jsonl", "a", 7)
    config = AgentConfig(
        agent=AgentSection(name="a", state_directory=tmp_path / "a"),
        data=DataSection(path=str(file)),
        privacy=AgentPrivacySection(**privacy),
    )
    run: RunConfig = server_config(tmp_path).shared()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        prepared = prepare(config, run, agree(config.privacy, run), splitfed.base_model_folder(), ledger)
    assert len(prepared.train) > 5
    assert prepared.weight == (len(prepared.train) if weight is None else weight)
