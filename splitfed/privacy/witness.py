"""A second place on the device that knows how far a ledger has come, so that an older copy of it is noticed."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitfed.errors import LedgerError

_log = logging.getLogger(__name__)

_ROW_DIGITS: Final = 20
_NAME_DIGITS: Final = 32


def witness_folder() -> Path:
    """Give the folder for witnesses, apart from any state directory: a backup then restores one and not the other."""
    base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(base) / "splitfed" / "ledgers"


@dataclass(frozen=True)
class Noted:
    """How far a ledger had come when it was noted last.

    Attributes:
        rows: Its rows.
        check: Checksum of its last line.
    """

    rows: int
    check: str

    def shows_older(self, rows: int, check: str) -> bool:
        """Tell whether a ledger of so many rows lacks some that were noted."""
        return rows < self.rows or (rows == self.rows and check != self.check)


def read_noted(folder: Path) -> dict[str, Noted]:
    """Read what is noted of every ledger, by the beginning of its salt's hash; nothing is made or locked.

    Read it before the ledger: a row is noted after it is on disk.

    Args:
        folder: Where witnesses are kept.
    """
    found = {}
    try:
        for file in folder.iterdir():
            if (noted := _parse(file.read_bytes())) is not None:
                found[file.name] = noted
    except OSError:
        pass  # what cannot be read is not known
    return found


def name_of(salt_sha256: str) -> str:
    """Give the name of a ledger's witness."""
    return salt_sha256[:_NAME_DIGITS]


def _parse(content: bytes) -> Noted | None:
    words = content[:256].decode(errors="replace").split()
    return Noted(int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else None


class Witness:
    """Knows the number of rows and the last checksum of one ledger, by the name of its salt.

    Args:
        folder: Where witnesses are kept.
        salt_sha256: Which ledger: the hash of its salt.

    Guarantees:
        * A ledger that has fewer rows than were noted, or as many and others, is refused.
        * A witness that is missing, or cannot be written, refuses nothing.
        * It is never ahead of the ledger: a row is noted after it is on disk.
    """

    def __init__(self, folder: Path, salt_sha256: str) -> None:
        self.path = folder / name_of(salt_sha256)
        self._descriptor: int | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _log.warning(
                "no witness can be kept in %s (%s): an older copy of the ledger would not be noticed",
                folder,
                error.strerror,
            )

    def compare(self, ledger: Path, rows: int, check: str) -> None:
        """Compare a ledger that was opened with what was noted last.

        Args:
            ledger: Its path, for the message.
            rows: Its rows.
            check: Checksum of its last line.

        Raises:
            LedgerError: If rows are missing that were there before.
        """
        if self._descriptor is None:
            return
        noted = _parse(os.pread(self._descriptor, 256, 0))
        if noted is not None and noted.shows_older(rows, check):
            raise LedgerError(
                f"The ledger {ledger} has {rows} rows, but this device has written {noted.rows} to it, so it is an "
                f"older copy; restore the newest one, or remove {self.path} and accept that what was spent in between "
                "is forgotten."
            )

    def note(self, rows: int, check: str) -> None:
        """Note how far the ledger has come. What fails here is not worth stopping for."""
        if self._descriptor is None:
            return
        try:
            os.pwrite(self._descriptor, f"{rows:0{_ROW_DIGITS}d} {check}\n".encode(), 0)
        except OSError as error:
            _log.warning("the witness %s cannot be written (%s)", self.path, error.strerror)
            self.close()

    def close(self) -> None:
        """Release the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
