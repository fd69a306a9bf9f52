"""Where the variants land beside central LoRA and FedLoRA: held-out loss after the same rows, bytes, parameters.

A Llama of 260 thousand parameters is fine-tuned on E2E NLG by 3 and by 10 agents in one process, cut after its first
and before its last block, with nothing noised. The rows are dealt alike, or as mixes of `food` by Dirichlet(0.1). Every
method goes once through the very same rows: 5 rounds of 8 steps of 8 rows on each agent, at one learning rate, with the
same adapter at the start. "central" has the agents' joint batch (so it makes as many steps as one agent),
"central-small-batch" one agent's (so it makes as many as all agents together, as sflv2 and async do). In "async" the
slowest agent takes three times as long as the fastest. Rows have 128 tokens at most. int8 is measured on Dirichlet
shards only. With these sizes and three seeds the whole takes about 70 minutes of a core that others load as well.

Held-out loss is that of 400 rows of dev.csv under stock transformers + PEFT with the exported adapter. Bytes are those
of the mean agent in a round, payload alone; `data_up_bytes` is what leaves as plain tokens before the first round.
`skew` is how far an agent's mix of food is from that of all (mean total variation), `seconds` is the time of one core.

With --lora the second part: what is averaged (sflv1, Dirichlet(0.1), one seed), and agents with cuts (1,1), (2,1),
(0,2) and ranks 4, 8, 16 in one run, beside agents that are alike; 12 minutes of the same core.

Appends a row a cell to CSVs in results/ and skips those that are there, so that it may be interrupted; ends with a
table. Needs the model and the data beside the repository, in shared/.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from daemons import machine
from privacy import BASE, E2E, RESULTS, append, held_out_loss, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfed.config import CodecSection, DataSection, FederationSection, LoraSection, TrainingSection
from splitfed.config.aggregation import AggregationSection
from splitfed.federation import at_rank
from splitfed.models import Partition, adapter_state, initial_adapter, partition
from splitfed.training.baselines import Burden, adapter_burden, central_burden, central_lora, fed_lora
from splitfed.training.data import Example, load_examples
from splitfed.training.setup import lora_settings
from splitfed.training.shards import dirichlet_shards, iid_shards, topic_of
from splitfed.training.simulate import Simulation, simulate

TRAINING = TrainingSection(
    rounds=5, local_steps=8, batch_size=8, max_tokens=128, learning_rate=3e-3, schedule="constant"
)
ROWS = TRAINING.rounds * TRAINING.local_steps * TRAINING.batch_size
RANK, SCALE = 8, 2.0
CUT = (1, 1)
AGENTS, SHARDINGS, SEEDS = (3, 10), ("iid", "dirichlet-0.1"), 3
ALPHA, TOPIC = 0.1, "food"
DEV_ROWS = 400
SLOWEST = 3.0
DIRECTIONS = ("smashed", "trunk_output", "output_gradient", "smashed_gradient")

CENTRAL = ("central", "central-small-batch")
SPLIT: dict[str, dict[str, str]] = {
    "sflv1": {"variant": "sflv1"},
    "sflv2": {"variant": "sflv2"},
    "parallel-round": {"variant": "parallel"},
    "parallel-step": {"variant": "parallel", "merge_ends": "step"},
    "async": {"variant": "async"},
}
METHODS = (*CENTRAL, "fedlora", *SPLIT)

RULES = ("factors", "ffa", "alternating", "flexlora", "flora")
CUTS, RANKS = ((1, 1), (2, 1), (0, 2)), (4, 8, 16)
UNLIKE = (
    ("cuts", "factors"),
    ("ranks", "flexlora"),
    ("cuts-and-ranks", "flexlora"),
    ("cuts-and-ranks", "flora"),
    ("alike-rank-16", "flexlora"),
)


@dataclass(frozen=True)
class Cell:
    """What a row of the table is of."""

    method: str
    codec: str
    agents: int
    sharding: str
    seed: int
    rule: str = "factors"
    devices: str = "alike"

    def name(self, columns: Sequence[str]) -> dict[str, object]:
        """Give the columns that name the cell in a table."""
        return {column: getattr(self, column) for column in columns}


MAIN = tuple(field.name for field in fields(Cell))[:5]
WITH_LORA = tuple(field.name for field in fields(Cell))


def main_grid(seeds: int, codecs: Sequence[str]) -> Iterator[Cell]:
    """Every cell of the first part: a whole seed before the next, and encoded runs last."""
    for codec in codecs:
        is_open = codec == "none"
        methods, shardings = (METHODS[len(CENTRAL) :], SHARDINGS) if is_open else (tuple(SPLIT), SHARDINGS[1:])
        for seed in range(seeds):
            for agents in AGENTS:
                yield from (Cell(method, codec, agents, "all", seed) for method in CENTRAL if is_open)
                for sharding in shardings:
                    yield from (Cell(method, codec, agents, sharding, seed) for method in methods)


def lora_grid() -> Iterator[Cell]:
    """Every cell of the second part."""
    for agents in AGENTS:
        for devices, rule in [*(("alike", rule) for rule in RULES), *UNLIKE]:
            yield Cell("sflv1", "none", agents, SHARDINGS[1], 0, rule, devices)


# Data


def load(file: str) -> list[Example]:
    """Read the rows of a CSV file that are short enough; a row's record is its columns."""
    data = DataSection(path=str(E2E / file), prompt_column="mr", completion_column="ref")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    examples, _ = load_examples(data, tokenizer, max_tokens=512, record_hash=lambda content: content.decode())
    return [example for example in examples if len(example.input_ids) <= TRAINING.max_tokens]


