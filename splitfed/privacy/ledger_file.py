"""A ledger's file: held by one process, which mends it after a crash and appends to it; read by any."""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from splitfed.errors import LedgerError
from splitfed.privacy.ledger_rows import Header, LedgerContents, Row, encode_line, parse_ledger
from splitfed.privacy.salt import create_salt, load_salt, sync_directory
from splitfed.privacy.spending import Charge
from splitfed.privacy.witness import Witness

_log = logging.getLogger(__name__)


class LedgerFile:
    """Holds a ledger's file and its salt.

    Args:
        path: The file; made if it is not there. Its salt is beside it, with the ending ``.salt``.
        clock: Seconds since 1970, for the rows.
        witnesses: Folder that knows how far ledgers have come; None = an older copy goes unnoticed.

    Attributes:
        salt: The secret under which records are named.

    Raises:
        LedgerError: If the file cannot be opened, is held by another process, is damaged, or its salt is not the right
            one.

    Guarantees:
        * When ``append`` returns, its rows are on disk.
        * A second process, or a second object in this one, is refused until ``close``.
        * File and salt are readable by their owner alone.
        * With witnesses, a file that holds less than this device has written to it is refused.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, witnesses: Path | None = None) -> None:
        self.path = path
        self._clock = clock
        self._witness: Witness | None = None
        try:
            self._descriptor: int | None = _open_locked(path)
        except OSError as error:
            raise LedgerError(
                f"The ledger {path} cannot be opened ({error.strerror}); give this user the right to read and write "
                "it, or name another state directory."
            ) from error
        try:
            contents, self.salt = self._open(witnesses)
        except OSError as error:
            self.close()
            raise LedgerError(
                f"The ledger {path} cannot be read or mended ({error.strerror}); mend that, or make room, and start "
                "the agent again."
            ) from error
        except LedgerError:
            self.close()
            raise
        self._check = contents.check
        self._rows = len(contents.rows)
        self._old_rows = contents.rows

    def take_rows(self) -> list[Row]:
        """Hand over the rows that the file held when it was opened; once, so that they need not stay in memory."""
        rows, self._old_rows = self._old_rows, []
        return rows

    def append(self, charges: Iterable[Charge]) -> None:
        """Put a row for each charge on disk.

        Raises:
            LedgerError: If that fails; the file is closed then, because only reading it again tells what it holds.
        """
        if self._descriptor is None:
            raise LedgerError(f"The ledger {self.path} is closed, so this release was not made; start the agent again.")
        lines, check, now_s = [], self._check, round(self._clock(), 3)
        for number, charge in enumerate(charges, start=self._rows + 1):
            line, check = encode_line(Row(**dict(charge), row=number, time_s=now_s), check)
            lines.append(line)
        try:
            _write(self._descriptor, b"".join(lines))
        except OSError as error:
            self.close()
            raise LedgerError(
                f"The ledger {self.path} cannot be written ({error.strerror}), so this release was not made; "
                "mend that and start the agent again."
            ) from error
        self._check, self._rows = check, self._rows + len(lines)
        if self._witness is not None:
            self._witness.note(self._rows, self._check)

    def close(self) -> None:
        """Let another process have the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if self._witness is not None:
            self._witness.close()

    def _open(self, witnesses: Path | None) -> tuple[LedgerContents, bytes]:
        """Read the file, compare it with its witness, then mend its end; begin it where it is empty."""
        assert self._descriptor is not None
        contents = parse_ledger(_read(self._descriptor), self.path)
        if witnesses is not None and contents.header is not None:
            self._witness = Witness(witnesses, contents.header.salt_sha256)
            self._witness.compare(self.path, len(contents.rows), contents.check)
        salt_path = self.path.with_suffix(".salt")
        if contents.torn_bytes:
            _log.warning("the ledger %s ends in an unfinished line, which charged nothing; it is cut off", self.path)
            os.ftruncate(self._descriptor, contents.whole_bytes)
        if contents.header is None:
            salt = create_salt(salt_path)
            line, contents.check = encode_line(Header(salt_sha256=_digest(salt)), "")
            _write(self._descriptor, line)
            sync_directory(self.path.parent)
            if witnesses is not None:
                self._witness = Witness(witnesses, _digest(salt))
                self._witness.compare(self.path, 0, contents.check)
            return contents, salt
        salt = load_salt(salt_path)
        if _digest(salt) != contents.header.salt_sha256:
            raise LedgerError(
                f"The salt {salt_path} is not that of the ledger {self.path}; restore the two from one backup."
            )
        if not contents.ends_in_newline:
            _write(self._descriptor, b"\n")
        if self._witness is not None:
            self._witness.note(len(contents.rows), contents.check)
        return contents, salt


def read_ledger(path: Path) -> LedgerContents:
    """Read a ledger's file, which another process may be writing to; nothing is changed or locked.

    Raises:
        LedgerError: If there is no ledger, or a line of it does not check.
    """
    try:
        contents = parse_ledger(path.read_bytes(), path)
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be read ({error.strerror}); give the ledger.jsonl of an agent's state "
            "directory, as a user who may read it."
        ) from error
    if contents.header is None:
        raise LedgerError(f"{path} is not a privacy ledger; give the ledger.jsonl of an agent's state directory.")
    return contents


def _open_locked(path: Path) -> int:
    """Open a ledger's file for this process alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o600)
    except BlockingIOError as error:
        os.close(descriptor)
        raise LedgerError(
            f"The ledger {path} is held by another agent; stop it, or give this one a state directory of its own."
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def _write(descriptor: int, block: bytes) -> None:
    """Append bytes and wait until they are on disk."""
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _digest(salt: bytes) -> str:
    return hashlib.sha256(salt).hexdigest()
