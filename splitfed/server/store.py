"""What survives a restart: a run directory, written so that a crash at any instant leaves a whole round."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitfed.config import ServerConfig, to_toml
from splitfed.errors import RunDirectoryError

_IDENTITY = "run.json"
_METRICS = "metrics.jsonl"
_ADDRESS = "address"
_CONFIG = "run.toml"
_LOCK = "lock"
_BASE = "base.json"
_OURS = (_IDENTITY, _METRICS, _ADDRESS, _CONFIG, _BASE, "checkpoints", "adapters", "adapter", "report.html")
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class RunState:
    """The server's state at the end of a round.

    Attributes:
        round: The round that is over; 0 before the first.
        trunk: Trunk adapter, by whole-model name.
        ends: Adapters of bottom and top, by whole-model name.
        optimisers: Optimiser state of each client's trunk adapter, by client.
        weights: Weight of each member in every mean.
        agent_ids: Which agent each name belongs to, hexadecimal.
        aggregator: What the aggregation rule keeps from round to round.
        counted: The round of each member's last update that was counted.
    """

    round: int
    trunk: dict[str, Tensor]
    ends: dict[str, Tensor]
    optimisers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    agent_ids: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    aggregator: dict[str, Tensor] = field(default_factory=dict)


class RunStore:
    """One run's directory.

    Args:
        directory: Where it is, or will be.
        identity: What makes two runs the same: everything in the configuration that changes the numbers.
        resume: Go on with the run that is there.
        overwrite: Remove the run that is there.

    Raises:
        RunDirectoryError: If another server uses the directory, or it holds finished rounds and neither was asked for,
            or it holds another run than the one to resume.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, object], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.directory = directory
        file = directory / _IDENTITY
        if directory.exists() and not directory.is_dir():
            raise RunDirectoryError(f"{directory} is a file; give a directory for the run.")
        if not file.exists() and not overwrite and _holds_something(directory):
            raise RunDirectoryError(f"{directory} is not empty and holds no run; give an empty or a new directory.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / _LOCK).open("w")
        except OSError as error:
            raise RunDirectoryError(
                f"[run] directory {directory} cannot be written to ({error.strerror}); give another one."
            ) from error
        try:
            self._take_over(file, identity, resume, overwrite)
        except RunDirectoryError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the directory."""
        self._lock.close()

    def load(self) -> RunState | None:
        """Load the last whole round; None before the first.

        Raises:
            RunDirectoryError: If the checkpoint is damaged.
        """
        folders = self._checkpoints()
        if not folders:
            return None
        folder = folders[-1]
        try:
            facts = json.loads((folder / "state.json").read_text())
            optimisers: dict[str, dict[str, Tensor]] = {client: {} for client in facts["weights"]}
            for name, tensor in load_file(folder / "optimisers.safetensors").items():
                owner, key = name.split("/", 1)
                optimisers.setdefault(owner, {})[key] = tensor
            return RunState(
                round=facts["round"],
                trunk=load_file(folder / "trunk.safetensors"),
                ends=load_file(folder / "ends.safetensors"),
                optimisers=optimisers,
                weights=facts["weights"],
                agent_ids=facts["agent_ids"],
                aggregator=load_file(folder / "aggregator.safetensors"),
                counted=facts.get("counted", dict.fromkeys(facts["weights"], facts["round"])),
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunDirectoryError(
                f"The checkpoint {folder} is damaged ({error}); remove it to go on from the one before."
            ) from error

    def save(self, state: RunState) -> None:
        """Write a round's end: all of it, or nothing."""
        folder = self.directory / "checkpoints" / f"round-{state.round:04d}"
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(state.trunk, draft / "trunk.safetensors")
        save_file(state.ends, draft / "ends.safetensors")
        save_file(state.aggregator, draft / "aggregator.safetensors")
        save_file(
            {
                f"{client}/{key}": tensor
                for client, optimiser in state.optimisers.items()
                for key, tensor in optimiser.items()
            },
            draft / "optimisers.safetensors",
        )
        facts = {
            "round": state.round,
            "weights": state.weights,
            "agent_ids": state.agent_ids,
            "counted": state.counted,
        }
        (draft / "state.json").write_text(json.dumps(facts))
        for file in draft.iterdir():
            _sync(file)
        _sync(draft)
        draft.rename(folder)
        _sync(folder.parent)
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def adapter_folder(self, round: int) -> Path:
        """Give the folder of a round's exported adapter."""
        return self.directory / "adapters" / f"round-{round:04d}"

    @property
    def final_adapter(self) -> Path:
        """The folder of the last exported adapter."""
        return self.directory / "adapter"

    def write_address(self, address: str) -> None:
        """Say where the server listens, for whoever started it with port 0."""
        _write_durably(self.directory / _ADDRESS, address + "\n")

    def write_config(self, config: ServerConfig) -> None:
        """Keep the configuration beside what came of it."""
        _write_durably(self.directory / _CONFIG, to_toml(config))

    def write_base(self, tensors: Mapping[str, str]) -> None:
        """Keep hashes of the base model's tensors, as far as known, so that its adapter is put on no other model."""
        _write_durably(self.directory / _BASE, json.dumps(tensors, indent=1, sort_keys=True))

    def publish(self, round: int) -> None:
        """Make a round's exported adapter the run's."""
        draft = self.directory / ".adapter"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(self.adapter_folder(round), draft)
        shutil.rmtree(self.final_adapter, ignore_errors=True)
        draft.rename(self.final_adapter)

    def write_metrics(self, line: Mapping[str, object]) -> None:
        """Write a round's line, in place of any that an interrupted try left for this round or a later one."""
        file = self.directory / _METRICS
        kept = []
        if file.exists():
            for text in file.read_text().splitlines():
                try:
                    is_earlier = json.loads(text)["round"] < line["round"]
                except (ValueError, KeyError):
                    continue
                if is_earlier:
                    kept.append(text)
        _write_durably(file, "\n".join([*kept, json.dumps(line)]) + "\n")

    def _checkpoints(self) -> list[Path]:
        return sorted((self.directory / "checkpoints").glob("round-*"))

    def _take_over(self, file: Path, identity: Mapping[str, object], resume: bool, overwrite: bool) -> None:
        """Make sure that this process alone uses the directory, and that what is in it is meant to be used."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirectoryError(
                f"Another server is at work in {self.directory}; end it, or give this one another directory."
            ) from error
        if overwrite:
            self._remove_ours()
        if file.exists():
            self._check(file, identity, resume)
        else:
            _write_identity(file, identity)

    def _check(self, file: Path, identity: Mapping[str, object], resume: bool) -> None:
        """Refuse another run, and without `resume` this one too; one without a finished round is simply replaced."""
        try:
            there = json.loads(file.read_text())
        except ValueError as error:
            raise RunDirectoryError(f"{file} is damaged; use --overwrite or another directory.") from error
        difference = _first_difference(there, identity)
        if not self._checkpoints():
            _write_identity(file, identity)
        elif difference is not None:
            raise RunDirectoryError(
                f"{self.directory} holds another run: {difference}; correct the configuration, or use --overwrite or "
                "another directory."
            )
        elif not resume:
            raise RunDirectoryError(
                f"{self.directory} already holds the run {there.get('name')!r}; use --resume to go on with it, "
                "--overwrite to remove it, or another directory."
            )

    def _remove_ours(self) -> None:
        for name in _OURS:
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> str | None:
    """Name the first key on which two identities differ, with both values; None if there is none."""
    for key in sorted({*there, *here}):
        one, other = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = _first_difference(one, other, f"{prefix}{key}.")
            if inner is not None:
                return inner
        elif one != other:
            return f"{prefix}{key} is {one!r} there and {other!r} in the configuration"
    return None


def _write_identity(file: Path, identity: Mapping[str, object]) -> None:
    _write_durably(file, json.dumps(identity, indent=1, sort_keys=True))


def _holds_something(directory: Path) -> bool:
    return directory.exists() and any(entry.name != _LOCK for entry in directory.iterdir())


def _write_durably(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(text)
    _sync(draft)
    draft.rename(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
