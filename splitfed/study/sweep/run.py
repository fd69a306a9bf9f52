"""A sweep: every run of a grid once, a row for each, whatever ends it in between."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from splitfed import __version__
from splitfed.config.sweep import SweepConfig, load_sweep_config
from splitfed.config.sweep_axes import text_of
from splitfed.config.sweep_cells import Cell, cells
from splitfed.errors import ConfigError
from splitfed.models import resolve_base
from splitfed.study.sweep.bench import Figures, Job
from splitfed.study.sweep.data import data_hash
from splitfed.study.sweep.identity import Content, base_hash, cell_id, sweep_id
from splitfed.study.sweep.table import Row, SweepTable, columns_of
from splitfed.study.sweep.workers import outcomes


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is.

    Attributes:
        done: Runs that have a row.
        total: Runs of the grid.
        left_s: Seconds that the others will take, going by the rows they train on; None before the first is over.
    """

    done: int
    total: int
    left_s: float | None = None


OnRow = Callable[[Row], None]
OnProgress = Callable[[SweepProgress], None]


def run_sweep(
    config: SweepConfig | Path | str,
    *,
    processes: int = 1,
    retry_failed: bool = False,
    on_row: OnRow = lambda row: None,
    on_progress: OnProgress = lambda progress: None,
) -> list[Row]:
    """Make every run of a sweep that has no row yet.

    Args:
        config: The sweep's file, or what was read from one.
        processes: Processes that make runs, each with one thread; 1 = this one alone.
        retry_failed: Make runs again whose row says that they failed.
        on_row: Told each new row when it is on disk.
        on_progress: Told how far the sweep is: at its start, and after each row.

    Returns:
        The rows of all runs of the grid, in its order; runs that failed have an ``error``.

    Raises:
        ValueError: If there is not one process at least.
        SplitFedError: If file, base model or data cannot be used, or the table is another sweep's.

    Guarantees:
        * A run has one row, and every run has one at the end, however often the sweep was killed and started again.
        * Figures, but for seconds, do not depend on the number of processes, on the order of runs, or on interruptions.
        * A run that fails has a row that says why, and stops no other.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; give 1 or more.")
    config = config if isinstance(config, SweepConfig) else load_sweep_config(config)
    plan = _Plan.of(config)
    with SweepTable(config.output.csv, columns_of(config.grid), plan.sweep) as table:
        if retry_failed:
            table.drop(lambda row: row["error"] is not None and row["cell"] in plan.cells)
        there = {row["cell"]: row for row in table.rows}
        left = {cell: of for cell, of in plan.cells.items() if cell not in there}
        clock = _Clock(len(plan.cells), left)
        on_progress(clock.progress())

        def add(cell: str, figures: Figures) -> None:
            row = plan.row(cell, figures)
            table.append(row)
            there[cell] = row
            on_row(row)
            on_progress(clock.progress(cell))

        for cell, of in left.items():
            if of.config is None:
                add(cell, {"error": of.refusal})
        with closing(outcomes(plan.jobs(left), processes=processes, on_ready=clock.start)) as made:
            for job, figures in made:
                add(job.cell, figures)
    return [there[cell] for cell in plan.cells]


@dataclass(frozen=True)
class _Plan:
    """What is to be made.

    Attributes:
        sweep: Name of the sweep.
        cells: Runs by their names.
        axes: Names of the axes.
        base: Folder of the base model.
        content: Hashes of what runs are made from.
    """

    sweep: str
    cells: Mapping[str, Cell]
    axes: Sequence[str]
    base: Path
    content: Content

    @classmethod
    def of(cls, config: SweepConfig) -> "_Plan":
        """Plan a sweep.

        Raises:
            SplitFedError: If base model or data cannot be read, or no run is possible.
        """
        grid = cells(config)
        if all(cell.config is None for cell in grid):
            raise ConfigError(f"No run of the grid is possible; the first says: {grid[0].refusal}.")
        base = resolve_base(config.model.base, config.model.revision)
        content = Content(base_hash(base), data_hash(config.data))
        sweep = sweep_id(config, content)
        return cls(sweep, {cell_id(cell, sweep, content): cell for cell in grid}, list(config.grid), base, content)

    def jobs(self, wanted: Mapping[str, Cell]) -> list[Job]:
        """Give the runs that can be made."""
        return [
            Job(name, cell.config, self.base, self.content.data)
            for name, cell in wanted.items()
            if cell.config is not None
        ]

    def row(self, name: str, figures: Figures) -> Row:
        """Put a row together as it will be read."""
        point = {axis: _as_read(value) for axis, value in self.cells[name].point.items()}
        of_none: Row = dict.fromkeys(columns_of(self.axes))
        return of_none | {"cell": name, "sweep": self.sweep, **point, **figures, "version": __version__}


class _Clock:
    """Estimates the time left: runs take as long as they have rows to train on."""

    def __init__(self, total: int, left: Mapping[str, Cell]) -> None:
        self._total, self._work = total, {name: cell.work for name, cell in left.items()}
        self._all, self._started_s = sum(self._work.values()), math.inf

    def start(self) -> None:
        """Note that runs begin now; the first time counts."""
        self._started_s = min(self._started_s, time.monotonic())

    def progress(self, done: str | None = None) -> SweepProgress:
        """Say how far it is, now that one more is done."""
        if done is not None:
            del self._work[done]
        left = sum(self._work.values())
        worked, took_s = self._all - left, time.monotonic() - self._started_s
        return SweepProgress(self._total - len(self._work), self._total, took_s * left / worked if worked else None)


def _as_read(value: object) -> object:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text_of(value)
