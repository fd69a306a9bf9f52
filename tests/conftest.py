"""What every test stands on: one thread, no network, a fixed seed, and the real model and data where they are."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("splitfed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("splitfed")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and this machine has none"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Agents note how far their ledgers have come in the user's own folder, which a test leaves alone."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state-home"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def _beside_the_repository(*parts: str) -> Path:
    folder = ROOT.parent.joinpath("shared", *parts)
    if not folder.is_dir():
        pytest.skip(f"needs shared/{'/'.join(parts)} beside the repository, and it is not there")
    return folder


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Folder of a real pretrained Llama of 260 thousand parameters, with its tokenizer."""
    return _beside_the_repository("models", "stories260k")


@pytest.fixture(scope="session")
def e2e() -> Path:
    """Folder of the E2E data set: train.csv, dev.csv and test.csv with the columns mr and ref."""
    return _beside_the_repository("data", "e2e")
