"""The language reference as a data set."""

import json

import pytest

from splitfed.study.reference_text import KINDS, write_reference


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_topic_is_a_row_and_kinds_are_thirds(tmp_path) -> None:
    rows = rows_of(write_reference(tmp_path / "all.jsonl"))
    assert len(rows) == len({row["topic"] for row in rows}) > 50
    counts = [sum(row["kind"] == kind for row in rows) for kind in KINDS]
    assert sum(counts) == len(rows)
    assert max(counts) - min(counts) <= 1


def test_code_is_indented_more_than_prose(tmp_path) -> None:
    rows = rows_of(write_reference(tmp_path / "all.jsonl"))

    def indented(kind: str) -> float:
        lines = [line for row in rows if row["kind"] == kind for line in row["text"].splitlines() if line.strip()]
        return sum(line.startswith("   ") for line in lines) / len(lines)

    assert indented("prose") < indented("mixed") < indented("code")


def test_parts_have_no_topic_in_common_and_keep_their_kinds(tmp_path) -> None:
    whole = {row["topic"]: row["kind"] for row in rows_of(write_reference(tmp_path / "all.jsonl"))}
    parts = [rows_of(write_reference(tmp_path / "part.jsonl", start=start, step=3)) for start in range(3)]
    assert sorted(row["topic"] for part in parts for row in part) == sorted(whole)
    assert all(whole[row["topic"]] == row["kind"] for part in parts for row in part)


def test_texts_are_cut(tmp_path) -> None:
    rows = rows_of(write_reference(tmp_path / "short.jsonl", most_letters=40))
    assert max(len(row["text"]) for row in rows) == 40


@pytest.mark.parametrize("wrong", [{"start": -1}, {"start": 10_000}, {"step": 0}])
def test_nothing_to_take_is_refused(tmp_path, wrong) -> None:
    with pytest.raises(ValueError, match="give a start from 0 to"):
        write_reference(tmp_path / "none.jsonl", **wrong)
    assert not (tmp_path / "none.jsonl").exists()
