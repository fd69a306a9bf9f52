"""A ledger that was restored from an older copy is noticed by what another place on the device remembers."""

import logging
import shutil

import pytest

from splitfed.errors import LedgerError
from splitfed.privacy import Ledger, witness_folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.jsonl"


@pytest.fixture
def witnesses(tmp_path):
    return tmp_path / "elsewhere"


def spend(path, witnesses, releases=1, *, run="r"):
    with Ledger(path, witnesses=witnesses) as ledger:
        for step in range(releases):
            fields = {"records": ["a"], "sequences": 1, "run": run, "round": 1, "step": step}
            ledger.charge("smashed", noise_multiplier=1.0, **fields)


def test_a_ledger_that_only_grows_is_opened_again_and_again(path, witnesses):
    for _ in range(3):
        spend(path, witnesses, 2)
    spend(path, witnesses, 0)


def test_an_older_copy_is_refused_until_its_owner_removes_the_witness(path, witnesses, tmp_path):
    spend(path, witnesses, 2)
    shutil.copytree(path.parent, tmp_path / "backup")
    spend(path, witnesses, 3)
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "backup", path.parent)
    for _ in range(2):  # a refusal does not forget
        with pytest.raises(
            LedgerError, match="has 2 rows, but this device has written 5 to it, so it is an older copy"
        ):
            spend(path, witnesses)
    (witness,) = witnesses.iterdir()
    witness.unlink()
    spend(path, witnesses)


def test_a_file_that_lost_its_end_is_refused_as_it_is(path, witnesses):
    """A crash leaves the beginning of a line that was never noted; this one was."""
    spend(path, witnesses, 2)
    torn = path.read_bytes()[:-10]
    path.write_bytes(torn)
    with pytest.raises(LedgerError, match="has 1 rows, but this device has written 2"):
        spend(path, witnesses)
    assert path.read_bytes() == torn


def test_an_older_copy_that_was_written_to_elsewhere_is_refused_too(path, witnesses, tmp_path):
    spend(path, witnesses, 2)
    shutil.copytree(path.parent, tmp_path / "clone")
    spend(path, witnesses, 1)
    spend(tmp_path / "clone" / "ledger.jsonl", None, 1, run="another")
    with pytest.raises(LedgerError, match="older copy"):
        spend(tmp_path / "clone" / "ledger.jsonl", witnesses)


def test_an_unfinished_line_is_no_older_copy(path, witnesses):
    """A crash may leave the beginning of a line, whose row was never noted."""
    spend(path, witnesses, 2)
    with path.open("ab") as file:
        file.write(b'{"channel":"smas')
    spend(path, witnesses)


def test_a_state_directory_may_move(path, witnesses, tmp_path):
    spend(path, witnesses, 2)
    path.parent.rename(tmp_path / "moved")
    spend(tmp_path / "moved" / "ledger.jsonl", witnesses)


def test_a_fresh_ledger_in_place_of_an_old_one_is_another_ledger(path, witnesses):
    spend(path, witnesses, 2)
    shutil.rmtree(path.parent)
    spend(path, witnesses)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"twelve abc", b"5"])
def test_a_damaged_witness_refuses_nothing(path, witnesses, content):
    spend(path, witnesses, 2)
    (witness,) = witnesses.iterdir()
    witness.write_bytes(content)
    spend(path, witnesses)


def test_a_place_that_cannot_be_written_is_said_once_and_stops_nothing(path, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        spend(path, tmp_path / "file" / "folder", 3)
    assert len([record for record in caplog.records if "no witness can be kept" in record.message]) == 1


def test_witnesses_are_where_the_system_keeps_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert witness_folder() == tmp_path / "splitfed" / "ledgers"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert witness_folder() == tmp_path / ".local" / "state" / "splitfed" / "ledgers"
