"""What an agent keeps on its device between rounds and restarts."""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitfed.errors import ConfigError

_AGENT_ID_BYTES = 16
_SNAPSHOT = re.compile(r"after-round-(\d+)\.safetensors")


class AgentState:
    """An agent's state directory, used by one process at a time.

    Args:
        directory: Where it is, or will be.

    Raises:
        ConfigError: If another process uses it, or it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (directory / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"[agent] state_directory {directory} cannot be used ({error.strerror}).") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"Another agent uses [agent] state_directory {directory}; end it, or give this one another directory."
            ) from error
        self.agent_id = self._own_id()

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

    def keep_optimiser(self, run_id: str, round: int, state: Mapping[str, Tensor], *, start: int | None = None) -> None:
        """Keep the optimiser's state at a round's end, and the round's beginning, which may be needed once more.

        Args:
            run_id: The run.
            round: The round that is over.
            state: The optimiser's state.
            start: The round whose end this one started from; None: the one before it.
        """
        first_needed = round - 1 if start is None else start
        folder = self._folder(run_id)
        folder.mkdir(parents=True, exist_ok=True)
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
        """Write a round's line, in place of any that an interrupted try left for it or a later one."""
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
        draft = file.with_name(".metrics.jsonl")
        draft.write_text("\n".join([*kept, json.dumps({"run": run_id, **line})]) + "\n")
        draft.rename(file)

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
        draft = file.with_name(".agent-id")
        draft.write_text(own_id.hex())
        draft.rename(file)
        return own_id
