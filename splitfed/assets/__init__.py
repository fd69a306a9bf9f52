"""The small base model that the demo fine-tunes, and the script that made it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["base_model_folder"]


def base_model_folder() -> Path:
    """The folder of the shipped base model, which ``from_pretrained`` of transformers opens as it stands."""
    return Path(str(resources.files(__name__) / "base_model"))