def pool(train: Sequence[Example], agents: int, seed: int) -> list[Example]:
    """Draw the rows that all methods of a cell train on."""
    key = hashlib.sha256(json.dumps(["pool", agents, seed]).encode()).digest()[:16]
    order = np.random.Generator(np.random.Philox(key=int.from_bytes(key))).permutation(len(train))
    return [train[index] for index in order[: agents * ROWS].tolist()]


def deal(examples: Sequence[Example], cell: Cell) -> tuple[dict[str, list[Example]], float]:
    """Give each agent its rows; and how far their mixes of topics are from that of all."""
    agents = [f"agent-{number:02d}" for number in range(cell.agents)]
    topics = [topic_of(json.loads(example.record)[0], TOPIC) for example in examples]
    if cell.sharding == "dirichlet-0.1":
        shards = dirichlet_shards(topics, agents, ALPHA, cell.seed)
    else:
        shards = iid_shards(len(examples), agents, cell.seed)
    names = sorted(set(topics))

    def mix(indices: Sequence[int]) -> np.ndarray:
        return np.array([sum(topics[index] == name for index in indices) for name in names]) / len(indices)

    of_all = mix(range(len(examples)))
    skew = statistics.mean(np.abs(mix(shard) - of_all).sum().item() / 2 for shard in shards.values())
    return {agent: [examples[index] for index in shard] for agent, shard in shards.items()}, skew


# Runs


def whole_model() -> Any:
    """Load the pretrained model."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def lora_of(rank: int) -> LoraSection:
    """Give an adapter of this rank; all have the same scale."""
    return LoraSection(rank=rank, alpha=SCALE * rank)


def train(cell: Cell, shards: Mapping[str, list[Example]]) -> tuple[Simulation, list[Burden]]:
    """Fine-tune; gives the run and what it asked of each agent."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if cell.method in CENTRAL:
        changes = {"batch_size": TRAINING.batch_size * cell.agents}
        if cell.method == "central-small-batch":
            changes = {"local_steps": TRAINING.local_steps * cell.agents}
        training = TRAINING.model_copy(update=changes)
        run = central_lora(whole_model(), tokenizer, shards, training=training, lora=lora_of(RANK), seed=cell.seed)
        return run, [central_burden(shard) for shard in shards.values()]
    if cell.method == "fedlora":
        run = fed_lora(whole_model(), tokenizer, shards, training=TRAINING, lora=lora_of(RANK), seed=cell.seed)
        return run, [adapter_burden(run.adapter)] * len(shards)
    return split(cell, shards)


