"""Where figures were made: a line for the last cell of a notebook."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from splitfed import __version__


def origin() -> str:
    """Name splitfed's version and commit, torch's version, and the machine, as far as they are known."""
    commit = _commit(Path(__file__).parent)
    at = f" at commit {commit}" if commit else ""
    cores = os.cpu_count() or 1
    return (
        f"Made with splitfed {__version__}{at} and torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"on {cores} {'core' if cores == 1 else 'cores'} of {platform.machine()}."
    )


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
