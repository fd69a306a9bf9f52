"""A ledger's bytes either check, or are the beginning of one last line, or are refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfed.errors import LedgerError
from splitfed.privacy.ledger_rows import Header, Row, encode_line, parse_ledger

PATH = Path("ledger.jsonl")
HEADER = Header(salt_sha256="0" * 64)


def row(number, **change):
    fields = {"channel": "smashed", "noise_multiplier": 0.02, "records": ("a1", "b2"), "sequences": 2, "run": "r"}
    return Row(**{**fields, "round": 1, "step": 0, "row": number, "time_s": 12.5, **change})


def lines_of(*entries):
    lines, check = [], ""
    for entry in entries:
        line, check = encode_line(entry, check)
        lines.append(line)
    return lines


LINES = lines_of(HEADER, row(1), row(2, run='é"\n,"check":"', kind="evaluate"), row(3, coupled=False))
CONTENT = b"".join(LINES)


def test_what_was_written_is_read():
    contents = parse_ledger(CONTENT, PATH)
    assert contents.header == HEADER
    assert contents.rows == [row(1), row(2, run='é"\n,"check":"', kind="evaluate"), row(3, coupled=False)]
    assert (contents.whole_bytes, contents.torn_bytes, contents.ends_in_newline) == (len(CONTENT), 0, True)


def test_every_line_is_json_that_says_what_it_counts():
    header, first, *_ = (json.loads(line) for line in CONTENT.splitlines())
    assert (header["splitfed_ledger"], header["unit"], header["relation"]) == (1, "sequence", "replace-one")
    assert first["records"] == ["a1", "b2"]
    assert list(first)[-1] == "check"


def test_an_empty_file_holds_nothing():
    contents = parse_ledger(b"", PATH)
    assert (contents.header, contents.rows, contents.torn_bytes) == (None, [], 0)


def test_a_file_cut_at_any_byte_gives_all_lines_before_the_cut():
    ends = [sum(map(len, LINES[: i + 1])) for i in range(len(LINES))]
    for cut in range(len(CONTENT) + 1):
        contents = parse_ledger(CONTENT[:cut], PATH)
        whole = sum(end - 1 <= cut for end in ends)  # a line that lacks only its newline counts
        assert (contents.header is not None) + len(contents.rows) == whole
        assert contents.whole_bytes + contents.torn_bytes == cut
        assert contents.ends_in_newline == (cut + 1 not in ends)


@given(position=st.integers(0, len(CONTENT) - 1), flip=st.integers(1, 255))
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_anywhere_is_refused(position, flip):
    changed = bytearray(CONTENT)
    changed[position] ^= flip
    with pytest.raises(LedgerError, match=r"Line \d of the ledger ledger\.jsonl is damaged"):
        parse_ledger(bytes(changed), PATH)


def test_every_last_byte_of_the_file_is_checked_too():
    for position in range(len(CONTENT) - len(LINES[-1]), len(CONTENT)):
        changed = bytearray(CONTENT)
        changed[position] ^= 1
        with pytest.raises(LedgerError, match="damaged"):
            parse_ledger(bytes(changed), PATH)


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 1, 3], [1, 2, 3], [0, 1, 2, 0, 3], [0, 0, 1]])
def test_lines_that_are_swapped_repeated_or_missing_are_refused(order):
    with pytest.raises(LedgerError, match="damaged"):
        parse_ledger(b"".join(LINES[i] for i in order), PATH)


def test_a_line_of_another_ledger_is_refused_although_it_checks_by_itself():
    other = lines_of(HEADER, row(1, sequences=9), row(2))
    with pytest.raises(LedgerError, match="Line 3"):
        parse_ledger(b"".join([*LINES[:2], other[2], LINES[3]]), PATH)
    with pytest.raises(LedgerError, match="Line 3"):
        parse_ledger(b"".join([LINES[0], other[1], *LINES[2:]]), PATH)


@pytest.mark.parametrize("junk", [b"\n", b"{}\n", b"null\n", b"\xff\xfe\n", b"\0" * 400 + b"\n"])
def test_a_line_that_is_none_is_refused_wherever_it_stands(junk):
    for place in range(len(LINES) + 1):
        with pytest.raises(LedgerError, match=f"Line {place + 1} "):
            parse_ledger(b"".join(LINES[:place]) + junk + b"".join(LINES[place:]), PATH)


@pytest.mark.parametrize("torn", [b"\0" * 400, b'{"chan', b"\xff"])
def test_an_unfinished_end_is_not_counted(torn):
    contents = parse_ledger(CONTENT + torn, PATH)
    assert (len(contents.rows), contents.torn_bytes, contents.whole_bytes) == (3, len(torn), len(CONTENT))


@pytest.mark.parametrize(
    "entries",
    [
        [HEADER, row(2)],
        [HEADER, row(1), row(1)],
        [row(1)],
        [HEADER, HEADER],
        [HEADER, row(1).model_copy(update={"noise_multiplier": -1.0})],
        [HEADER, row(1).model_copy(update={"channel": "weights"})],
        [HEADER.model_copy(update={"splitfed_ledger": 2})],
        [HEADER.model_copy(update={"unit": "token"})],
    ],
    ids=range(8),
)
def test_lines_with_a_right_checksum_and_a_wrong_content_are_refused(entries):
    content = b"".join(lines_of(*entries))
    with pytest.raises(LedgerError, match="damaged"):
        parse_ledger(content, PATH)
