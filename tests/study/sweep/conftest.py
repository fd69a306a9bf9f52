"""What the tests of sweeps share: a base model on disk."""

from pathlib import Path

import pytest

from tests.study.sweep.small_sweep import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))
