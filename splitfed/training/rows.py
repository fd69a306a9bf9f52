"""Reading the rows of a data file, or of a data set of the hub, one after the other.

The hub and Parquet are the ``datasets`` library's. Lines of text, JSON and CSV are read with Python's own modules: the
library guesses types (a text such as 2024-01-31 becomes a date, NA a missing value), takes the first cell of a ragged
row for an index, and cannot name the row that is wrong.
"""

import contextlib
import csv
import glob
import json
import logging
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from splitfed.config import DataSection
from splitfed.errors import DataError

Row = dict[str, Any]

_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_rows(data: DataSection, path: str) -> Generator[tuple[int, Row]]:
    """Go through the rows of ``path``, which is ``data.path`` or ``data.held_out_path``.

    A file is streamed: nothing is copied to a cache, and no network is used. A data set of the hub is downloaded to
    the library's cache.

    Args:
        data: The agent's section on its data, for the format and the split.
        path: A file, or the id of a data set.

    Yields:
        The number of a row, from 1, and its columns.

    Raises:
        DataError: If there is no such file or data set, or if it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{path}: is a folder; give a file in [data]")
    data_format = format_of(data, path)
    if data_format == "hub":
        yield from _read_hub(path, data.split)
        return
    if not file.exists():
        raise DataError(f"{path}: no such file; correct the path in [data]")
    try:
        if file.stat().st_size > 0:
            yield from _READERS[data_format](file)
    except (OSError, ValueError) as error:  # what json and pyarrow raise are ValueErrors
        raise DataError(f"{path}: cannot be read as {data_format}: {_reason(error)}") from error


def format_of(data: DataSection, path: str) -> str:
    """Name the format of ``path``: the configured one, or for "auto" the one that the file's extension says.

    Raises:
        DataError: If a file's extension says nothing.
    """
    if data.format != "auto" and not (data.format == "hub" and path == data.held_out_path):
        return data.format
    by_suffix = _FORMAT_OF_SUFFIX.get(Path(path).suffix.lower())
    if by_suffix is not None:
        return by_suffix
    if not Path(path).exists():
        raise DataError(f'{path}: no such file; correct data.path, or set data.format = "hub" for a data set')
    raise DataError(f'{path}: its extension says no format; set data.format to "jsonl", "csv", "parquet" or "text"')


def _read_text(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, {"text": line.rstrip("\n")}


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        is_first = True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith("["):
                yield from _read_json_list(line + lines.read())
                return
            is_first = False
            try:
                yield number, _columns(number, json.loads(line.strip()))
            except json.JSONDecodeError as error:
                raise ValueError(f"row {number} is not JSON ({error.msg}, column {error.colno})") from error


def _read_json_list(text: str) -> Iterator[tuple[int, Row]]:
    for number, value in enumerate(json.loads(text), start=1):
        yield number, _columns(number, value)


def _columns(number: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is not a JSON object with a key for each column")
    return value


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    longest_cell = csv.field_size_limit(sys.maxsize)  # the module's own limit is shorter than many a document
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise ValueError(f"the header names a column twice: {', '.join(header)}")
            for number, cells in enumerate((row for row in rows if row), start=1):
                if len(cells) != len(header):
                    raise ValueError(f"row {number} has {len(cells)} cells where the header has {len(header)}")
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(longest_cell)


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset  # takes a second, so only where it is needed

    with _quiet(), tempfile.TemporaryDirectory(prefix="splitfed-rows-") as cache:
        files = {"train": glob.escape(str(file))}
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
        yield from enumerate(rows, start=1)


def _read_hub(name: str, split: str) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset

    try:
        with _quiet():
            rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # not found, gated, offline, no such split
        raise DataError(
            f"data set {name!r}, split {split!r}: cannot be loaded from the hub: {_one_line(error)}; "
            "correct data.path and data.split, or give a file"
        ) from error
    yield from enumerate(rows, start=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from drawing progress bars and from logging what it raises anyway."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("datasets")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error.reason}); save it as UTF-8"
    return f"{_one_line(error)}; correct the file or data.format"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


_READERS = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}
