"""Tables that come with the repository, found from a notebook's folder."""

from pathlib import Path

import pytest

from splitfed.errors import ConfigError
from splitfed.study.committed import OutsideRepository, committed_results, read_results
from splitfed.study.sweep import FIGURES


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for folder in ("benchmarks/results", "splitfed/study", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def write(clone: Path, name: str, *lines: str) -> None:
    (clone / "benchmarks" / "results" / f"{name}.csv").write_text("\n".join(lines) + "\n")


def test_they_are_found_from_the_folder_of_the_notebooks(
    root: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert committed_results(clone / "notebooks") == clone / "benchmarks" / "results"
    monkeypatch.chdir(root / "notebooks")
    assert committed_results() == root / "benchmarks" / "results"


def test_outside_of_a_clone_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutsideRepository) as refused:
        read_results("cuts")
    sentence = str(refused.value)
    assert sentence.startswith(f"{tmp_path} is not within a clone of the splitfed repository")
    assert sentence.endswith("open the notebook from the folder notebooks of a clone.")
    assert isinstance(refused.value, ConfigError)


def test_a_notebook_shows_that_sentence_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}), ipython_dir=str(tmp_path))
    result = shell.run_cell(
        f"from splitfed.study.committed import read_results\nread_results('cuts', {str(tmp_path)!r})"
    )
    assert isinstance(result.error_in_exec, OutsideRepository)
    assert capsys.readouterr().out == f"{result.error_in_exec}\n"


def test_a_benchmarks_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    with pytest.raises(OutsideRepository):
        committed_results(tmp_path)


def test_numbers_are_numbers_and_what_is_empty_is_none(clone: Path) -> None:
    write(clone, "found", "name,runs,rate,epsilon,note", "a,3,0.5,inf,", 'b,4,1e-3,2.5,"x, y"')
    assert read_results("found", clone) == [
        {"name": "a", "runs": 3, "rate": 0.5, "epsilon": float("inf"), "note": None},
        {"name": "b", "runs": 4, "rate": 0.001, "epsilon": 2.5, "note": "x, y"},
    ]


def test_the_table_of_a_sweep_is_read_while_it_grows_and_without_failed_runs(clone: Path) -> None:
    columns = ["cell", "sweep", "seed", *FIGURES]

    def line(**values: object) -> str:
        return ",".join(str(values.get(column, "")) for column in columns)

    rows = [line(cell="a", seed=0, held_out_loss=1.5), line(cell="b", seed=1, error="no memory")]
    write(clone, "grid", ",".join(columns), *rows, "c,d")
    path = clone / "benchmarks" / "results" / "grid.csv"
    path.write_text(path.read_text().removesuffix("\n"))  # a line that is still being written
    (row,) = read_results("grid", clone)
    assert (row["cell"], row["seed"], row["held_out_loss"]) == ("a", 0, 1.5)


def test_a_table_that_is_not_there_is_named_with_those_that_are(clone: Path) -> None:
    write(clone, "cuts", "a", "1")
    write(clone, "noise", "a", "1")
    with pytest.raises(ConfigError, match=r"cut\.csv: there is no such table; choose one .*: cuts, noise\."):
        read_results("cut", clone)


def test_a_table_without_a_row_is_refused(clone: Path) -> None:
    write(clone, "empty", "a,b")
    with pytest.raises(ConfigError, match=r"empty\.csv: has no row"):
        read_results("empty", clone)