def split(cell: Cell, shards: Mapping[str, list[Example]]) -> tuple[Simulation, list[Burden]]:
    """Fine-tune split."""
    agents, model = list(shards), whole_model()
    has_cuts, has_ranks = "cuts" in cell.devices, "ranks" in cell.devices
    lora = lora_of(16 if has_ranks or cell.devices == "alike-rank-16" else RANK)
    ranks = {agent: RANKS[place % 3] if has_ranks else lora.rank for place, agent in enumerate(agents)}
    cuts = CUTS if has_cuts else (CUT,)
    made = {cut: partition(model, bottom_blocks=cut[0], top_blocks=cut[1]) for cut in cuts}
    parts: dict[str, Partition] = {agent: made[cuts[place % len(cuts)]] for place, agent in enumerate(agents)}
    seconds = {agent: 1 + (SLOWEST - 1) * place / (len(agents) - 1) for place, agent in enumerate(agents)}
    run = simulate(
        parts,
        AutoTokenizer.from_pretrained(BASE),
        shards,
        training=TRAINING,
        lora=lora,
        codecs=CodecSection.model_validate(dict.fromkeys(DIRECTIONS, cell.codec)),
        federation=FederationSection.model_validate({"agents": len(agents), **SPLIT[cell.method]}),
        aggregation=AggregationSection.model_validate({"lora": cell.rule}),
        trunk=partition(model, bottom_blocks=0, top_blocks=0).trunk if has_cuts else None,
        ranks=ranks,
        seconds=seconds if SPLIT[cell.method].get("variant") == "async" else None,
        seed=cell.seed,
    )
    exchanges = TRAINING.local_steps if SPLIT[cell.method].get("merge_ends") == "step" else 0
    residual_rank = lora.rank if cell.rule == "flora" else 0
    burdens = []
    for agent in agents:
        held = {**adapter_state(parts[agent].bottom), **adapter_state(parts[agent].top)}
        held = at_rank(held, ranks[agent])
        burdens.append(
            adapter_burden(held, rule=cell.rule, residual_rank=residual_rank, exchanges=exchanges)  # type: ignore[arg-type]
        )
    return run, burdens


def measure(run: Simulation, dev: Sequence[Example]) -> float:
    """Give the held-out loss with the exported adapter."""
    with tempfile.TemporaryDirectory() as folder:
        run.export(folder, base=BASE)
        return held_out_loss(Path(folder), dev)


