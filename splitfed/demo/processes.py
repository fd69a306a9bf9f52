"""The daemons as processes of their own: started, watched, and ended whatever happens."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from splitfed.errors import SplitFedError

_GRACE_S = 15.0


class DaemonFailed(SplitFedError):
    """A daemon of the demonstration ended before its time."""


@dataclass
class Daemons:
    """Processes that end with this object.

    Attributes:
        logs: Folder for what they print.
    """

    logs: Path
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Daemons":
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process in self._running.values():
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, *arguments: str) -> None:
        """Start `splitfed` with these arguments."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "splitfed", *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def are_running(self) -> bool:
        """Say whether any of them still runs.

        Raises:
            DaemonFailed: If one ended with a failure; the sentence holds the last line of its log.
        """
        for name, process in self._running.items():
            if process.poll():
                lines = (self.logs / f"{name}.log").read_text(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
                raise DaemonFailed(f"The {name} ended with status {process.returncode}: {last.strip()}")
        return any(process.poll() is None for process in self._running.values())
