"""Where the demonstration writes: into its own folder, and never over anybody's files."""

from pathlib import Path

import pytest

from splitfed.demo import run_demo
from splitfed.errors import RunDirectoryError


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds other files"):
        run_demo(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("server.toml", "mine")]


def test_a_file_in_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(RunDirectoryError, match="give --directory a folder"):
        run_demo(tmp_path / "demo")
    assert (tmp_path / "demo").read_text() == "mine"
