"""The main job on real text: three agents fine-tune a Llama of 260 thousand parameters on E2E NLG, over gRPC.

The meaning representation is the prompt, the reference the completion, which alone carries loss. Beside it runs central
LoRA with stock transformers + PEFT: rank 8 on all linear layers, the same learning rate, batch and number of steps.
Held-out loss is measured on dev.csv with stock libraries. Needs the model and the data beside the repository, in
shared/.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from daemons import Daemons, machine
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from splitfed.config import DataSection
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import Example, collate, load_examples
from splitfed.training.order import step_examples

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models" / "stories260k"
E2E = SHARED / "data" / "e2e"
COLUMNS = {"prompt_column": "mr", "completion_column": "ref"}
AGENTS = ("north", "south", "west")
MAX_TOKENS, BATCH, LEARNING_RATE, RANK, ALPHA = 256, 32, 3e-3, 8, 16.0


def load(file: Path, rows: int | None = None) -> Sequence[Example]:
    """Read a CSV file as examples."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = DataSection(path=str(file), max_rows=rows, **COLUMNS)
    examples, _ = load_examples(data, tokenizer, max_tokens=MAX_TOKENS, record_hash=lambda content: str(len(content)))
    return examples


def write_shards(folder: Path) -> dict[str, Path]:
    """Deal the rows of train.csv out to the agents, in three parts of different sizes."""
    with (E2E / "train.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    bounds = [0, len(rows) // 2, len(rows) * 5 // 6, len(rows)]
    files = {}
    for index, name in enumerate(AGENTS):
        files[name] = folder / f"{name}.csv"
        with files[name].open("w", newline="") as out:
            csv.writer(out).writerows([header, *rows[bounds[index] : bounds[index + 1]]])
    return files


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, dev: Sequence[Example]) -> float:
    """Measure the mean loss per completion token, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(dev), 64):
        batch = collate(dev[start : start + 64], pad_token_id=0)
        total += causal_lm_loss(model(batch.input_ids_BT).logits, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    return total / tokens


def central(examples: Sequence[Example], dev: Sequence[Example], steps: int, every: int) -> Iterator[float]:
    """Train centrally; gives the held-out loss each so many steps."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    scheduler = get_scheduler("constant", optimiser, num_warmup_steps=0, num_training_steps=steps)
    for step in range(steps):
        model.train()
        chosen = step_examples(
            len(examples), seed=0, client="central", round=1, step=step, batch_size=BATCH, local_steps=steps
        )
        batch = collate([examples[index] for index in chosen], pad_token_id=0)
        model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss.backward()
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        if (step + 1) % every == 0:
            yield held_out_loss(model, dev)


def split(
    folder: Path, dev: Sequence[Example], rounds: int, local_steps: int, codec: str, noise_multiplier: float
) -> tuple[list[float], list[dict[str, object]]]:
    """Train over three agents; gives the held-out loss after each round, and an agent's own lines."""
    directions = ("smashed", "trunk_output", "output_gradient", "smashed_gradient")
    with Daemons(folder) as daemons:
        files = write_shards(folder)
        address = daemons.serve(
            {
                "model": {"base": str(BASE), "bottom_blocks": 1, "top_blocks": 1},
                "lora": {"rank": RANK, "alpha": ALPHA},
                "training": {
                    "rounds": rounds,
                    "local_steps": local_steps,
                    "batch_size": BATCH,
                    "max_tokens": MAX_TOKENS,
                    "learning_rate": LEARNING_RATE,
                    "schedule": "constant",
                },
                "federation": {"agents": len(files)},
                "aggregation": {"lora": "factors"},
                "codecs": dict.fromkeys(directions, codec),
                "server": {"threads": 1},
            }
        )
        for name, file in files.items():
            privacy = {"noise_multiplier": noise_multiplier}
            tables = {"agent": {"threads": 1}, "data": {"path": str(file), **COLUMNS}, "privacy": privacy}
            daemons.take_part(name, address, tables)
        daemons.wait()
        losses = []
        for round in range(1, rounds + 1):
            base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
            adapter = folder / "run" / "adapters" / f"round-{round:04d}"
            losses.append(held_out_loss(PeftModel.from_pretrained(base, adapter), dev))
        return losses, daemons.metrics(AGENTS[0])


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=25)
    parser.add_argument("--codec", default="none", choices=("none", "bf16", "fp16", "int8"))
    parser.add_argument("--noise-multiplier", type=float, default=0.0)
    parser.add_argument("--dev-rows", type=int, default=1000)
    parser.add_argument("--without-central", action="store_true")
    options = parser.parse_args()
    if not (BASE.is_dir() and E2E.is_dir()):
        print(f"skipped: needs {BASE} and {E2E}")
        return
    started_s = time.monotonic()
    dev = load(E2E / "dev.csv", options.dev_rows)
    before = held_out_loss(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), dev)
    result: dict[str, object] = {"machine": machine(), "held_out_before": round(before, 3)}
    with tempfile.TemporaryDirectory() as name:
        losses, lines = split(
            Path(name), dev, options.rounds, options.local_steps, options.codec, options.noise_multiplier
        )
    result["split_held_out_by_round"] = [round(loss, 3) for loss in losses]
    result["split_seconds"] = round(time.monotonic() - started_s)
    result["epsilon"] = lines[-1]["epsilon"]
    if not options.without_central:
        steps = options.rounds * options.local_steps
        curve = list(central(load(E2E / "train.csv"), dev, steps, options.local_steps))
        result["central_held_out_by_round"] = [round(loss, 3) for loss in curve]
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
