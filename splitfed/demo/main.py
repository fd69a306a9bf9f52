"""The demonstration itself: write the files, start the daemons, watch, measure, report."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitfed.assets import base_model_folder
from splitfed.demo.processes import DaemonFailed, Daemons
from splitfed.demo.shards import SHARES, write_shards
from splitfed.errors import RunDirectoryError
from splitfed.study.report import BeforeAfter, write_report

DEFAULT_DIRECTORY = Path("splitfed-demo")

_MARKER = ".splitfed-demo"
_SEED = 7
_MAX_TOKENS = 128
_ROUNDS = 5
_PROMPT = "The statement"
_SAMPLE_TOKENS = 48
_START_S = 60.0
_POLL_S = 0.2

_SERVER = """\
[run]
name = "demo"
directory = "run"
seed = {seed}

[model]
base = "demo"
bottom_blocks = 1
top_blocks = 1

[lora]
rank = 8
alpha = 16.0

[training]
rounds = {rounds}
local_steps = 24
batch_size = 8
micro_batch_size = 4
max_tokens = {max_tokens}
learning_rate = 5e-3
warmup_steps = 4

[federation]
agents = {agents}

[server]
address = "127.0.0.1:0"
threads = 1
"""

_AGENT = """\
[agent]
name = "{name}"
server = "{server}"
state_directory = "{name}"
threads = 1

