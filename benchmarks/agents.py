"""What more agents cost: a round of 2, 4 and 8 agents on one server ÷ a round of one agent, over gRPC.

GPT-2-small shape, random weights, every agent with 4 × 64 tokens a step, cut after its first and before its last block,
noise and int8 on, one CPU thread for each agent and two for the server. The second round is measured, from the moment
that the first one is written until it is written itself, with all that is fetched, sent and saved in it.

`speed-up` is N × the round of one agent ÷ the round of N: how many times faster N agents are than one after another.
`busy` is the CPU time of all daemons in the round ÷ what the cores had to give: near 1 there is no more to gain.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from daemons import POLL_S, START_S, Daemons, machine
from shapes import gpt2_small, write_model, write_words

VARIANTS = ("sflv1", "parallel", "sflv2", "async")
BATCH, TOKENS, STEPS, MEASURED = 4, 64, 4, 2


def measured_round(
    folder: Path, base: Path, data: Path, variant: str, agents: int, *, server_threads: int
) -> tuple[float, float]:
    """Run agents until the second round is written; gives its seconds, and how busy the cores were in it."""
    with Daemons(folder) as daemons:
        address = daemons.serve(
            {
                "model": {"base": str(base), "bottom_blocks": 1, "top_blocks": 1},
                "federation": {"agents": agents, "variant": variant},
                "training": {"rounds": MEASURED + 1, "local_steps": STEPS, "batch_size": BATCH, "max_tokens": TOKENS},
                "server": {"threads": server_threads},
            }
        )
        for number in range(agents):
            own = {"agent": {"base": str(base), "threads": 1}, "data": {"path": str(data)}}
            daemons.take_part(f"agent-{number}", address, own)
        started_s, used_s = _after_round(daemons, MEASURED - 1)
        ended_s, used_by_then_s = _after_round(daemons, MEASURED)
    took_s = ended_s - started_s
    return took_s, (used_by_then_s - used_s) / took_s / (os.cpu_count() or 1)


def _after_round(daemons: Daemons, round: int) -> tuple[float, float]:
    """Wait until a round is written; gives the time, and the CPU time that all daemons have used."""
    file = daemons.folder / "run" / "metrics.jsonl"
    deadline_s = time.monotonic() + START_S
    while not file.exists() or len(file.read_text().splitlines()) < round:
        daemons.check()
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"round {round} is not over after {START_S:.0f} s:\n{daemons.log('server')}")
        time.sleep(POLL_S)
    return time.monotonic(), daemons.cpu_s()


def main() -> None:
    """Run every number of agents in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:2])
    parser.add_argument("--server-threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_model(folder / "base", gpt2_small(), torch.float32)
        data = write_words(folder / "data.jsonl", rows=64, tokens=TOKENS - 1, vocabulary=50257)
        for turn in range(options.turns):
            for variant, agents in [("sflv1", 1)] + [(v, a) for a in options.agents for v in options.variants]:
                run = folder / f"{turn}-{variant}-{agents}"
                took_s, busy = measured_round(run, base, data, variant, agents, server_threads=options.server_threads)
                times.setdefault((variant, agents), []).append((took_s, busy))
                alone_s = times["sflv1", 1][turn][0]
                print(
                    f"turn {turn + 1}: {agents} agents, {variant}: {took_s:.2f} s a round, {took_s / alone_s:.2f} of "
                    f"one agent's, speed-up {agents * alone_s / took_s:.2f}, cores {busy:.0%} busy",
                    flush=True,
                )
    alone = [took_s for took_s, _ in times["sflv1", 1]]
    figures = {
        f"{variant} with {agents}": {
            "round_over_one_agents": _median(t / one for (t, _), one in zip(spent, alone, strict=True)),
            "speed_up": _median(agents * one / t for (t, _), one in zip(spent, alone, strict=True)),
            "busy": _median(busy for _, busy in spent),
        }
        for (variant, agents), spent in times.items()
    }
    print(json.dumps({"machine": machine(), "server_threads": options.server_threads, **figures}, indent=1))


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    main()