def row(cell: Cell, columns: Sequence[str], examples: Sequence[Example], dev: Sequence[Example]) -> dict[str, object]:
    """Train and measure a cell."""
    shards, skew = deal(examples, cell)
    started_s = time.process_time()
    run, burdens = train(cell, shards)
    took_s = time.process_time() - started_s
    loss = measure(run, dev)
    crossed = list(run.traffic.values())
    rounds = TRAINING.rounds

    def mean(values: list[int]) -> int:
        return round(statistics.mean(values))

    return {
        **cell.name(columns),
        "held_out_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 4),
        "activation_up_bytes": mean([traffic.sent_bytes // rounds for traffic in crossed]),
        "activation_down_bytes": mean([traffic.received_bytes // rounds for traffic in crossed]),
        "adapter_up_bytes": mean([burden.sent_bytes for burden in burdens]),
        "adapter_down_bytes": mean([burden.received_bytes for burden in burdens]),
        "data_up_bytes": mean([burden.data_bytes for burden in burdens]),
        "trainable_parameters": mean([burden.trainable_parameters for burden in burdens]),
        "samples": cell.agents * ROWS,
        "skew": "" if cell.sharding == "all" else round(skew, 3),
        "seconds": round(took_s, 1),
        "machine": machine(),
    }


def fill(file: Path, cells: Sequence[Cell], columns: Sequence[str], train_rows: Sequence[Example]) -> None:
    """Train every cell that has no row yet, and say how far it is."""
    there = {tuple(each[column] for column in columns) for each in rows_of(file)}
    left = [cell for cell in cells if tuple(str(value) for value in astuple(cell)[: len(columns)]) not in there]
    dev = spread(load("dev.csv"), DEV_ROWS)
    work, worked, started_s = sum(cell.agents for cell in left), 0, time.monotonic()
    for number, cell in enumerate(left, 1):
        made = row(cell, columns, pool(train_rows, cell.agents, cell.seed), dev)
        append(file, made)
        worked += cell.agents
        left_s = (time.monotonic() - started_s) / worked * (work - worked)
        named = ", ".join(str(value) for value in cell.name(columns).values())
        print(
            f"{len(cells) - len(left) + number}/{len(cells)} {named}: held out {made['held_out_loss']:.4f}, "
            f"{made['seconds']:.0f} s; about {left_s / 60:.0f} min left",
            flush=True,
        )


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Take so many examples at even distances: neighbours in the file describe the same restaurant."""
    return [examples[place * len(examples) // count] for place in range(count)]


# Tables


def untrained_loss() -> float:
    """Measure the model before training, with an adapter that does nothing."""
    adapter = initial_adapter(whole_model(), lora_settings(lora_of(RANK)), seed=0)
    return measure(Simulation(lora_of(RANK), adapter), spread(load("dev.csv"), DEV_ROWS))


def print_main(file: Path) -> None:
    """Print perplexity by method: the mean over seeds, their sample standard deviation, the distance from central."""
    found: dict[tuple[str, ...], dict[int, dict[str, str]]] = {}
    for each in rows_of(file):
        shardings = SHARDINGS if each["sharding"] == "all" else (each["sharding"],)
        for sharding in shardings:
            cell = (each["method"], each["codec"], each["agents"], sharding)
            found.setdefault(cell, {})[int(each["seed"])] = each
    print(
        f"{'method':<20}{'codec':<7}{'agents':>6} {'sharding':<14}{'n':>2}{'loss':>8}{'perplexity':>18}"
        f"{'- central':>18}{'up, down kB':>14}{'adapter kB':>11}{'trained':>9}"
    )
    for cell, by_seed in sorted(found.items(), key=lambda item: (int(item[0][2]), item[0][3], item[0][1] != "none")):
        central = found.get(("central", "none", *cell[2:]), {})
        apart = [
            float(each["perplexity"]) - float(central[seed]["perplexity"])
            for seed, each in by_seed.items()
            if seed in central
        ]

        def mean_of(column: str, rows: Collection[dict[str, str]] = by_seed.values()) -> float:
            return statistics.mean(float(each[column]) for each in rows)

        up_kb, down_kb = (mean_of(f"activation_{way}_bytes") / 1e3 for way in ("up", "down"))
        adapter_kb = (mean_of("adapter_up_bytes") + mean_of("adapter_down_bytes")) / 1e3
        loss = mean_of("held_out_loss")
        perplexity = _spread([float(each["perplexity"]) for each in by_seed.values()])
        print(
            f"{cell[0]:<20}{cell[1]:<7}{cell[2]:>6} {cell[3]:<14}{len(by_seed):>2}{loss:>8.4f}{perplexity:>18}"
            f"{_spread(apart):>18}{up_kb:>7.0f}{down_kb:>7.0f}{adapter_kb:>11.0f}{mean_of('trainable_parameters'):>9.0f}"
        )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def print_lora(file: Path) -> None:
    """Print the second part's figures."""
    for each in sorted(rows_of(file), key=lambda each: (int(each["agents"]), each["devices"], each["rule"])):
        print(
            f"{each['agents']:>3} agents  {each['devices']:<15} {each['rule']:<12} loss {each['held_out_loss']:<7} "
            f"perplexity {each['perplexity']:<7} adapter up {each['adapter_up_bytes']} B, down "
            f"{each['adapter_down_bytes']} B, trained {each['trainable_parameters']}"
        )


def main() -> None:
    """Fill a table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="the second part")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--codecs", nargs="+", choices=("none", "int8"), default=("none", "int8"))
    parser.add_argument("--table", action="store_true", help="print the table as it is, and train nothing")
    options = parser.parse_args()
    if not (BASE.is_dir() and E2E.is_dir()):
        print(f"skipped: needs {BASE} and {E2E}")
        return
    torch.set_num_threads(1)
    file = RESULTS / ("federation_lora.csv" if options.lora else "federation.csv")
    if not options.table:
        cells = list(lora_grid() if options.lora else main_grid(options.seeds, options.codecs))
        fill(file, cells, WITH_LORA if options.lora else MAIN, load("train.csv"))
    print(f"before training: loss {untrained_loss():.4f}")
    (print_lora if options.lora else print_main)(file)


if __name__ == "__main__":
    sys.exit(main())
