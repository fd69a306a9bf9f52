"""The real daemons as processes on loopback, for tests: started, watched, ended whatever happens."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

START_S = 90.0
END_S = 240.0
ONE_THREAD_OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def warm_context() -> ForkServerContext:
    """Give what starts processes that have imported the daemons already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "splitfed.cli.commands",
            "splitfed.agent.main",
            "splitfed.server.main",
            "datasets",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


class Forked:
    """A command of splitfed in a process of its own that was forked from a warm one: signals, files and ends are real.

    Args:
        arguments: The command's.
        log: Where it prints to.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        given = {"target": _command, "args": (list(arguments), str(log), {**os.environ, **ONE_THREAD_OFFLINE})}
        log.touch()
        self._process: ForkServerProcess = warm_context().Process(daemon=True, **given)
        self._process.start()

    def poll(self) -> int | None:
        """Give the exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; gives the exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


def _command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from splitfed.cli import main

    main(arguments)


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Write tables of plain values as TOML."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


@dataclass
class Daemons:
    """A server and its agents in one folder.

    Attributes:
        folder: Where their files are.
        is_warm: Fork them from a process that has imported all they need; else each is `python -m splitfed`.
    """

    folder: Path
    is_warm: bool = True
    processes: dict[str, subprocess.Popen[str] | Forked] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The server's run directory."""
        return self.folder / "run"

    def start_server(self, tables: Mapping[str, Mapping[str, Any]], *options: str) -> str:
        """Start a server and wait until it listens; gives its address."""
        file = self.folder / "server.toml"
        tables = {**tables, "server": {"address": "127.0.0.1:0", "threads": 1, **tables.get("server", {})}}
        file.write_text(toml({**tables, "run": {"directory": "run", **tables.get("run", {})}}))
        (self.run / "address").unlink(missing_ok=True)
        self._start("server", "server", "--config", str(file), *options)
        deadline_s = time.monotonic() + START_S
        while not (self.run / "address").exists():
            assert self.processes["server"].poll() is None, self.log("server")
            assert time.monotonic() < deadline_s, self.log("server")
            time.sleep(0.05)
        return (self.run / "address").read_text().strip()

    def start_agent(self, name: str, address: str, tables: Mapping[str, Mapping[str, Any]], *options: str) -> None:
        """Start an agent; its state directory is its name."""
        file = self.folder / f"{name}.toml"
        own = {"name": name, "server": address, "state_directory": name, "threads": 1, **tables.get("agent", {})}
        file.write_text(toml({**tables, "agent": own}))
        self._start(name, "agent", "--config", str(file), *options)

    def wait(self, name: str, timeout_s: float = END_S) -> int:
        """Wait for a daemon's end; gives its exit status."""
        return self.processes[name].wait(timeout_s)

    def wait_for_all(self) -> None:
        """Wait until all have ended well."""
        for name in self.processes:
            assert self.wait(name) == 0, f"{name}:\n{self.log(name)}"

    def wait_for_log(self, name: str, words: str, timeout_s: float = END_S) -> None:
        """Wait until a daemon has printed some words."""
        deadline_s = time.monotonic() + timeout_s
        while words not in self.log(name):
            assert time.monotonic() < deadline_s, f"{name} never said {words!r}:\n{self.log(name)}"
            assert self.processes[name].poll() is None or words in self.log(name), self.log(name)
            time.sleep(0.02)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; gives the exit status."""
        self.processes[name].send_signal(number)
        return self.processes[name].wait(60)

    def log(self, name: str) -> str:
        """Give what a daemon has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def metrics(self, name: str | None = None) -> list[dict[str, Any]]:
        """Read the lines of the server, or of an agent."""
        file = (self.run if name is None else self.folder / name) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def end(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start(self, name: str, *arguments: str) -> None:
        if self.is_warm:
            self.processes[name] = Forked(arguments, self.folder / f"{name}.log")
            return
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "splitfed", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **ONE_THREAD_OFFLINE},
            )
