"""The sweep as a command: a bar with the time left at a terminal, else a line for each run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from splitfed.config.sweep import SweepConfig
from splitfed.config.sweep_axes import text_of
from splitfed.study.sweep.run import SweepProgress, run_sweep
from splitfed.study.sweep.table import FIGURES, Row
from splitfed.training.runtime import prepare_process

_MINUTE_S: Final = 60.0
_HOUR_S: Final = 3600.0


def sweep_at_terminal(config: SweepConfig, *, processes: int, retry_failed: bool) -> list[Row]:
    """Make a sweep, and say on stderr how far it is.

    Args:
        config: The sweep's file.
        processes: Processes that make runs.
        retry_failed: Make runs again that failed.

    Returns:
        The rows of all runs of the grid.

    Raises:
        SplitFedError: If something cannot be used.
    """
    prepare_process(1)
    with _shown() as shown:
        return run_sweep(
            config,
            processes=processes,
            retry_failed=retry_failed,
            on_row=shown.take_row,
            on_progress=shown.take_progress,
        )


class _Shown:
    """Says each row above the bar, with how far the sweep then is."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console, self._bar = console, bar
        self._task = None if bar is None else bar.add_task("", total=None)
        self._row: Row | None = None

    def take_row(self, row: Row) -> None:
        """Keep a row until it is known how far the sweep is with it."""
        self._row = row

    def take_progress(self, progress: SweepProgress) -> None:
        """Say how far the sweep is."""
        left = "" if progress.left_s is None or progress.done == progress.total else about(progress.left_s)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=left, completed=progress.done, total=progress.total)
        ahead = f"{progress.done}/{progress.total}"
        if self._row is not None:
            self._say(f"{ahead} {described(self._row)}{'; ' if left and self._bar is None else ''}", left)
        elif progress.done:
            self._say(f"{ahead} runs are there already", "")
        self._row = None

    def _say(self, text: str, left: str) -> None:
        text += "" if self._bar is not None else left
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def described(row: Row) -> str:
    """Say what a row is of and what came of it, on a line."""
    axes = [name for name in row if name not in {"cell", "sweep", *FIGURES} and row[name] is not None]
    at = " ".join(f"{name}={text_of(row[name])}" for name in axes)
    if row["error"] is not None:
        return f"{at}: failed: {row['error']}"
    spent = "" if row["epsilon"] is None else f", epsilon {row['epsilon']:.4g}"
    return f"{at}: held-out loss {row['held_out_loss']:.4f}{spent}, {row['seconds']:.0f} s"


def about(seconds: float) -> str:
    """Say a time that is left, as roughly as it is known."""
    if seconds >= _HOUR_S:
        return f"about {seconds / _HOUR_S:.1f} h left"
    if seconds >= _MINUTE_S:
        return f"about {seconds / _MINUTE_S:.0f} min left"
    return f"about {seconds:.0f} s left"


@contextmanager
def _shown() -> Iterator[_Shown]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Shown(console, None)
        return
    columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Shown(console, bar)
