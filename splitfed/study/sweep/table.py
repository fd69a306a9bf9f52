"""The table of a sweep: a CSV file with a row for each run, which survives whatever ends the process."""

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from splitfed.errors import ConfigError, OutputError

Row = dict[str, Any]
"""A row by column: numbers as numbers, None where there is nothing."""

FIGURES: Final = (
    "base_loss",
    "held_out_loss",
    "perplexity",
    "epsilon",
    "delta",
    "relation",
    "activation_up_bytes",
    "activation_down_bytes",
    "adapter_up_bytes",
    "adapter_down_bytes",
    "data_up_bytes",
    "trainable_parameters",
    "steps",
    "samples",
    "seconds",
    "version",
    "error",
)
"""The columns after those of the axes; ``docs/studies.md`` says what each means."""
_FIRST: Final = ("cell", "sweep")
_TEXTS: Final = frozenset({"cell", "sweep", "version", "error", "relation"})


def columns_of(axes: Iterable[str]) -> tuple[str, ...]:
    """Give the columns of a sweep's table.

    Args:
        axes: Names of the axes, in the order of the file.
    """
    return (*_FIRST, *axes, *FIGURES)


def read_sweep(path: Path | str) -> list[Row]:
    """Read the rows of a sweep's table, which may be written to meanwhile; a last line that is not whole is left out.

    Raises:
        ConfigError: If there is no such table, or it cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the CSV file of a sweep") from error
    columns, rows = _parse(path, content[: content.rfind(b"\n") + 1])
    if columns and not _is_a_sweep(columns):
        raise ConfigError(f"{path}: is not the table of a sweep; give the CSV file of one")
    return rows


class SweepTable:
    """Holds a sweep's table while rows are added; no other process can hold it meanwhile.

    Args:
        path: The file; made if it is not there.
        columns: Its columns.
        sweep: Which sweep its rows have to be of.

    Attributes:
        rows: The rows of the file.

    Raises:
        ConfigError: If it is no table of this sweep, or held by another process.
        OutputError: If it cannot be opened or mended.

    Guarantees:
        * When ``append`` returns, the row is on disk.
        * A file that was cut in its last line opens, without that line.
        * A file that holds anything else than rows of this sweep is left as it is.
    """

    def __init__(self, path: Path, columns: Sequence[str], sweep: str) -> None:
        self._path, self._columns = path, tuple(columns)
        try:
            self._descriptor = _open_locked(path)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be opened ({error.strerror}); give [output] csv a file that this user may write, in a "
                "folder that exists"
            ) from error
        with ExitStack() as undo:
            undo.callback(self.close)
            self.rows = self._mend(sweep)
            undo.pop_all()

    def append(self, row: Mapping[str, Any]) -> None:
        """Put a row on disk.

        Raises:
            OutputError: If that fails; the file holds no part of it then.
        """
        whole = {column: row.get(column) for column in self._columns}
        self._append(_line(whole.values()))
        self.rows.append(whole)

    def drop(self, is_wanted_no_more: Callable[[Row], bool]) -> None:
        """Take rows out; the file has all of them or only the others, whenever the process ends.

        Raises:
            OutputError: If that fails; the file is as it was then.
        """
        kept = [row for row in self.rows if not is_wanted_no_more(row)]
        if len(kept) == len(self.rows):
            return
        lines = [_line(self._columns), *(_line([row[column] for column in self._columns]) for row in kept)]
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with ExitStack() as undo:
                descriptor = _open_locked(draft)
                undo.callback(draft.unlink, missing_ok=True)
                undo.callback(os.close, descriptor)
                _write(descriptor, b"".join(lines))
                draft.replace(self._path)
                undo.pop_all()
        except OSError as error:
            raise self._unwritten(error) from error
        os.close(self._descriptor)
        self._descriptor, self.rows = descriptor, kept
        _sync_folder(self._path)

    def close(self) -> None:
        """Let another process have the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _mend(self, sweep: str) -> list[Row]:
        """Read the rows, then cut off a last line that is not whole; begin the file where it is empty."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        columns, rows = _parse(self._path, whole)
        if columns:
            self._refuse_others(columns, rows, sweep)
        elif not _line(self._columns).startswith(content):
            raise ConfigError(f"{self._path}: is not the table of a sweep; name another file in [output] csv")
        try:
            os.ftruncate(self._descriptor, len(whole))
        except OSError as error:
            raise self._unwritten(error) from error
        if not columns:
            self._append(_line(self._columns))
            _sync_folder(self._path)
        return rows

    def _refuse_others(self, columns: Sequence[str], rows: Sequence[Row], sweep: str) -> None:
        if not _is_a_sweep(columns):
            raise ConfigError(f"{self._path}: is not the table of a sweep; name another file in [output] csv")
        advice = "name another file in [output] csv, or move this one away"
        if tuple(columns) != self._columns:
            there, here = (", ".join(each[len(_FIRST) : -len(FIGURES)]) or "none" for each in (columns, self._columns))
            raise ConfigError(f"{self._path}: has the axes {there}, but this grid has {here}; {advice}")
        others = [number for number, row in enumerate(rows, 2) if row["sweep"] != sweep]
        if others:
            version = rows[others[0] - 2]["version"]
            raise ConfigError(
                f"{self._path}: line {others[0]} is of another sweep: its settings outside of the grid, its base "
                f"model, its data or its splitfed (version {version}) differ from this one's; {advice}"
            )

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            _write(self._descriptor, line)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: cannot be written ({error.strerror}); make room, and start the sweep again.")


def _is_a_sweep(columns: Sequence[str]) -> bool:
    return tuple(columns[: len(_FIRST)]) == _FIRST and tuple(columns[-len(FIGURES) :]) == FIGURES


def _parse(path: Path, whole: bytes) -> tuple[list[str], list[Row]]:
    try:
        columns, *lines = list(csv.reader(io.StringIO(whole.decode(), newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: is not the table of a sweep; name another file") from error
    for number, line in enumerate(lines, 2):
        if len(line) != len(columns):
            raise ConfigError(
                f"{path}: line {number} has {len(line)} columns, not {len(columns)}; correct or remove that line"
            )
    return columns, [dict(zip(columns, map(_field, columns, line), strict=True)) for line in lines]


def _field(column: str, text: str) -> Any:
    return (text or None) if column in _TEXTS else value_of(text)


def value_of(text: str) -> Any:
    """Read a field of a table: numbers as numbers, None where there is nothing."""
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(["" if value is None else value for value in values])
    return text.getvalue().encode()


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with ExitStack() as undo:  # also where the file was replaced in between
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{path}: another sweep is writing to it; wait for that, or name another file in [output] csv"
                ) from error
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                undo.pop_all()
                return descriptor


def _write(descriptor: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
