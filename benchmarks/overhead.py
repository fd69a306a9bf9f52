"""What the split and its privacy cost: a step over gRPC ÷ the same LoRA step with stock transformers + PEFT.

GPT-2-small shape, random weights, batch 8 × 128 tokens, LoRA rank 8 on all linear layers, float32, one agent and a
server on loopback, with the default mechanisms (noise on both tensors, DP-SGD) and without any. The stock side is a
script as a user would write it. The three run in turn, every second time the other way round, and ratios of medians
are printed, with the bytes on the wire per token and direction.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from daemons import Daemons, machine
from shapes import gpt2_small, write_model, write_words

BATCH, TOKENS, RANK, HIDDEN = 8, 128, 8, 768

STOCK = """
import json, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
base, data, steps, batch_size, rank = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
tokenizer = AutoTokenizer.from_pretrained(base)
texts = [json.loads(line)["text"] for line in open(data)]
model = AutoModelForCausalLM.from_pretrained(base)
lora = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", fan_in_fan_out=True)
model = get_peft_model(model, lora)
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for step in range(steps):
    started = time.perf_counter()
    batch = tokenizer([texts[(step * batch_size + i) % len(texts)] for i in range(batch_size)], return_tensors="pt")
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    print(time.perf_counter() - started, flush=True)
"""


def stock_steps(base: Path, data: Path, steps: int) -> list[float]:
    """Time the stock script's steps, in seconds; the first is a warm-up."""
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        STOCK,
        str(base),
        str(data),
        str(steps + 1),
        str(BATCH),
        str(RANK),
    ]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
    return [float(line) for line in output.split()][1:]


def split_steps(
    folder: Path, base: Path, data: Path, steps: int, settings: dict[str, dict[str, Any]]
) -> tuple[list[float], list[dict[str, Any]]]:
    """Time the split run: seconds per step of each round but the first, and the agent's own lines."""
    rounds = 3
    with Daemons(folder) as daemons:
        address = daemons.serve(
            {
                "model": {"base": str(base), "bottom_blocks": 1, "top_blocks": 1},
                "lora": {"rank": RANK, "alpha": 16.0},
                "training": {
                    "rounds": rounds,
                    "local_steps": steps,
                    "batch_size": BATCH,
                    "max_tokens": TOKENS,
                    **settings.get("training", {}),
                },
                "server": settings.get("server", {}),
            }
        )
        daemons.take_part(
            "agent",
            address,
            {
                "agent": {"base": str(base), **settings.get("agent", {})},
                "data": {"path": str(data)},
                "privacy": settings.get("privacy", {}),
            },
        )
        daemons.wait()
        lines = daemons.metrics("agent")
    return [line["seconds"] / steps for line in lines[1:]], lines


def crossing_bytes(lines: list[dict[str, Any]], direction: str) -> int:
    """Add up what crossed the cut in a direction: all but the adapters, which travel once a round."""
    return sum(line[f"bytes_{direction}"] - line[f"adapter_bytes_{direction}"] for line in lines)


def main() -> None:
    """Run the sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="local steps per round, and stock steps per turn")
    parser.add_argument("--turns", type=int, default=3, help="how often each side runs")
    parser.add_argument("--micro-batch-size", type=int, default=BATCH)
    options = parser.parse_args()
    settings: dict[str, dict[str, Any]] = {"training": {"micro_batch_size": options.micro_batch_size}}
    bare = settings | {"privacy": {"noise_multiplier": 0.0}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_model(folder / "base", gpt2_small(), torch.float32)
        data = write_words(folder / "data.jsonl", rows=64, tokens=TOKENS - 1, vocabulary=50257)  # and an end
        times: dict[str, list[float]] = {"stock": [], "split": [], "split_without_mechanisms": []}
        for turn in range(options.turns):
            for side in sorted(times, reverse=turn % 2 == 1):
                if side == "stock":
                    steps_s = stock_steps(base, data, options.steps)
                elif side == "split":
                    steps_s, lines = split_steps(folder / f"turn-{turn}", base, data, options.steps, settings)
                else:
                    steps_s, _ = split_steps(folder / f"bare-{turn}", base, data, options.steps, bare)
                times[side].append(statistics.median(steps_s))
            medians = ", ".join(f"{side} {spent[-1]:.2f} s" for side, spent in times.items())
            print(f"turn {turn + 1}: {medians}", flush=True)
        crossed = sum(line["tokens"] for line in lines) * HIDDEN * 2  # two tensors each way
        result = {
            "machine": machine(),
            "step_s": {side: round(statistics.median(spent), 3) for side, spent in times.items()},
            "split_over_stock": ratio(times["split"], times["stock"]),
            "mechanisms": ratio(times["split"], times["split_without_mechanisms"]),
            "up_bytes_per_token_over_hidden": round(crossing_bytes(lines, "up") / crossed, 3),
            "down_bytes_per_token_over_hidden": round(crossing_bytes(lines, "down") / crossed, 3),
            "adapter_bytes_a_round": lines[-1]["adapter_bytes_up"],
        }
        print(json.dumps(result, indent=1))


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Divide turn by turn: the median ratio, the least and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}


if __name__ == "__main__":
    main()
