"""A run directory, opened for use: configuration, the adapter of a whole round, and the base model that it is for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from splitfed.config import ServerConfig, load_server_config
from splitfed.errors import ConfigError, FingerprintMismatch, RunDirectoryError, WeightsError
from splitfed.models import canonical_config, resolve_base, tensor_hashes

_PREFIX: Final = "base_model.model."  # peft's wrapping, as PeftModel saves it
_TENSORS: Final = "adapter_model.safetensors"
_ROUNDS: Final = "round-"


@dataclass(frozen=True)
class RunFolder:
    """A whole round of a run.

    Attributes:
        directory: The run directory.
        config: The run's configuration.
        round: The round, from 1.
    """

    directory: Path
    config: ServerConfig
    round: int

    @property
    def adapter_folder(self) -> Path:
        """The round's adapter, as PEFT writes one."""
        return self.directory / "adapters" / f"{_ROUNDS}{self.round:04d}"

    def adapter(self) -> dict[str, Tensor]:
        """Load the round's adapter, by whole-model key.

        Raises:
            RunDirectoryError: If it is gone, or damaged.
        """
        file = self.adapter_folder / _TENSORS
        try:
            return {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"{file} cannot be read ({error}); choose another round, or start the run's server with --resume."
            ) from error

    def base_folder(self, base: str | None = None) -> Path:
        """Find the base model of this run.

        Args:
            base: A folder, "demo", or a hub id; None = what the run's configuration says.

        Raises:
            WeightsError: If it cannot be found.
            FingerprintMismatch: If it is another model than the run's: by its configuration, or by a tensor that
                agents compared with the server's.
            RunDirectoryError: If what the run says of its base is damaged.
        """
        model = self.config.model
        if base is None:
            try:
                folder = resolve_base(model.base, model.revision)
            except WeightsError as error:
                raise WeightsError(f"{str(error).rstrip('.')}; or give --base the folder where it is now.") from error
        else:
            folder = resolve_base(base, model.revision if base == model.base else None)
        if _said(self.directory / "run.json").get("base", canonical_config(folder)) != canonical_config(folder):
            raise FingerprintMismatch(
                f"The base model in {folder} has another configuration than the one of the run {self.config.run_id}; "
                "give --base the model and revision that the run was made with."
            )
        _compare(self.config.run_id, folder, _said(self.directory / "base.json"))
        return folder


def open_run(directory: Path, *, round: int | None = None) -> RunFolder:
    """Open a run directory at the end of a whole round; a server may be at work in it.

    Args:
        directory: The run directory.
        round: The round, from 1; None = the last whole one.

    Raises:
        RunDirectoryError: If it holds no run, or none with such a round.
        ConfigError: If its configuration cannot be used.
    """
    config = run_config(directory)
    last = last_whole_round(directory)
    if last == 0:
        raise RunDirectoryError(f"{directory} holds no adapter yet; come back once the run's first round is over.")
    if round is not None and not 1 <= round <= last:
        raise ConfigError(f"--round is {round}, but the run in {directory} has whole rounds from 1 to {last}")
    return RunFolder(directory, config, round or last)


def run_config(directory: Path) -> ServerConfig:
    """Read the configuration that a run directory keeps.

    Raises:
        RunDirectoryError: If there is none.
        ConfigError: If it cannot be used.
    """
    file = directory / "run.toml"
    if not file.is_file():
        raise RunDirectoryError(f"{directory} holds no run (there is no run.toml); give the directory of one.")
    return load_server_config(file)


def last_whole_round(directory: Path) -> int:
    """Give the last round that was written to its end; 0 before the first."""
    rounds = [folder.name.removeprefix(_ROUNDS) for folder in (directory / "checkpoints").glob(f"{_ROUNDS}*")]
    return max((int(number) for number in rounds if number.isdecimal()), default=0)


def _compare(run: str, folder: Path, tensors: dict[str, str]) -> None:
    """Refuse a checkpoint in which a tensor is not the one that the run was made with."""
    there = tensor_hashes(folder, tensors)
    for name in sorted(tensors):
        if there[name].sha256 != tensors[name]:
            raise FingerprintMismatch(
                f"The base model in {folder} differs in the tensor {name!r} from the one of the run {run}; give --base "
                "the model and revision that the run was made with."
            )


def _said(file: Path) -> dict[str, str]:
    """Read what a server left about its base model; an earlier one has left less."""
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_bytes())
        if isinstance(said, dict):
            return said
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} is damaged ({error}); restore it from a copy of the run.") from error
    raise RunDirectoryError(f"{file} is damaged; restore it from a copy of the run.")
