"""Do plans keep their promises? Predicted ÷ measured for what `splitfed plan` chooses, run for real.

For each constraint in turn: the device is profiled, a plan is made with `splitfed plan`, and the configuration that it
writes is given to real daemons, with a link of the planned rate and latency between them (a proxy on loopback). One
CPU thread for each process. Bytes are what the agent counted, a step's time is that from one step's end to the next
one's, in rounds after the first, memory is the kernel's largest of each process, epsilon is the ledger's.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from daemons import Daemons, machine
from shaped_link import ShapedLink
from shapes import write_words

from splitfed.config.device import parse_link
from splitfed.privacy import report_ledger

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
GPT2 = "import sys, torch; from shapes import *; write_model(Path(sys.argv[1]), gpt2_small(), torch.float32)"
TRAINING = {"rounds": 3, "local_steps": 6, "batch_size": 4, "max_tokens": 64}
ROWS = 64
LINKS = {"stories260k": "20mbit,40ms", "gpt2-small": "100mbit,20ms"}
CASES: dict[str, dict[str, Sequence[str]]] = {
    "stories260k": {
        "the fastest step of all": ["--prefer", "step"],
        "--max-bytes 100kB": ["--max-bytes", "100kB"],
        "--epsilon 1e5": ["--epsilon", "1e5"],
    },
    "gpt2-small": {
        "--max-step 2s": ["--max-step", "2s"],
        "--max-memory 1.2GB": ["--max-memory", "1.2GB", "--prefer", "leakage"],
        "--epsilon 1e5": ["--epsilon", "1e5"],
    },
}


@dataclass(frozen=True)
class Outcome:
    """A plan and the run that was made of it.

    Attributes:
        chosen: The plan, as ``splitfed plan --json`` has it.
        step_s: Seconds from one step's end to the next one's, median of the rounds after the first.
        up_bytes: Bytes of a step up.
        down_bytes: Bytes of a step down.
        memory_bytes: The agent's largest memory.
        server_memory_bytes: The server's.
        epsilon: What the ledger says; None where nothing is guaranteed.
    """

    chosen: Mapping[str, Any]
    step_s: float
    up_bytes: float
    down_bytes: float
    memory_bytes: int
    server_memory_bytes: int
    epsilon: float | None

    def ratios(self) -> dict[str, float]:
        """Give predicted ÷ measured."""
        names = "step_s", "up_bytes", "down_bytes", "memory_bytes", "server_memory_bytes", "epsilon"
        return {name: self.chosen[name] / getattr(self, name) for name in names if getattr(self, name) is not None}


def run_plan(
    folder: Path,
    base: Path,
    data: Path,
    options: Sequence[str],
    *,
    link: str,
    training: Mapping[str, int] = TRAINING,
    rows: int = ROWS,
    profile: Path | None = None,
) -> Outcome:
    """Profile this machine, plan with options, and run what was planned.

    Args:
        folder: Where everything goes; must not exist.
        base: The base model.
        data: Rows to train on, each its own record.
        options: Constraints, as on the command line.
        link: Rate and round trip.
        training: Rounds, steps and sizes.
        rows: Rows of the data.
        profile: This machine's profile; None: it is made first.
    """
    folder.mkdir()
    run = folder / "run.toml"
    if profile is None:
        profile = folder / "profile.toml"
        splitfed("profile", "--output", str(profile))
    server_port, link_port = free_ports(2)
    lines = "".join(f"{key} = {value}\n" for key, value in training.items())
    run.write_text(
        f'[run]\ndirectory = "run"\n[model]\nbase = "{base}"\n[training]\n{lines}[server]\n'
        f'address = "127.0.0.1:{server_port}"\n'
    )
    made = splitfed(
        *("plan", "--config", str(run), "--device", str(profile), "--server", str(profile), "--link", link, "--json"),
        *("--examples", str(rows), "--data", str(data), "--address", f"127.0.0.1:{link_port}"),
        *("--output", str(folder / "planned"), "--agents", "1", *options),
    )
    (name, chosen), *_ = json.loads(made)["chosen"].items()
    shape = parse_link(link)
    with Daemons(folder) as daemons:
        daemons.start("server", folder / "planned" / "server.toml", "server")
        daemons.wait_for(folder / "run" / "address")
        with ShapedLink(
            f"127.0.0.1:{server_port}", bits_per_s=shape.up_bits_per_s, latency_s=shape.latency_s, port=link_port
        ):
            daemons.start("agent", folder / "planned" / f"agent-{name}.toml", "agent")
            daemons.wait()
        peaks = {side: daemons.peak_bytes(side) for side in ("agent", "server")}
    state = folder / "planned" / f"state-{name}"
    rounds = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
    steps = training["local_steps"]
    crossed = {way: rounds[-1][f"bytes_{way}"] - rounds[-1][f"adapter_bytes_{way}"] for way in ("up", "down")}
    spent = report_ledger(state / "ledger.jsonl", delta=1e-5, relation="replace-one").epsilon_total
    return Outcome(
        chosen,
        step_s=statistics.median(step_seconds(daemons.log("agent"))),
        up_bytes=crossed["up"] / steps,
        down_bytes=crossed["down"] / steps,
        memory_bytes=peaks["agent"],
        server_memory_bytes=peaks["server"],
        epsilon=spent,
    )


def step_seconds(log: str) -> Iterable[float]:
    """Give the seconds between the ends of steps that follow each other in a round, from an agent's log."""
    pattern = r"^(\S+ \S+) INFO round (\d+) of \d+, step \d+ of"
    ends = [(datetime.fromisoformat(at), int(number)) for at, number in re.findall(pattern, log, re.MULTILINE)]
    for (before, of), (after, of_after) in pairwise(ends):
        if of == of_after > 1:
            yield (after - before).total_seconds()


def splitfed(*arguments: str) -> str:
    """Run a command as a user does; gives what it prints."""
    command = [sys.executable, "-m", "splitfed", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens at."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports


def main() -> None:
    """Run every case and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=tuple(CASES))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {"stories260k": STORIES, "gpt2-small": folder / "base"}
        if "gpt2-small" in options.shapes:  # in a process of its own, so that its memory is not ours
            subprocess.run([sys.executable, "-c", GPT2, str(folder / "base")], check=True, cwd=Path(__file__).parent)
        words = write_words(folder / "words.jsonl", rows=ROWS, tokens=8, vocabulary=50257)
        for turn in range(options.turns):
            for shape in options.shapes:
                if not bases[shape].is_dir():
                    print(f"{shape}: skipped, {bases[shape]} is not there")
                    continue
                for number, (what, arguments) in enumerate(CASES[shape].items()):
                    outcome = run_plan(
                        folder / f"{turn}-{shape}-{number}", bases[shape], words, arguments, link=LINKS[shape]
                    )
                    ratios = {key: round(value, 3) for key, value in outcome.ratios().items()}
                    found.setdefault(f"{shape}, {what}", []).append(ratios)
                    print(f"{shape}, {what}: {json.dumps(ratios)}; planned {json.dumps(outcome.chosen)}", flush=True)
    table = {
        key: {what: statistics.median(one[what] for one in several) for what in several[0]}
        for key, several in found.items()
    }
    print(json.dumps({"machine": machine(), "predicted_over_measured": table}, indent=1))


if __name__ == "__main__":
    main()
