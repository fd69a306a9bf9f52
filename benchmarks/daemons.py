"""Real daemons on loopback for the benchmarks: started, waited for, ended whatever happens."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

START_S = 300.0
POLL_S = 0.05


class Daemons:
    """A server and agents as processes, with their files in one folder.

    Args:
        folder: Where configurations, logs and state go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._peaks_bytes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Daemons":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def serve(self, tables: Mapping[str, Mapping[str, Any]]) -> str:
        """Start a server, wait until it listens, give its address."""
        run = {"directory": "run", **tables.get("run", {})}
        server = {"address": "127.0.0.1:0", **tables.get("server", {})}
        self._start("server", {**tables, "run": run, "server": server})
        file = self.folder / "run" / "address"
        self.wait_for(file)
        return file.read_text().strip()

    def wait_for(self, file: Path) -> None:
        """Wait until the server has written a file."""
        deadline_s = time.monotonic() + START_S
        while not file.exists():
            if self._processes["server"].poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the server did not start:\n{self.log('server')}")
            time.sleep(POLL_S)

    def take_part(self, name: str, address: str, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Start an agent."""
        agent = {"name": name, "server": address, "state_directory": name, **tables.get("agent", {})}
        self._start(name, {**tables, "agent": agent}, command="agent")

    def wait(self) -> None:
        """Wait until all have ended, noting each one's peak memory."""
        while running := [name for name, process in self._processes.items() if process.poll() is None]:
            for name in running:
                self._note_peak(name)
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raise with its log if one has failed."""
        for name, process in self._processes.items():
            if process.poll():
                raise RuntimeError(f"{name} failed:\n{self.log(name)}")

    def cpu_s(self) -> float:
        """Add up the CPU time of those that run."""
        running = [process.pid for process in self._processes.values() if process.poll() is None]
        times = [psutil.Process(pid).cpu_times() for pid in running]
        return sum(each.user + each.system for each in times)

    def peak_bytes(self, name: str) -> int:
        """Give the largest resident memory of a process, as the kernel counted it."""
        return self._peaks_bytes[name]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Read an agent's own lines."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def log(self, name: str) -> str:
        """Give what a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, tables: Mapping[str, Mapping[str, Any]], command: str = "server") -> None:
        file = self.folder / f"{name}.toml"
        file.write_text(
            "\n".join(
                f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
                for table, values in tables.items()
            )
        )
        self.start(name, file, command)

    def start(self, name: str, file: Path, command: str) -> None:
        """Start a daemon from a configuration file that is there."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "splitfed", command, "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def _note_peak(self, name: str) -> None:
        try:
            status = Path(f"/proc/{self._processes[name].pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self._peaks_bytes[name] = int(line.split()[1]) * 1024


def machine() -> str:
    """Name the machine: processor, cores, memory."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"
