from pathlib import Path

import pytest

from splitfed.config import to_toml
from splitfed.errors import ConfigError, RunDirectoryError
from splitfed.study.generate_run import generate_from_run
from splitfed.training.prompts import Wanted
from tests.service.conftest import server_config


def generate(folder: Path, **wanted: int) -> list[list[int]]:
    return generate_from_run(folder, Wanted(["A number"], **wanted), write=lambda text: None)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds no run \(there is no run\.toml\); give the directory of one"):
        generate(tmp_path)


def test_a_run_without_a_whole_round_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(server_config(tmp_path)))
    with pytest.raises(RunDirectoryError, match="holds no adapter yet; come back once the run's first round is over"):
        generate(tmp_path)


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(server_config(tmp_path)))
    (tmp_path / "checkpoints" / "round-0001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="leaves no room for text in 2"):
        generate(tmp_path, max_tokens=2)
