"""A ledger is never short of what has left, whatever happens to the process."""

import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitfed.errors import BudgetExhausted, LedgerError, PrivacyError
from splitfed.privacy import Charge, Ledger, epsilon, read_ledger

DELTA = 1e-5


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.jsonl"


@pytest.fixture
def fast_disk(monkeypatch):
    """No waiting for the disk, where a test writes thousands of times."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def charge(ledger, records=("a", "b"), *, channel="smashed", z=2.0, step=0, kind="train", **mechanism):
    fields = {"noise_multiplier": z, "records": records, "sequences": len(records), "round": 1, "step": step}
    ledger.charge(channel, **{"run": "r", **fields, "kind": kind, **mechanism})


def test_a_new_ledger_has_spent_nothing(path):
    with Ledger(path) as ledger:
        assert ledger.spent("smashed") == ledger.spent("output_gradient") == ledger.spent(None) == 0
        assert ledger.total_statement() == "epsilon 0 at delta 1e-05, unit sequence, relation replace-one"


def test_charges_add_up_over_restarts_and_runs(path):
    for run in range(3):
        with Ledger(path) as ledger:
            for step in range(4):
                charge(ledger, step=step)
            assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 8 * (run + 1))], DELTA)
            assert ledger.spent("output_gradient", DELTA) == 0


def test_evaluation_is_charged_like_training(path):
    with Ledger(path) as ledger:
        charge(ledger, kind="evaluate")
        charge(ledger, kind="generate")
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 4)], DELTA)


def test_coupled_releases_count_for_every_record_and_others_for_their_own(path):
    with Ledger(path) as ledger:
        charge(ledger, ["a"])
        for record in "bcbb":
            charge(ledger, [record], coupled=False)
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 1 + 3)], DELTA)
    with Ledger(path) as ledger:
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 1 + 3)], DELTA)


def test_a_release_without_noise_is_remembered_for_good(path):
    with Ledger(path) as ledger:
        charge(ledger, z=0)
    with Ledger(path) as ledger:
        charge(ledger, z=50.0)
        assert ledger.spent("smashed") is None
        assert ledger.total_statement() == "none: the smashed data is not protected"


@pytest.mark.parametrize("update", [{"z": 0.0}, {"z": 1.0, "unit": "client"}], ids=["raw", "noised as a whole"])
def test_a_run_that_trained_on_raw_records_couples_all_that_it_releases_later(path, update):
    """Adapters and optimiser carry what they learned into the next rounds, whatever protects those."""
    with Ledger(path) as ledger:
        charge(ledger, [], channel="adapter", sequences=1, **update)
    with Ledger(path) as ledger:
        for record in "ab":
            charge(ledger, [record], coupled=False)
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 2)], DELTA)
        for record in "ab":
            charge(ledger, [record], coupled=False, run="another")
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 3)], DELTA)
        step = {"channel": "step", "sample_rate": 0.1, "channels": {"smashed": 2.0}, "coupled": False}
        before = path.read_bytes()
        with pytest.raises(PrivacyError, match="leave sample_rate out"):
            charge(ledger, [], sequences=1, **step)
        assert path.read_bytes() == before
        charge(ledger, [], sequences=1, run="another", **step)


def test_a_charge_is_on_disk_before_it_returns(path, monkeypatch):
    lines_synced, real_fsync = [], os.fsync

    def fsync(descriptor):
        real_fsync(descriptor)
        lines_synced.append(path.read_bytes().count(b"\n"))

    fields = {"channel": "smashed", "noise_multiplier": 1.0, "records": ("a",), "sequences": 1, "run": "r", "round": 1}
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "fsync", fsync)
        charge(ledger)
        assert lines_synced == [2]
        ledger.charge_all([Charge(step=step, **fields) for step in range(5)])
        assert lines_synced == [2, 7]  # several charges for the price of one


@pytest.mark.parametrize(("reached_bytes", "rows_on_disk"), [(0, 1), (1, 1), (40, 1), (-1, 2), (None, 2)])
def test_a_full_disk_stops_the_release_and_the_ledger(path, monkeypatch, reached_bytes, rows_on_disk):
    real_write = os.write

    def write(descriptor, block):
        if len(block) > 1:
            real_write(descriptor, block[:reached_bytes])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(path) as ledger:
        charge(ledger)
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(LedgerError, match=r"cannot be written \(No space left.*this release was not made"):
            charge(ledger)
        monkeypatch.undo()
        with pytest.raises(LedgerError, match="is closed, so this release was not made"):
            charge(ledger)
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 2)], DELTA)
    with Ledger(path) as ledger:  # what reached the disk counts, although nothing left
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 2 * rows_on_disk)], DELTA)
        charge(ledger)


def test_a_write_that_the_system_cuts_short_is_continued(path, monkeypatch):
    real_write = os.write
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "write", lambda descriptor, block: real_write(descriptor, block[:7]))
        charge(ledger)
        monkeypatch.undo()
        assert len(read_ledger(path).rows) == 1


def test_a_failing_sync_stops_the_release(path, monkeypatch):
    with Ledger(path) as ledger:

        def fail(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(LedgerError, match="this release was not made"):
            charge(ledger)
        with pytest.raises(LedgerError, match="is closed"):
            charge(ledger)


def test_a_file_cut_at_any_byte_opens_counts_whole_rows_and_goes_on(tmp_path, fast_disk):
    source = tmp_path / "source" / "ledger.jsonl"
    sizes = []
    with Ledger(source) as ledger:
        sizes.append(source.stat().st_size)
        for step in range(3):
            charge(ledger, step=step)
            sizes.append(source.stat().st_size)
    content, salt = source.read_bytes(), source.with_suffix(".salt").read_bytes()
    cut_path = tmp_path / "cut" / "ledger.jsonl"
    cut_path.parent.mkdir()
    cut_path.with_suffix(".salt").write_bytes(salt)
    costs = [epsilon([(2.0, 2 * rows)], DELTA) for rows in range(5)]
    for cut in range(len(content) + 1):
        rows = max(sum(size - 1 <= cut for size in sizes) - 1, 0)
        cut_path.write_bytes(content[:cut])
        with Ledger(cut_path) as ledger:
            assert ledger.spent("smashed", DELTA) == costs[rows]
            assert ledger._file.salt == salt
            charge(ledger)
        with Ledger(cut_path) as ledger:
            assert ledger.spent("smashed", DELTA) == costs[rows + 1]


def test_damage_before_the_last_line_is_refused_and_nothing_is_changed(path):
    with Ledger(path) as ledger:
        charge(ledger)
        charge(ledger)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0')
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=r"Line 2 of the ledger .* is damaged.*restore the file from a backup"):
        Ledger(path)
    assert path.read_bytes() == b"".join(lines)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(path)  # refused for the damage again, not because the first one still holds it


def test_a_file_that_is_no_ledger_is_refused(path):
    path.parent.mkdir()
    path.write_text('{"text": "a row of somebody\'s data set"}\n')
    with pytest.raises(LedgerError, match=r"Line 1 .* or the file is no privacy ledger"):
        Ledger(path)


def test_a_second_ledger_on_the_same_file_is_refused_until_the_first_is_closed(path):
    with Ledger(path), pytest.raises(LedgerError, match="is held by another agent"):
        Ledger(path)
    Ledger(path).close()


def test_a_file_held_by_another_process_is_refused(path):
    Ledger(path).close()
    script = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(LedgerError, match="is held by another agent"):
            Ledger(path)
        other.stdin.close()
        other.wait()
    Ledger(path).close()


def test_the_lock_is_one_that_another_process_meets(path):
    with Ledger(path), path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_only_the_owner_can_read_the_ledger_and_its_salt(path):
    path.parent.mkdir()
    path.touch(mode=0o666)
    previous = os.umask(0)
    try:
        Ledger(path).close()
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_record_has_the_same_name_after_a_restart_and_another_on_another_device(path, tmp_path):
    with Ledger(path) as ledger:
        name = ledger.record_hash(b"content")
    with Ledger(path) as ledger:
        assert ledger.record_hash(b"content") == name
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.record_hash(b"content") != name


def test_a_missing_or_foreign_salt_is_refused_because_records_would_not_be_known_again(path):
    Ledger(path).close()
    salt_path = path.with_suffix(".salt")
    salt = salt_path.read_bytes()
    salt_path.write_bytes(bytes(32))
    with pytest.raises(LedgerError, match="is not that of the ledger"):
        Ledger(path)
    salt_path.unlink()
    with pytest.raises(LedgerError, match="is missing"):
        Ledger(path)
    salt_path.write_bytes(salt)
    Ledger(path).close()


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"cannot be opened \((Not a directory|File exists)\); give this user"):
        Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(LedgerError, match=r"cannot be opened \(Is a directory\); give this user"):
        Ledger(tmp_path)


def test_the_budget_stops_before_it_is_passed_and_writes_nothing_then(path):
    budget = epsilon([(2.0, 7)], DELTA)
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=budget)
        for _ in range(3):
            charge(ledger)
        before = path.read_bytes()
        with pytest.raises(BudgetExhausted, match=r"release \(smashed\) would pass the epsilon budget of .* is spent"):
            charge(ledger)
        assert path.read_bytes() == before
        charge(ledger, ["a"])  # the seventh release still fits
        assert ledger.spent("smashed") == pytest.approx(budget)
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=budget)
        with pytest.raises(BudgetExhausted):
            charge(ledger, ["a"])


def test_the_budget_is_of_all_channels_together(path):
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=epsilon([(2.0, 4)], DELTA))
        charge(ledger, channel="smashed")
        charge(ledger, ["a"], channel="output_gradient")
        charge(ledger, ["a"], channel="adapter")
        with pytest.raises(BudgetExhausted, match=r"\(output_gradient\)"):
            charge(ledger, ["a"], channel="output_gradient")


def test_the_budget_of_a_record_is_its_own_where_nothing_is_coupled(path):
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=epsilon([(2.0, 2)], DELTA))
        for record in "abab":
            charge(ledger, [record], coupled=False)
        with pytest.raises(BudgetExhausted):
            charge(ledger, ["b"], coupled=False)
        charge(ledger, ["c"], coupled=False)


@pytest.mark.parametrize("relation", ["replace-one", "zero-out"])
def test_the_budget_is_meant_under_the_policy_s_relation(path, relation):
    """Four releases under zero-out cost what one costs under replace-one."""
    fit = {"replace-one": 1, "zero-out": 4}[relation]
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=epsilon([(2.0, 1)], DELTA) * (1 + 1e-6), relation=relation)
        for _ in range(fit):
            charge(ledger, ["a"], coupled=False)
        with pytest.raises(BudgetExhausted):
            charge(ledger, ["a"], coupled=False)


@pytest.mark.parametrize("channel", ["smashed", "adapter", "loss"])
def test_nothing_without_noise_leaves_under_a_budget(path, channel):
    with Ledger(path) as ledger:
        ledger.set_policy(epsilon_budget=1e9)
        with pytest.raises(BudgetExhausted, match=f"has no noise on the channel {channel}"):
            charge(ledger, channel=channel, z=0.0)
        assert ledger.spent(None) == 0


def test_charges_that_pass_the_budget_together_are_refused_together(path):
    fields = {"noise_multiplier": 2.0, "records": ("a",), "sequences": 1, "run": "r", "round": 1, "step": 0}
    charges = [Charge(channel="smashed", **fields), Charge(channel="output_gradient", **fields)]
    with Ledger(path) as ledger:
        ledger.set_policy(delta=DELTA, epsilon_budget=epsilon([(2.0, 4)], DELTA))
        ledger.check_budget(charges * 2, "The round")
        with pytest.raises(BudgetExhausted, match=r"The round \(output_gradient, smashed\) would pass"):
            ledger.check_budget(charges * 3, "The round")
        with pytest.raises(BudgetExhausted):
            ledger.charge_all(charges * 3)
        assert ledger.spent("smashed") == ledger.spent("output_gradient") == 0
        ledger.charge_all(charges * 2)
        assert ledger.spent("output_gradient") == epsilon([(2.0, 2)], DELTA)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"delta": 0.0}, "delta must be between 0 and 1"),
        ({"delta": float("nan")}, "delta must be between 0 and 1"),
        ({"epsilon_budget": 0.0}, "budget must be above 0"),
        ({"epsilon_budget": float("nan")}, "budget must be above 0"),
        ({"relation": "add-one"}, "relation is one of replace-one, zero-out, not 'add-one'"),
    ],
)
def test_a_policy_out_of_range_is_refused(path, policy, message):
    with Ledger(path) as ledger, pytest.raises(ValueError, match=message):
        ledger.set_policy(**policy)


def test_a_charge_with_a_wrong_argument_writes_nothing(path):
    with Ledger(path) as ledger:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="channel"):
            charge(ledger, channel="weights")
        with pytest.raises(ValueError, match="noise_multiplier"):
            charge(ledger, z=-1.0)
        assert path.read_bytes() == before


def test_charges_from_several_threads_are_all_counted(path, fast_disk):
    with Ledger(path) as ledger, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: charge(ledger, step=step), range(200)))
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, 400)], DELTA)
    assert sorted(row.step for row in read_ledger(path).rows) == list(range(200))


def test_reading_needs_no_lock_and_changes_nothing(path):
    with Ledger(path, clock=lambda: 1234.5678) as ledger:
        charge(ledger)
        with path.open("ab") as file:
            file.write(b'{"chan')  # as if another row were just being written
        before = path.read_bytes()
        contents = read_ledger(path)
        assert [(row.row, row.time_s, row.records) for row in contents.rows] == [(1, 1234.568, ("a", "b"))]
        assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b'{"spl'])
def test_reading_what_is_no_ledger_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "ledger.jsonl").write_bytes(content)
    with pytest.raises(LedgerError, match=r"cannot be read \(No such file or directory\)|is not a privacy ledger"):
        read_ledger(tmp_path / "ledger.jsonl")


KILLED = """
import os, sys
from pathlib import Path
from splitfed.privacy import Ledger

