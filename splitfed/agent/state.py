"""What an agent keeps on its device between rounds and restarts."""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitfed.errors import ConfigError, StateError

_AGENT_ID_BYTES = 16
PERSONAL: Final = "personal/"
"""What the names of tensors that stay on this device begin with, beside the optimiser's state."""

_SNAPSHOT = re.compile(r"after-round-(\d+)\.safetensors")


class AgentState:
    """An agent's state directory, used by one process at a time.

    Args:
        directory: Where it is, or will be.

    Raises:
        ConfigError: If another process uses it, or it cannot be used.
        StateError: If the agent's id cannot be written to it.

    Guarantees:
        * A directory that is made here, and what is written to it, can be read by their owner alone.
        * What cannot be written leaves what was there before.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: IO[str] = (directory / "lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"[agent] state_directory {directory} cannot be used ({error.strerror}); name a folder that this user "
                "may write to."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"Another agent uses [agent] state_directory {directory}; end it, or give this one another directory."
            ) from error
        try:
            self.agent_id = self._own_id()
        except StateError:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another process use the directory."""
        self._lock.close()

    @property
    def ledger_path(self) -> Path:
        """Where the privacy ledger is; it outlives every run."""
        return self.directory / "ledger.jsonl"

    @property
    def base_cache(self) -> Path:
        """Where segments that came from a server are kept."""
        return self.directory / "base"

    def optimiser_after(self, run_id: str, round: int) -> dict[str, Tensor] | None:
        """Load the optimiser's state at a round's end; empty for the start of a run, None if it is lost."""
        if round == 0:
            return {}
        try:
            return load_file(self._folder(run_id) / f"after-round-{round:04d}.safetensors")
        except (OSError, SafetensorError):
            return None

    def rounds_kept(self, run_id: str) -> list[int]:
        """Name the rounds at whose end the optimiser's state is kept, from the earliest on."""
        found = (_SNAPSHOT.fullmatch(file.name) for file in self._folder(run_id).glob("after-round-*"))
        return sorted(int(match[1]) for match in found if match)

    def keep_optimiser(self, run_id: str, round: int, state: Mapping[str, Tensor], *, start: int | None = None) -> None:
        """Keep the optimiser's state at a round's end, and the round's beginning, which may be needed once more.

        Args:
            run_id: The run.
            round: The round that is over.
            state: The optimiser's state.
            start: The round whose end this one started from; None: the one before it.

        Raises:
            StateError: If that fails.
        """
        first_needed = round - 1 if start is None else start
        folder = self._folder(run_id)
        with self._writing("the optimiser's state"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = folder / ".after-round"
            save_file(dict(state), draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.rename(folder / f"after-round-{round:04d}.safetensors")
            for file_ in folder.iterdir():
                match = _SNAPSHOT.fullmatch(file_.name)
                if match and int(match[1]) < first_needed:
                    file_.unlink()

    def write_metrics(self, run_id: str, line: Mapping[str, object]) -> None:
        """Write a round's line, in place of any that an interrupted try left for it or a later one.

        Raises:
            StateError: If that fails.
        """
        file = self.directory / "metrics.jsonl"
        kept = []
        if file.exists():
            for text in file.read_text(errors="replace").splitlines():
                try:
                    earlier = json.loads(text)
                    is_kept = earlier["run"] != run_id or earlier["round"] < line["round"]
                except (ValueError, KeyError, TypeError):
                    continue  # not a line of ours
                if is_kept:
                    kept.append(text)
        self._replace(file, "\n".join([*kept, json.dumps({"run": run_id, **line})]) + "\n")

    def _folder(self, run_id: str) -> Path:
        return self.directory / "state" / run_id

    def _own_id(self) -> bytes:
        file = self.directory / "agent-id"
        if file.exists():
            try:
                own_id = bytes.fromhex(file.read_text().strip())
            except ValueError:
                own_id = b""
            if len(own_id) == _AGENT_ID_BYTES:
                return own_id
        own_id = secrets.token_bytes(_AGENT_ID_BYTES)
        self._replace(file, own_id.hex())
        return own_id

    def _replace(self, file: Path, text: str) -> None:
        """Write a file as a whole, for its owner alone."""
        draft = file.with_name(f".{file.name}")
        with self._writing(file.name):
            draft.unlink(missing_ok=True)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as opened:
                opened.write(text)
            draft.rename(file)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Say in a sentence what could not be written, and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise StateError(
                f"{self.directory}: {what} cannot be written ({reason}); make room there, or give this user the right "
                "to, and start the agent again."
            ) from error
