"""What only the base model can tell of a run is refused before its directory is made."""

from pathlib import Path
from typing import Any

import pytest

from splitfed.config import ModelSection, RunSection, ServerConfig
from splitfed.errors import ConfigError, SplitPointError
from splitfed.server.main import open_daemon
from tests.equivalence.tiny_models import tiny_model

ENOUGH: dict[str, Any] = {"training": {"max_tokens": 16}, "privacy": {"noise_multiplier": 0}}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Gives a server's configuration for a model of 4 blocks."""
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "base")

    def config(**sections: dict[str, Any]) -> ServerConfig:
        model = ModelSection(base=str(tmp_path / "base"), **sections.pop("model", {}))
        run = RunSection(directory=tmp_path / "run")
        return ServerConfig.model_validate({"run": run, "model": model, **ENOUGH, **sections})

    return config


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        (
            {"model": {"bottom_blocks": 2, "top_blocks": 2, "least_bottom_blocks": 1, "least_top_blocks": 0}},
            SplitPointError,
            "bottom_blocks=2 and top_blocks=2 do not split a model of 4 blocks; both must be 0 or more and their sum "
            "at most 3, so that the trunk keeps a block",
        ),
        ({"lora": {"rank": 1000000000}}, ConfigError, r"^\[lora\] rank is 1000000000, but an adapted layer of this "),
        (
            {"aggregation": {"lora": "flora", "flora_rank": 4000}},
            ConfigError,
            r"^\[aggregation\] flora_rank is 4000, but an adapted layer of this base model has \d+ inputs or outputs",
        ),
        ({"lora": {"targets": ["nothing"]}}, ConfigError, r"^\[lora\] targets: No layer .* is called 'nothing'"),
    ],
    ids=str,
)
def test_a_server_does_not_start_a_run_that_does_not_fit(
    config: Any, tmp_path: Path, sections: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        open_daemon(config(**sections))
    assert not (tmp_path / "run").exists()
