"""The table of a sweep: whole rows on disk, one writer, and nothing but this sweep's rows."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from splitfed.errors import ConfigError, OutputError
from splitfed.study.sweep.table import FIGURES, SweepTable, columns_of, read_sweep

COLUMNS = columns_of(["codec", "seed"])


def row_of(cell: str, sweep: str = "ours", **figures: Any) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"cell": cell, "sweep": sweep, "codec": "int8", "version": "1"} | figures


def table_of(file: Path, *rows: dict[str, Any]) -> Path:
    with SweepTable(file, COLUMNS, "ours") as table:
        for row in rows:
            table.append(row)
    return file


def test_a_row_is_read_back_with_its_types(tmp_path: Path) -> None:
    row = row_of("12345678", seed=3, held_out_loss=0.1 + 0.2, epsilon=float("inf"), error='say "no", or é')
    file = table_of(tmp_path / "a.csv", row)
    assert read_sweep(file) == [row]
    assert file.read_text().splitlines()[0] == ",".join(("cell", "sweep", "codec", "seed", *FIGURES))


def test_a_file_cut_anywhere_in_its_last_line_opens_without_it(tmp_path: Path) -> None:
    rows = [row_of("a", seed=1), row_of("b", seed=2, error="é, and a comma")]
    whole = table_of(tmp_path / "whole.csv", *rows).read_bytes()
    header_bytes = whole.index(b"\n") + 1
    first_bytes = whole.index(b"\n", header_bytes) + 1
    file = tmp_path / "cut.csv"
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        there = [rows, rows[:1], []][(size < len(whole)) + (size < first_bytes)]
        assert read_sweep(file) == there
        with SweepTable(file, COLUMNS, "ours") as table:
            assert table.rows == there
            for row in rows[len(there) :]:
                table.append(row)
        assert file.read_bytes() == whole


def test_a_table_has_one_writer_and_any_number_of_readers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    with SweepTable(file, COLUMNS, "ours") as table:
        table.append(row_of("a"))
        with pytest.raises(ConfigError, match=r"a\.csv: another sweep is writing to it; wait for that"):
            SweepTable(file, COLUMNS, "ours")
        assert len(read_sweep(file)) == 1
        table.drop(lambda row: row["cell"] == "a")
        with pytest.raises(ConfigError, match="another sweep is writing to it"):
            SweepTable(file, COLUMNS, "ours")
        table.append(row_of("b"))
    assert table_of(file, row_of("c")) == file
    assert [row["cell"] for row in read_sweep(file)] == ["b", "c"]
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name,age\nx,3\n", "is not the table of a sweep"),
        (b"notes without an end", "is not the table of a sweep"),
        (b"\xff\xfe\n", "is not the table of a sweep"),
        ((",".join(COLUMNS) + "\na,ours,int8\n").encode(), f"line 2 has 3 columns, not {len(COLUMNS)}; correct or rem"),
        ((",".join(columns_of(["seed"])) + "\n").encode(), "has the axes seed, but this grid has codec, seed; name an"),
        ((",".join(columns_of([])) + "\n").encode(), "has the axes none, but this grid has codec, seed; name another"),
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        SweepTable(file, COLUMNS, "ours")
    assert f"a.csv: {said}" in str(raised.value)
    assert file.read_bytes() == content


def test_a_row_of_another_sweep_is_named_by_its_line(tmp_path: Path) -> None:
    file = table_of(tmp_path / "a.csv", row_of("a"), row_of("b", sweep="theirs", version="0.0.9"))
    with pytest.raises(ConfigError, match=r"a\.csv: line 3 is of another sweep: .* splitfed \(version 0\.0\.9\)"):
        SweepTable(file, COLUMNS, "ours")


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = table_of(tmp_path / "a.csv", row_of("a"))
    before, write = file.read_bytes(), os.write

    def write_some(descriptor: int, block: bytes) -> int:
        if len(block) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, block[: len(block) // 2])

    with SweepTable(file, COLUMNS, "ours") as table:
        monkeypatch.setattr(os, "write", write_some)
        with pytest.raises(OutputError, match=r"a\.csv: cannot be written \(No space left on device\); make room"):
            table.append(row_of("b"))
        with pytest.raises(OutputError, match="cannot be written"):
            table.drop(lambda row: True)
        monkeypatch.undo()
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


def test_a_table_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be opened \(No such file or directory\); give \[output\] csv"):
        SweepTable(tmp_path / "gone" / "a.csv", COLUMNS, "ours")
    with pytest.raises(ConfigError, match=r"gone\.csv: cannot be read \(No such file or directory\); give the CSV"):
        read_sweep(tmp_path / "gone.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"other\.csv: is not the table of a sweep; give the CSV file of one"):
        read_sweep(tmp_path / "other.csv")
