"""What more agents cost: a round of 2, 4 and 8 agents on one server ÷ a round of one agent, over gRPC.

GPT-2-small shape, random weights, every agent with 4 × 64 tokens a step in two micro-batches, cut after its first and before its last block,
noise and int8 on, one CPU thread for each process. In one turn every variant runs with every number of agents, and
with one agent. A round's time is the server's own, from its opening until it is written; the first round is a warm-up.

`speed-up` is N × the round of one agent ÷ the round of N: how many times faster N agents are than one after another on
the same processes. It cannot exceed the number of cores, nor what a core has left to do if the server has one thread.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from daemons import Daemons, machine
from shapes import gpt2_small, write_model, write_words

VARIANTS = ("sflv2", "sflv1", "parallel", "async")
BATCH, TOKENS, STEPS, ROUNDS = 4, 64, 4, 2


def round_s(
    folder: Path, base: Path, data: Path, variant: str, agents: int, *, server_threads: int, micro_batch_size: int
) -> float:
    """Run agents through all rounds; gives the seconds of the median round after the first."""
    with Daemons(folder) as daemons:
        address = daemons.serve(
            {
                "model": {"base": str(base), "bottom_blocks": 1, "top_blocks": 1},
                "federation": {"agents": agents, "variant": variant},
                "training": {
                    "rounds": ROUNDS,
                    "local_steps": STEPS,
                    "batch_size": BATCH,
                    "micro_batch_size": micro_batch_size,
                    "max_tokens": TOKENS,
                },
                "server": {"threads": server_threads},
            }
        )
        for number in range(agents):
            own = {"agent": {"base": str(base), "threads": 1}, "data": {"path": str(data)}}
            daemons.take_part(f"agent-{number}", address, own)
        daemons.wait()
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[1:])


def main() -> None:
    """Run every number of agents in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--server-threads", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=BATCH // 2, help="two are in flight at once")
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_model(folder / "base", gpt2_small(), torch.float32)
        data = write_words(folder / "data.jsonl", rows=64, tokens=TOKENS - 1, vocabulary=50257)
        for turn in range(options.turns):
            for variant, agents in [("sflv1", 1)] + [(v, a) for a in options.agents for v in options.variants]:
                run = folder / f"{turn}-{variant}-{agents}"
                took_s = round_s(
                    run,
                    base,
                    data,
                    variant,
                    agents,
                    server_threads=options.server_threads,
                    micro_batch_size=options.micro_batch_size,
                )
                times.setdefault((variant, agents), []).append(took_s)
                alone_s = times["sflv1", 1][turn]
                print(
                    f"turn {turn + 1}: {agents} agents, {variant}: {took_s:.2f} s a round, {took_s / alone_s:.2f} of "
                    f"one agent's, speed-up {agents * alone_s / took_s:.2f}",
                    flush=True,
                )
    alone = times["sflv1", 1]
    figures = {
        f"{variant} with {agents}": {
            "round_over_one_agents": _median(t / one for t, one in zip(spent, alone, strict=True)),
            "speed_up": _median(agents * one / t for t, one in zip(spent, alone, strict=True)),
        }
        for (variant, agents), spent in times.items()
        if agents > 1
    }
    print(
        json.dumps(
            {
                "machine": machine(),
                "server_threads": options.server_threads,
                "micro_batch_size": options.micro_batch_size,
                **figures,
            },
            indent=1,
        )
    )


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    main()
