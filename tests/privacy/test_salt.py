"""Records have names that need the device's secret."""

import hashlib
import hmac
import os
import stat

import pytest

from splitfed.errors import LedgerError
from splitfed.privacy import record_hash
from splitfed.privacy.salt import create_salt, load_salt


def test_a_record_is_named_by_the_hmac_of_its_content():
    expected = hmac.new(b"k" * 32, b"content", hashlib.sha256).hexdigest()[:32]
    assert record_hash(b"k" * 32, b"content") == expected


def test_another_salt_or_content_gives_another_name():
    names = {record_hash(salt, content) for salt in (b"a" * 32, b"b" * 32) for content in (b"", b"x", b"y")}
    assert len(names) == 6


def test_a_salt_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    previous = os.umask(0)
    try:
        salt = create_salt(tmp_path / "a.salt")
    finally:
        os.umask(previous)
    assert create_salt(tmp_path / "a.salt") == load_salt(tmp_path / "a.salt") == salt
    assert stat.S_IMODE((tmp_path / "a.salt").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a.salt"]


def test_two_devices_have_different_salts(tmp_path):
    assert create_salt(tmp_path / "a.salt") != create_salt(tmp_path / "b.salt")


def test_a_salt_left_unfinished_by_a_crash_is_replaced(tmp_path):
    (tmp_path / "a.salt.new").write_bytes(b"half")
    (tmp_path / "a.salt").write_bytes(b"")
    assert len(create_salt(tmp_path / "a.salt")) == 32


def test_a_missing_salt_and_one_of_another_length_are_refused(tmp_path):
    with pytest.raises(LedgerError, match=r"The salt .*a\.salt is missing"):
        load_salt(tmp_path / "a.salt")
    (tmp_path / "a.salt").write_bytes(b"short")
    with pytest.raises(LedgerError, match="has 5 bytes and not 32"):
        load_salt(tmp_path / "a.salt")
