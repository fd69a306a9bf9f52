"""Names for records that mean nothing without a secret of the device."""

import hmac
import os
from pathlib import Path
from typing import Final

from splitfed.errors import LedgerError

SALT_BYTES: Final = 32
_HASH_DIGITS: Final = 32


def record_hash(salt: bytes, content: bytes) -> str:
    """Name a record by its content.

    Args:
        salt: The device's secret, from ``load_salt``.
        content: The record, in a form that is the same whenever it is read.

    Returns:
        32 hexadecimal digits of HMAC-SHA256.

    Guarantees:
        * The same content has the same name under one salt, whatever its place in the data set.
        * Without the salt, a name says nothing about the content, and cannot be compared with a guess.
    """
    return hmac.digest(salt, content, "sha256").hex()[:_HASH_DIGITS]


def load_salt(path: Path) -> bytes:
    """Read a salt.

    Raises:
        LedgerError: If there is none at this path, or it is not one.
    """
    try:
        salt = path.read_bytes()
    except FileNotFoundError as error:
        raise LedgerError(
            f"The salt {path} is missing, so the ledger's records cannot be recognised; restore it from a backup, "
            "or move the ledger away and accept that what was spent is forgotten."
        ) from error
    except OSError as error:
        raise LedgerError(
            f"The salt {path} cannot be read ({error.strerror}); give this user the right to, or restore it from "
            "a backup."
        ) from error
    if len(salt) != SALT_BYTES:
        raise LedgerError(f"The salt {path} has {len(salt)} bytes and not {SALT_BYTES}; restore it from a backup.")
    return salt


def create_salt(path: Path) -> bytes:
    """Read the salt at a path, or write a fresh one that only its owner can read; it is on disk when this returns."""
    if path.exists() and path.stat().st_size == SALT_BYTES:
        return load_salt(path)
    salt = os.urandom(SALT_BYTES)
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, salt)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    unfinished.replace(path)
    sync_directory(path.parent)
    return salt


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk, so that a file made in it is there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
