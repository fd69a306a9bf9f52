"""The lines of a ledger: JSON, each with a checksum over itself and all lines before it.

A line is written whole and reaches the disk before the release that it charges. A crash can therefore only leave the
beginning of one last line, whose release never happened. Anything else that does not check is damage.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from splitfed.errors import LedgerError
from splitfed.privacy.mechanisms import RELATION, UNIT
from splitfed.privacy.spending import Charge

_CHECK_DIGITS: Final = 32
_CHECK_KEY: Final = b',"check":"'
_CHECK_BYTES: Final = len(_CHECK_KEY) + _CHECK_DIGITS + len(b'"}')


class Header(BaseModel):
    """The first line: what the ledger counts, and under which salt its records are named."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    splitfed_ledger: Literal[1] = 1
    unit: Literal["sequence"] = UNIT
    relation: Literal["replace-one"] = RELATION
    salt_sha256: str


class Row(Charge):
    """One charge in its place."""

    row: int
    """From 1."""
    time_s: float
    """When it was written, in seconds since 1970."""


@dataclass
class LedgerContents:
    """What a ledger's file says.

    Attributes:
        header: The first line; None while the file is empty, or torn in the first line.
        rows: The charges.
        check: Checksum of the last whole line.
        whole_bytes: Length of all whole lines.
        torn_bytes: Length of what follows: the beginning of a line whose release never happened.
        ends_in_newline: False if the last whole line lacks its newline.
    """

    header: Header | None = None
    rows: list[Row] = field(default_factory=list)
    check: str = ""
    whole_bytes: int = 0
    torn_bytes: int = 0
    ends_in_newline: bool = True


def encode_line(entry: Header | Row, previous_check: str) -> tuple[bytes, str]:
    """Give an entry's line, newline included, and its checksum."""
    body = entry.model_dump_json().encode()
    check = _checksum(previous_check, body)
    return body[:-1] + _CHECK_KEY + check.encode() + b'"}\n', check


def parse_ledger(content: bytes, path: Path) -> LedgerContents:
    """Read a ledger's bytes.

    Args:
        content: The whole file.
        path: Its name, for messages.

    Raises:
        LedgerError: If a line other than an unfinished last one does not check.

    Guarantees:
        * The file of any number of whole lines, cut at any byte, gives all lines before the cut; a last line that lacks
          only its newline counts.
        * A changed, missing, repeated or swapped line is refused, and so is a changed byte.
    """
    contents = LedgerContents()
    for number, line in enumerate(_lines(content), start=1):
        try:
            _append(contents, line)
        except ValueError as error:
            if _is_unfinished(line):
                contents.torn_bytes = len(line)
                break
            or_no_ledger = ", or the file is no privacy ledger" if number == 1 else ""
            raise LedgerError(
                f"Line {number} of the ledger {path} is damaged{or_no_ledger}, so what was spent is not known; restore "
                "the file from a backup, or move it and its salt away and accept that what was spent is forgotten."
            ) from error
    return contents


def _lines(content: bytes) -> Iterator[bytes]:
    """Cut at newlines and keep them; the last line may lack one."""
    start = 0
    while start < len(content):
        end = content.find(b"\n", start) + 1 or len(content)
        yield content[start:end]
        start = end


def _is_unfinished(line: bytes) -> bool:
    """Tell the beginning of a line, which a crash leaves, from a whole line that was damaged."""
    start_of_check = line.find(_CHECK_KEY)
    return not line.endswith(b"\n") and (start_of_check < 0 or len(line) - start_of_check < _CHECK_BYTES)


def _append(contents: LedgerContents, line: bytes) -> None:
    """Check a line and add it."""
    text = line.removesuffix(b"\n")
    body, check = text[:-_CHECK_BYTES] + b"}", text[-_CHECK_DIGITS - 2 : -2].decode()
    if text != body[:-1] + _CHECK_KEY + check.encode() + b'"}' or check != _checksum(contents.check, body):
        raise ValueError("checksum")
    try:
        if contents.header is None:
            contents.header = Header.model_validate_json(body)
        else:
            row = Row.model_validate_json(body)
            if row.row != len(contents.rows) + 1:
                raise ValueError("row number")
            contents.rows.append(row)
    except ValidationError as error:
        raise ValueError("fields") from error
    contents.check = check
    contents.whole_bytes += len(line)
    contents.ends_in_newline = line.endswith(b"\n")


def _checksum(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:_CHECK_DIGITS]
