"""The tables that come with the repository: what larger runs found, so that a notebook need not make them again."""

import csv
from pathlib import Path

from splitfed.errors import ConfigError
from splitfed.study.sweep import Row, read_sweep
from splitfed.study.sweep.table import value_of

_FOLDER = Path("benchmarks", "results")
_MARK = Path("splitfed", "study")


class OutsideRepository(ConfigError):
    """A notebook was started where no clone of the repository is around it."""

    def _render_traceback_(self) -> list[str]:
        """Give what a notebook shows in place of a traceback: the one sentence."""
        return [str(self)]


def committed_results(start: Path | str | None = None) -> Path:
    """Find the folder of the committed tables, ``benchmarks/results``.

    Args:
        start: Where to begin; the search goes on in the folders above it. Left out: the working directory, which is a
            notebook's own folder.

    Raises:
        OutsideRepository: If no folder on the way up is a clone of the repository.
    """
    start = Path.cwd() if start is None else Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / _FOLDER).is_dir() and (folder / _MARK).is_dir():
            return folder / _FOLDER
    raise OutsideRepository(
        f"{start} is not within a clone of the splitfed repository, whose tables in {_FOLDER} this reads; open the "
        "notebook from the folder notebooks of a clone."
    )


def read_results(name: str, start: Path | str | None = None) -> list[Row]:
    """Read a committed table, without the rows of runs that failed.

    Args:
        name: Name of the table, such as "federation".
        start: As for `committed_results`.

    Returns:
        A dict a row: numbers are numbers, what is empty is None.

    Raises:
        ConfigError: If there is no clone, no such table, or no row in it.
    """
    folder = committed_results(start)
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.csv"))) or "none"
        raise ConfigError(f"{path}: there is no such table; choose one of those that are there: {known}.")
    with path.open(newline="", encoding="utf-8") as lines:
        columns = csv.DictReader(lines).fieldnames or ()
    found = read_sweep(path) if "sweep" in columns else _plain(path)
    rows = [row for row in found if row.get("error") is None]
    if not rows:
        raise ConfigError(f"{path}: has no row of a run that succeeded; take the committed table again.")
    return rows


def _plain(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as lines:
        return [{column: value_of(text) for column, text in row.items()} for row in csv.DictReader(lines)]
