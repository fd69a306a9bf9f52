"""What plans go by: losses and leakage that were measured, of the studies that come with splitfed or of one's own."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from splitfed.config.sweep import SweepConfig, load_sweep_config
from splitfed.config.sweep_axes import text_of
from splitfed.config.sweep_cells import CellConfig, cells
from splitfed.errors import ConfigError
from splitfed.models import resolve_base
from splitfed.study.cost import model_shape
from splitfed.study.leakage import read_leakage
from splitfed.study.plan.leakage import TARGETS, LeakagePoint, LeakageTable
from splitfed.study.plan.loss import LossPoint, LossTable
from splitfed.study.sweep import Row, read_sweep

Point = TypeVar("Point", LossPoint, LeakagePoint)

PACKAGED = "a Llama of 260 thousand parameters and 5 blocks, fine-tuned on E2E NLG"
_LOSS, _LEAKAGE = "loss.csv", "leakage.csv"


@dataclass(frozen=True)
class Evidence:
    """What plans go by.

    Attributes:
        loss: Losses that were measured.
        leakage: What attacks have recovered.
        loss_of: What was measured for the losses, in words.
        leakage_of: The same for the attacks.
    """

    loss: LossTable
    leakage: LeakageTable
    loss_of: str = PACKAGED
    leakage_of: str = PACKAGED


def evidence(sweeps: Sequence[Path] = (), audits: Sequence[Path] = ()) -> Evidence:
    """Gather what plans go by; of what one has measured oneself, what comes with splitfed is left out.

    Args:
        sweeps: Files of sweeps that were made: their rows say what loss costs.
        audits: Folders that ``splitfed audit --output`` has written: they say what leaks.

    Raises:
        ConfigError: If a file cannot be used, or has nothing to go by.
        SplitFedError: If a base model of theirs cannot be found.
    """
    losses = [point for file in sweeps for point in loss_points(file)]
    leaks = [point for folder in audits for point in leakage_points(folder)]
    try:
        loss = LossTable(losses or packaged(_LOSS, LossPoint))
    except ValueError as error:
        raise ConfigError(f"{_named(sweeps)}: {error}") from error
    try:
        leakage = LeakageTable(leaks or packaged(_LEAKAGE, LeakagePoint))
    except ValueError as error:
        raise ConfigError(f"{_named(audits)}: {error}") from error
    return Evidence(loss, leakage, _named(sweeps) or PACKAGED, _named(audits) or PACKAGED)


def packaged(name: str, kind: type[Point]) -> list[Point]:
    """Read a table that comes with splitfed.

    Args:
        name: Its file.
        kind: What a row is.
    """
    text = resources.files("splitfed.assets").joinpath("evidence", name).read_text(encoding="utf-8")
    types = {field.name: field.type for field in fields(kind)}
    rows = csv.DictReader(io.StringIO(text))
    return [kind(**{name: types[name](value) for name, value in row.items()}) for row in rows]  # type: ignore[operator]


def as_csv(points: Iterable[LossPoint | LeakagePoint]) -> str:
    """Write points as a table that comes with splitfed has them."""
    rows = [asdict(point) for point in points]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def loss_points(file: Path) -> list[LossPoint]:
    """Say what the runs of a sweep came to: means over all that differ in anything but what a plan chooses.

    Args:
        file: The sweep's TOML file, whose table is there.

    Raises:
        ConfigError: If the table is missing, or no run of a split succeeded.
        SplitFedError: If the base model's configuration cannot be read.
    """
    config = load_sweep_config(file)
    shape = model_shape(resolve_base(config.model.base, config.model.revision))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for cell, row in _runs(config):
        model, noise = cell.model, cell.privacy.noise_multiplier
        setting = (model.bottom_blocks, model.top_blocks, noise, cell.codecs.smashed, cell.lora.rank)
        groups.setdefault((cell.training.max_tokens, *setting), []).append(row)
    if not groups:
        raise ConfigError(f"{file}: no run of a split has a row without an error; make them with splitfed sweep {file}")
    points = []
    for (tokens, bottom, top, noise, codec, rank), rows in groups.items():
        losses = [row["held_out_loss"] for row in rows]
        points.append(
            LossPoint(
                n_blocks=shape.n_blocks,
                hidden_size=shape.hidden_size,
                tokens=tokens,
                bottom_blocks=bottom,
                top_blocks=top,
                noise_multiplier=noise,
                codec=codec,
                rank=rank,
                base_loss=round(rows[0]["base_loss"], 4),
                loss=round(statistics.mean(losses), 4),
                spread=round(statistics.stdev(losses), 4) if len(losses) > 1 else 0.0,
                runs=len(losses),
            )
        )
    return points


def leakage_points(folder: Path) -> list[LeakagePoint]:
    """Say what an audit has recovered, with noise off and as configured.

    Args:
        folder: What ``splitfed audit --output`` has written.

    Raises:
        ConfigError: If the audit does not say which model and noise it was made with.
        DataError: If it is missing or damaged.
    """
    found = read_leakage(folder)
    n_blocks, hidden_size, tokens = found.n_blocks, found.hidden_size, found.max_tokens
    noise_multiplier = found.noise_multiplier
    if n_blocks is None or hidden_size is None or tokens is None or noise_multiplier is None:
        raise ConfigError(f"{folder}: the audit does not say what it was made with; make it again with splitfed audit")
    points = []
    for protection in dict.fromkeys(row.protection for row in found.rows):
        for target in TARGETS:
            rows = [row for row in found.rows if (row.target, row.protection) == (target, protection)]
            if not rows:
                continue
            best = max(rows, key=lambda row: row.rate)
            points.append(
                LeakagePoint(
                    n_blocks=n_blocks,
                    hidden_size=hidden_size,
                    tokens=tokens,
                    bottom_blocks=found.bottom_blocks,
                    top_blocks=found.top_blocks,
                    noise_multiplier=0.0 if protection == "noise off" else noise_multiplier,
                    recovers=target,
                    attack=best.attack,
                    recovered=best.rate,
                    chance=best.chance,
                )
            )
    return points


def _runs(config: SweepConfig) -> Iterable[tuple[CellConfig, Row]]:
    """Pair the runs of a split that succeeded with their rows."""
    rows = {_place(row, config): row for row in read_sweep(config.output.csv) if row["error"] is None}
    for cell in cells(config):
        row = rows.get(_place(cell.point, config))
        if cell.config is not None and cell.config.method == "split" and row is not None:
            yield cell.config, row


def _place(values: Any, config: SweepConfig) -> tuple[str, ...]:
    at = [values.get(axis) for axis in config.grid]
    return tuple("" if value is None else text_of(value) for value in at)


def _named(places: Sequence[Path]) -> str:
    return ", ".join(str(place) for place in places)


__all__ = ["PACKAGED", "Evidence", "as_csv", "evidence", "leakage_points", "loss_points", "packaged"]
