"""Reading files: every format, and the sentence for a file that is wrong."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.rows import read_rows

Write = Callable[[str, str | bytes], str]


def rows(path: str, **settings: str) -> list[tuple[int, dict[str, object]]]:
    return list(read_rows(DataSection(path=path, **settings), path))  # type: ignore[arg-type]


def sentence(path: str, **settings: str) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, **settings)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def test_json_lines_give_their_objects_and_line_numbers(write: Write) -> None:
    path = write("a.jsonl", '{"text": "x", "n": 1}\n\n{"text": "2024-01-31"}\n')
    assert rows(path) == [(1, {"text": "x", "n": 1}), (3, {"text": "2024-01-31"})]


def test_a_list_of_json_objects_is_read_as_rows(write: Write) -> None:
    assert rows(write("a.json", '\n[{"text": "x"},\n {"text": "y"}]\n')) == [(1, {"text": "x"}), (2, {"text": "y"})]


def test_csv_cells_stay_the_text_that_they_are(write: Write) -> None:
    path = write("a.csv", 'text,n\nNA,007\n"two\nlines, one ""cell""",\n\n2024-01-31,1\n')
    assert rows(path) == [
        (1, {"text": "NA", "n": "007"}),
        (2, {"text": 'two\nlines, one "cell"', "n": ""}),
        (3, {"text": "2024-01-31", "n": "1"}),
    ]


def test_a_csv_cell_may_be_as_long_as_a_book(write: Write) -> None:
    book = "word " * 200_000
    assert rows(write("a.csv", f"text\n{book}\n")) == [(1, {"text": book})]


def test_lines_of_text_are_rows(write: Write) -> None:
    assert rows(write("a.txt", "one\n\ntwo\u2028still two\n")) == [
        (1, {"text": "one"}),
        (2, {"text": ""}),
        (3, {"text": "two\u2028still two"}),
    ]


def test_parquet_is_read_through_the_library(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "[1] part.parquet"  # brackets are a pattern to the library
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None], "n": [1, 2]}), path)
    assert rows(str(path)) == [(1, {"text": "x", "n": 1}), (2, {"text": None, "n": 2})]


def test_a_byte_order_mark_is_no_part_of_the_first_column(write: Write) -> None:
    assert rows(write("a.csv", b"\xef\xbb\xbftext\nx\n")) == [(1, {"text": "x"})]
    assert rows(write("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n')) == [(1, {"text": "x"})]


def test_a_format_that_is_set_outranks_the_extension(write: Write) -> None:
    assert rows(write("rows.dat", "text\nx\n"), format="csv") == [(1, {"text": "x"})]
    assert rows(write("rows.csv", "text\nx\n"), format="text") == [(1, {"text": "text"}), (2, {"text": "x"})]


def test_an_empty_file_has_no_rows(write: Write) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt", "a.parquet"):
        assert rows(write(name, "")) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "cannot be read as jsonl: row 2 is not JSON (Expecting value, col"),
        ("a.jsonl", '{"text": "x"}\n3\n', "cannot be read as jsonl: row 2 is not a JSON object with a key"),
        ("a.json", '[{"text": "x"}, 3]', "cannot be read as jsonl: row 2 is not a JSON object with a key"),
        ("a.json", '[{"text": "x"}', "cannot be read as jsonl: Expecting ',' delimiter"),
        ("a.csv", "text,n\nx,1\ny\n", "cannot be read as csv: row 2 has 1 cells where the header has 2"),
        ("a.csv", "text,n\nx,1,2\n", "cannot be read as csv: row 1 has 3 cells where the header has 2"),
        ("a.csv", "text,text\nx,1\n", "cannot be read as csv: the header names a column twice: text, text"),
        ("a.csv", 'text\n"x\n', "cannot be read as csv: line 2: unexpected end of data"),
        ("a.csv", b"text\ncaf\xe9\n", "cannot be read as csv: it is not UTF-8 text (invalid continuation byte)"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "cannot be read as jsonl: it is not UTF-8 text"),
        ("a.txt", b"caf\xe9\n", "cannot be read as text: it is not UTF-8 text"),
        ("a.parquet", "no parquet", "cannot be read as parquet: "),
        ("rows.dat", "x", 'its extension says no format; set data.format to "jsonl", "csv", "parquet" or "text"'),
    ],
)  # fmt: skip
def test_a_wrongly_shaped_file_is_explained(write: Write, name: str, content: str | bytes, said: str) -> None:
    assert sentence(write(name, content)).startswith(said)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert sentence(str(tmp_path / "gone.csv")) == "no such file; correct the path in [data]"


def test_a_name_that_is_no_file_is_not_looked_up_elsewhere(tmp_path: Path) -> None:
    """A mistyped path must not travel to a hub."""
    assert sentence(str(tmp_path / "notes")).startswith("no such file; correct data.path, or set data.format")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert sentence(str(tmp_path)) == "is a folder; give a file in [data]"


def test_a_data_set_that_cannot_be_had_is_named() -> None:
    data = DataSection(format="hub", path="nobody/nothing", split="validation")
    with pytest.raises(
        DataError, match=r"data set 'nobody/nothing', split 'validation': cannot be loaded from the hub: "
    ):
        list(read_rows(data, data.path))


def test_a_data_set_of_the_hub_is_asked_for_by_id_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, *, split: str) -> list[dict[str, str]]:
        return [{"text": f"{name} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows("owner/name", format="hub", split="validation") == [(1, {"text": "owner/name validation"})]


def test_local_files_leave_no_cache_and_no_words(write: Write, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["secret"] * 3}), tmp_path / "b.parquet")
    paths = [write("a.jsonl", json.dumps({"text": "secret"})), str(tmp_path / "b.parquet")]
    program = (
        "import sys\nfrom splitfed.config import DataSection\nfrom splitfed.training.rows import read_rows\n"
        "for path in sys.argv[1:]:\n    assert list(read_rows(DataSection(path=path), path))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": home, "HF_HOME": home / "hf", "TMPDIR": home, "XDG_CACHE_HOME": home / "cache"}
    environment = {"PATH": "", **{name: str(place) for name, place in places.items()}}
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout + done.stderr == ""
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_librarys_own_settings_are_given_back(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), path)
    level, disabled = logging.getLogger("datasets").level, datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(rows(str(path))) == 1
    assert logging.getLogger("datasets").level == level
    assert datasets.are_progress_bars_disabled() == disabled
