"""Where figures were made."""

import torch

from splitfed import __version__
from splitfed.study import origin as module
from splitfed.study.origin import origin


def test_versions_commit_and_machine_are_named() -> None:
    said = origin()
    assert f"splitfed {__version__}" in said
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in said


def test_without_git_or_a_clone_the_commit_is_left_out(tmp_path, monkeypatch) -> None:
    assert module._commit(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert " at commit " not in origin()
