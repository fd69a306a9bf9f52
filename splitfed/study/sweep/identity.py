"""Which run a row is of: a hash of everything that decides its result, so that rows of two sweeps are never mixed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from splitfed import __version__
from splitfed.config.sweep import SweepConfig
from splitfed.config.sweep_axes import axes
from splitfed.config.sweep_cells import Cell

_DIGITS: Final = 16
_FILES: Final = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_BLOCK_BYTES: Final = 1 << 20
_PLACES: Final = (("model", "base"), ("model", "revision"), ("data", "path"), ("data", "held_out_path"))
"""Where content is, which is hashed itself."""


@dataclass(frozen=True)
class Content:
    """What a sweep's runs are made from, by hash.

    Attributes:
        base: Of the base model.
        data: Of the rows.
    """

    base: str
    data: str


def base_hash(folder: Path) -> str:
    """Hash a base model: its configuration, weights and tokenizer.

    Args:
        folder: The base model.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name}\0".encode())
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def sweep_id(config: SweepConfig, content: Content) -> str:
    """Name what all runs of a sweep have in common: the file without the grid, without what the grid sets.

    Args:
        config: The sweep's file.
        content: Base model and data.
    """
    common = _without_places(config.model_dump(mode="json", exclude={"grid", "output"}))
    known = axes()
    for key in (key for name in config.grid for key in known[name].keys):
        section, _, field = key.partition(".")
        del common[section][field]
    return _digest(common, content)


def cell_id(cell: Cell, of_sweep: str, content: Content) -> str:
    """Name a run; runs of equal settings have one name, whatever grid they are in.

    Args:
        cell: The run.
        of_sweep: What `sweep_id` gave: names a run that cannot be made together with its point.
        content: Base model and data.
    """
    if cell.config is None:
        return _digest({"sweep": of_sweep, "point": dict(cell.point)}, content)
    return _digest(_without_places(cell.config.model_dump(mode="json")), content)


def _without_places(sections: dict[str, Any]) -> dict[str, Any]:
    for section, key in _PLACES:
        del sections[section][key]
    return sections


def _digest(settings: Mapping[str, Any], content: Content) -> str:
    facts = {"settings": settings, "base": content.base, "data": content.data, "version": __version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]
