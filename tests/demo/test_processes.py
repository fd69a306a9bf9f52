"""The demonstration's daemons: whoever fails is named, and nothing outlives the demonstration."""

import subprocess
import sys
from pathlib import Path

import pytest

from splitfed.demo import processes
from splitfed.demo.processes import DaemonFailed, Daemons
from tests.service.local import wait_until


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a daemon's arguments as a command of their own instead of `python -m splitfed`."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))


def ended(daemons: Daemons, name: str) -> subprocess.Popen[bytes]:
    """Wait for a daemon's end."""
    process = daemons._running[name]
    process.wait(30)
    return process


def test_a_daemon_that_fails_is_named_with_the_last_line_of_its_log(tmp_path: Path, shell: None) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        daemons.start("server", "sh", "-c", "echo a line; echo the reason >&2; echo; exit 3")
        daemons.start("phone", "sleep", "60")
        ended(daemons, "server")
        with pytest.raises(DaemonFailed, match=r"^The server ended with status 3: the reason$"):
            daemons.are_running()


def test_a_daemon_that_fails_without_a_word_is_named_too(tmp_path: Path, shell: None) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        daemons.start("phone", "false")
        ended(daemons, "phone")
        with pytest.raises(DaemonFailed, match="The phone ended with status 1: it printed nothing"):
            daemons.are_running()


def test_a_daemon_that_was_killed_is_named(tmp_path: Path, shell: None) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        daemons.start("phone", "sh", "-c", "echo on my way; kill -9 $$")
        ended(daemons, "phone")
        with pytest.raises(DaemonFailed, match="The phone ended with status -9: on my way"):
            daemons.are_running()


def test_they_run_until_the_last_has_ended_well(tmp_path: Path, shell: None) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        daemons.start("server", "true")
        daemons.start("phone", "sh", "-c", f"while [ ! -e {tmp_path}/enough ]; do sleep 0.01; done")
        ended(daemons, "server")
        assert daemons.are_running()
        (tmp_path / "enough").touch()
        ended(daemons, "phone")
        assert not daemons.are_running()


def test_all_are_ended_whatever_happens(tmp_path: Path, shell: None) -> None:
    daemons = Daemons(tmp_path / "logs")

    def demonstrate() -> None:
        with daemons:
            for name in ("server", "clinic", "phone"):
                daemons.start(name, "sleep", "60")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demonstrate()
    assert [process.returncode for process in daemons._running.values()] == [-15, -15, -15]


def test_one_that_does_not_want_to_end_is_killed(tmp_path: Path, shell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.1)
    daemons = Daemons(tmp_path / "logs")
    with daemons:
        daemons.start("server", "sh", "-c", "trap '' TERM; echo ready; exec sleep 60")
        wait_until(lambda: (tmp_path / "logs" / "server.log").read_text() == "ready\n")
    assert daemons._running["server"].returncode == -9


def test_the_command_line_of_splitfed_is_what_is_started(tmp_path: Path) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        daemons.start("server", "server", "--config", str(tmp_path / "lost.toml"))
        assert ended(daemons, "server").returncode == 2
        with pytest.raises(DaemonFailed, match=r"The server ended with status 2: splitfed: .*lost\.toml"):
            daemons.are_running()