[data]
path = "data/{name}.jsonl"
"""


@dataclass(frozen=True)
class _Row:
    """A round in the closing table."""

    round: int
    training_loss: float
    held_out_loss: float
    epsilon: float | None
    up: float
    down: float
    seconds: float


def run_demo(directory: Path = DEFAULT_DIRECTORY) -> int:
    """Fine-tune the embedded model over one server and three agents on this machine.

    Args:
        directory: Where everything is written; an earlier demonstration there is replaced.

    Returns:
        0 if the held-out loss fell, 1 if it did not.

    Raises:
        RunDirectoryError: If the directory holds anything but an earlier demonstration.
        SplitFedError: If a daemon fails.
    """
    from splitfed.demo.measure import StockModel

    console = Console()
    started_s = time.monotonic()
    _take_over(directory)
    files, held_out = write_shards(directory / "data", seed=_SEED)
    agents = list(files)
    rows = {name: len(file.read_text().splitlines()) for name, file in files.items()}
    (directory / "server.toml").write_text(
        _SERVER.format(seed=_SEED, rounds=_ROUNDS, max_tokens=_MAX_TOKENS, agents=len(agents))
    )
    console.print(
        "One server and three agents on this machine, over gRPC, with noise and int8 on. Text stays with its agent: "
        + ", ".join(f"{name} {count} passages" for name, count in rows.items())
        + f"; {len(held_out)} are held out."
    )
    run = directory / "run"
    with Daemons(directory / "logs") as daemons:
        (run / "address").unlink(missing_ok=True)
        daemons.start("server", "server", "--config", str(directory / "server.toml"), "--overwrite")
        address = _wait_for_address(daemons, run / "address")
        for name in agents:
            (directory / f"agent-{name}.toml").write_text(_AGENT.format(name=name, server=address))
            daemons.start(name, "agent", "--config", str(directory / f"agent-{name}.toml"))
        _watch(console, daemons, run / "metrics.jsonl")
    stock = StockModel(base_model_folder())
    console.print("Measuring the exported adapters with stock transformers and PEFT …")
    before = stock.held_out_loss(None, held_out, max_tokens=_MAX_TOKENS)
    table = [
        _row(directory, line, agents, stock.held_out_loss(run / line["adapter"], held_out, max_tokens=_MAX_TOKENS))
        for line in _lines(run / "metrics.jsonl")
    ]
    after = table[-1].held_out_loss
    samples = [stock.sample(adapter, _PROMPT, new_tokens=_SAMPLE_TOKENS) for adapter in (None, run / "adapter")]
    _print_table(console, table)
    console.print(f"held-out loss, stock transformers + PEFT: {before:.3f} before, {after:.3f} after\n")
    for label, sample in zip(("before", "after"), samples, strict=True):
        console.print(f"[bold]{label}[/bold]  {escape(_PROMPT + sample)}\n", highlight=False)
    write_report(
        run,
        directory / "report.html",
        agent_directories={name: directory / name for name in agents},
        before_after=BeforeAfter(
            held_out_loss_before=before,
            held_out_loss_after=after,
            prompt=_PROMPT,
            sample_before=samples[0],
            sample_after=samples[1],
            held_out_loss_by_round={row.round: row.held_out_loss for row in table},
        ),
        title="splitfed demo",
    )
    worst = max(agents, key=lambda name: _spent(_last_line(directory / name)))
    total = _last_line(directory / worst)["total"]
    console.print(f"privacy in total, of {worst}, which has spent most: {total}", highlight=False)
    console.print(f"report: {directory / 'report.html'}\nadapter: {run / 'adapter'}", highlight=False)
    console.print(f"{time.monotonic() - started_s:.0f} s in all", highlight=False)
    if not (math.isfinite(after) and after < before):
        console.print("[red]The held-out loss did not fall.[/red]")
        return 1
    return 0


def _take_over(directory: Path) -> None:
    """Make the directory, or empty it of an earlier demonstration; anything else in it is left alone, and refused."""
    marker = directory / _MARKER
    try:
        if directory.exists() and not marker.exists() and any(directory.iterdir()):
            raise RunDirectoryError(f"{directory} holds other files; give --directory an empty or a new folder.")
        if marker.exists():
            for part in ("data", "logs", "run", *SHARES):
                shutil.rmtree(directory / part, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise RunDirectoryError(
            f"{directory} cannot be used for the demonstration ({error.strerror}); give --directory a folder."
        ) from error


def _wait_for_address(daemons: Daemons, file: Path) -> str:
    """Wait until the server listens, and say where."""
    deadline_s = time.monotonic() + _START_S
    while not file.exists():
        if not daemons.are_running():
            raise DaemonFailed("The server ended before it served; its log says why.")
        if time.monotonic() > deadline_s:
            raise DaemonFailed(f"The server did not start in {_START_S:.0f} s; its log says what it did.")
        time.sleep(_POLL_S)
    return file.read_text().strip()


def _watch(console: Console, daemons: Daemons, metrics: Path) -> None:
    """Say when a round is over, until the daemons have ended by themselves."""
    seen = 0
    with console.status("starting the agents …") as status:
        while daemons.are_running():
            lines = _lines(metrics) if metrics.exists() else []
            for line in lines[seen:]:
                console.print(f"round {line['round']} of {line['rounds']} is over ({line['seconds']:.1f} s)")
                status.update(f"round {line['round'] + 1} of {line['rounds']} …")
            seen = len(lines)
            time.sleep(_POLL_S)


def _row(directory: Path, line: Mapping[str, Any], agents: list[str], held_out_loss: float) -> _Row:
    """Gather a round from the server's line and the agents' own; the losses are read here, on the agents' machine."""
    own = [record for name in agents for record in _lines(directory / name / "metrics.jsonl")]
    own = [record for record in own if record["round"] == line["round"]]
    tokens = sum(record["tokens"] for record in own)
    epsilons = [record["epsilon_total"] for record in own]
    weights = [line["agents"][name]["weight"] for name in line["agents"]]
    return _Row(
        round=line["round"],
        training_loss=sum(w * record["training_loss"] for w, record in zip(weights, own, strict=True)) / sum(weights),
        held_out_loss=held_out_loss,
        epsilon=None if None in epsilons else max(epsilons),
        up=sum(record["bytes_up"] for record in own) / tokens,
        down=sum(record["bytes_down"] for record in own) / tokens,
        seconds=line["seconds"],
    )


def _print_table(console: Console, rows: list[_Row]) -> None:
    table = Table(title="largest epsilon of any agent, over all channels, for one sequence, replace-one")
    for column in (
        "round",
        "training loss",
        "held-out loss",
        "epsilon",
        "bytes up/token",
        "bytes down/token",
        "seconds",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.round),
            f"{row.training_loss:.3f}",
            f"{row.held_out_loss:.3f}",
            "none" if row.epsilon is None else f"{row.epsilon:.3g}",
            f"{row.up:.0f}",
            f"{row.down:.0f}",
            f"{row.seconds:.1f}",
        )
    console.print(table)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _spent(line: Mapping[str, Any]) -> float:
    return math.inf if line["epsilon_total"] is None else float(line["epsilon_total"])


def _last_line(agent: Path) -> dict[str, Any]:
    return _lines(agent / "metrics.jsonl")[-1]
