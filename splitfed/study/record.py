"""What a run has left behind: the server's run directory, and the metrics of the agents that opened theirs."""

import fcntl
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from splitfed.config import ServerConfig
from splitfed.errors import DataError

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[FiniteFloat, Field(ge=0)]


class _Line(BaseModel):
    """A line of metrics; keys that this version does not know are skipped, so that an older report reads newer runs."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class AgentShare(_Line):
    """What the server knows of one agent's part in a round. None = the agent did not share it."""

    weight: Count | None = None
    training_loss: FiniteFloat | None = None
    held_out_loss: FiniteFloat | None = None
    tokens: Count | None = None
    bytes_up: Count | None = None
    bytes_down: Count | None = None
    server_seconds: Seconds | None = None
    """Seconds in which the server had a request of the agent in hand."""


class AgentRound(AgentShare):
    """One agent's part in a round, with what only the agent's own file says. None = not shared."""

    epsilon: Mapping[str, float | None] | None = None
    """Epsilon by channel, spent by the end of the round; None or infinite where nothing is guaranteed."""
    total: str | None = None
    delta: float | None = None
    unit: str | None = None
    relation: str | None = None
    seconds: Seconds | None = None
    waiting_seconds: Seconds | None = None
    """Seconds in which the agent waited for answers."""


class Staleness(_Line):
    """How many other steps lay between a step's beginning and its end, where agents step as they come."""

    mean: FiniteFloat
    oldest: Count


class _ServerLine(_Line):
    round: Annotated[int, Field(ge=1)]
    seconds: Seconds | None = None
    agents: Mapping[str, AgentShare] = {}
    selected: tuple[str, ...] | None = None
    late: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    taken_out: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    merged: Mapping[str, Count] = {}
    replaced: Mapping[str, str] = {}
    refused: Mapping[str, str] = {}
    begun_again: Count = 0
    staleness: Staleness | None = None


class _AgentLine(AgentRound):
    round: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Round:
    """A finished round."""

    number: int
    seconds: float | None
    agents: Mapping[str, AgentRound]
    happened: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What was out of the ordinary to each agent that it happened to, in words."""
    selected: tuple[str, ...] | None = None
    """Whom the round asked; None where it asked everyone."""
    begun_again: int = 0
    """How often its joint steps began again."""
    staleness: Staleness | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not."""

    config: ServerConfig
    rounds: tuple[Round, ...]
    agent_names: tuple[str, ...]
    """Who took part in a finished round, was named there for another reason, or opened its own metrics, in
    alphabetical order."""
    is_running: bool = False
    """A server is at work on it."""

    @property
    def is_finished(self) -> bool:
        """Whether the last planned round has ended."""
        return bool(self.rounds) and self.rounds[-1].number >= self.config.training.rounds


LineT = TypeVar("LineT", bound=_Line)


def read_run(run_directory: Path, agent_directories: Mapping[str, Path] | None = None) -> RunRecord:
    """Read a run directory and the state directories of the agents that may be shown.

    Args:
        run_directory: The server's, with ``run.toml`` and, once a round has ended, ``metrics.jsonl``.
        agent_directories: State directory by agent name. What such an agent's own ``metrics.jsonl`` says completes
            what the server knows; of the other agents only the latter is there.

    Returns:
        The run, with its rounds in order and each round's agents in alphabetical order.

    Raises:
        DataError: If a directory or ``run.toml`` is missing, or a file cannot be read or is damaged.
    """
    config = _read_config(run_directory / "run.toml")
    # A round that ran again after a crash has two lines; the later one is what became of it.
    server_lines = {line.round: line for line in _read_lines(run_directory / "metrics.jsonl", _ServerLine)}
    own_lines: dict[str, dict[int, _AgentLine]] = {}
    for name, directory in (agent_directories or {}).items():
        if not directory.is_dir():
            raise DataError(f"{directory}: no such folder; give the state directory of agent {name}")
        own_lines[name] = {line.round: line for line in _read_lines(directory / "metrics.jsonl", _AgentLine)}
    rounds = tuple(_merge(line, own_lines) for _, line in sorted(server_lines.items()))
    names = {name for finished in rounds for name in (*finished.agents, *finished.happened)} | set(own_lines)
    return RunRecord(config, rounds, tuple(sorted(names)), is_running=_is_running(run_directory / "lock"))


def _is_running(lock: Path) -> bool:
    """Say whether a server holds a run directory; a copy of one has none."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _happened(line: _ServerLine) -> dict[str, tuple[str, ...]]:
    """Say of each agent what was out of the ordinary with it."""
    said: dict[str, list[str]] = {}
    for names, words in (
        (line.late, "late: the round was closed without it"),
        (line.dropped, "its late update was dropped"),
        (line.left, "left"),
        (line.silent, "fell silent"),
        (line.taken_out, "had no place in the joint steps"),
        (line.left_out, "left out by the rule"),
    ):
        for name in names:
            said.setdefault(name, []).append(words)
    for name, number in line.merged.items():
        said.setdefault(name, []).append(f"its late update of round {number} is in")
    for name, other in line.replaced.items():
        said.setdefault(name, []).append(f"replaced by {other}")
        said.setdefault(other, []).append(f"asked in place of {name}")
    for name, reason in line.refused.items():
        said.setdefault(name, []).append(f"refused: {reason}")
    return {name: tuple(words) for name, words in sorted(said.items())}


def _merge(line: _ServerLine, own_lines: Mapping[str, Mapping[int, _AgentLine]]) -> Round:
    agents = {}
    for name, share in line.agents.items():
        sources: list[_Line] = [share]
        if line.round in own_lines.get(name, {}):
            sources.append(own_lines[name][line.round])
        known = {key: value for source in sources for key, value in source if value is not None}
        agents[name] = AgentRound.model_validate(known)
    return Round(
        number=line.round,
        seconds=line.seconds,
        agents=dict(sorted(agents.items())),
        happened=_happened(line),
        selected=line.selected,
        begun_again=line.begun_again,
        staleness=line.staleness,
    )


def _read_config(path: Path) -> ServerConfig:
    try:
        return ServerConfig.model_validate(tomllib.loads(_read_text(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; give the run directory of a server") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(
            f"{path}: is not valid TOML ({error}); restore the file from the server's configuration"
        ) from error
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DataError(
            f"{path}: {place or 'the file'} is not what a server's configuration has; restore the file from it"
        ) from error


def _read_lines(path: Path, line_class: type[LineT]) -> Iterable[LineT]:
    """Yield the lines of a metrics file: no file, no round yet; a last line without its end is still being written."""
    try:
        text = _read_text(path)
    except FileNotFoundError:
        return
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            yield line_class.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            reason = f"{place}: {problem['msg']}" if place else problem["msg"]
            raise DataError(f"{path}: line {number} is damaged ({reason}); remove that line") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file that this user may read") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (at byte {error.start}); it is damaged") from error