for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    ledger = Ledger(Path(sys.argv[1]))
    os.write(1, f"{os.getpid()}\\n".encode())
    while True:
        ledger.charge("smashed", noise_multiplier=2.0, records=["a"], sequences=1, run="r", round=1, step=0)
        os.write(1, b"sent\\n")
"""


def test_a_process_killed_at_any_instant_has_charged_all_that_it_sent(path):
    lives, sent = 12, 0
    chance = random.Random(0)
    command = [sys.executable, "-c", KILLED, str(path), str(lives)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(lives):
            child = int(process.stdout.readline())
            for _ in range(chance.randrange(30)):
                assert process.stdout.readline() == b"sent\n"
                sent += 1
            os.kill(child, 9)
            while (line := _peek(process.stdout)) == b"sent\n":
                process.stdout.readline()
                sent += 1
            assert line == b"" or line.strip().isdigit()
    charged = len(read_ledger(path).rows)
    assert sent <= charged <= sent + lives
    with Ledger(path) as ledger:
        assert ledger.spent("smashed", DELTA) == epsilon([(2.0, charged)], DELTA)


def _peek(stream):
    """Read the next line and leave it there; empty at the end."""
    ahead = stream.peek()
    return ahead[: ahead.find(b"\n") + 1]


# Files that cannot be used


def refusing(monkeypatch, *, name, call):
    """Let the operating system refuse one file."""
    real = getattr(*call)

    def refuse(path, *arguments, **named):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(*call, refuse)


def test_a_ledger_that_may_not_be_opened_says_what_to_do(tmp_path, monkeypatch):
    refusing(monkeypatch, name="ledger.jsonl", call=(os, "open"))
    with pytest.raises(LedgerError, match=r"cannot be opened \(Permission denied\); give this user the right to read"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_salt_that_may_not_be_read_is_named_as_the_salt(tmp_path, monkeypatch):
    Ledger(tmp_path / "ledger.jsonl").close()
    refusing(monkeypatch, name="ledger.salt", call=(Path, "read_bytes"))
    with pytest.raises(LedgerError, match=r"The salt .*ledger\.salt cannot be read \(Permission denied\); give"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_charge_that_cannot_be_written_speaks_of_this_release_alone(tmp_path, monkeypatch):
    """Earlier ones have left."""
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        fields = {"noise_multiplier": 1.0, "records": ["a"], "sequences": 1, "run": "r", "round": 1}
        ledger.charge("smashed", step=0, **fields)

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(LedgerError, match=r"so this release was not made; .*start the agent again"):
                ledger.charge("smashed", step=1, **fields)
