"""What noise costs and what it buys: held-out loss, epsilon and attacks, over noise and split point.

A Llama of 260 thousand parameters is fine-tuned on E2E NLG over three clients in one process, with noise on all three
channels (DP-SGD for the adapters), and a server that knows the base model and has public text attacks what it receives:
tokens behind smashed data, labels behind output gradients, records behind an update. Appends a row for each noise
multiplier, split point and attack to CSVs in results/ and skips those that are there, so that it may be interrupted.
Needs the model and the data beside the repository, in shared/.
"""

import argparse
import csv
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from daemons import machine
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfed.config import CodecSection, DataSection, LoraSection, PrivacySection, ServerConfig, TrainingSection
from splitfed.config.aggregation import AggregationSection
from splitfed.models import Partition, partition
from splitfed.privacy import Ledger, clip, epsilon
from splitfed.privacy.leakage import AttackResult, Texts, TokenKnowledge, attack_tokens, gaussian_log_density
from splitfed.privacy.mechanisms import GaussianMechanism
from splitfed.study.audit_attacks import gradient_results
from splitfed.study.audit_membership import MembershipGames
from splitfed.study.audit_setting import AuditSetting, open_setting
from splitfed.study.audit_view import protections, view
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import Example, collate, load_examples
from splitfed.training.protection import Workload, open_gate, settle_clip, settle_noise, smashed_mechanism
from splitfed.training.simulate import simulate

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models" / "stories260k"
E2E = SHARED / "data" / "e2e"
RESULTS = Path(__file__).with_name("results")
NOISE = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)
CUTS = ((0, 0), (1, 1), (2, 2))
ATTACK_NOISE, MEMBERSHIP_NOISE = (*NOISE, 0.05), (0.0, 0.002, 0.02)
ATTACK_CUTS, LABEL_CUTS, MEMBERSHIP_CUTS = (*CUTS, (3, 1)), (*CUTS, (1, 3)), CUTS[1:]
Cuts = Sequence[tuple[int, int]]
Attacks = Callable[[float, tuple[int, int]], list[AttackResult]]
CLIENTS, ROWS, DEV_ROWS, MAX_TOKENS = 3, 1000, 200, 160
TRAINING = TrainingSection(
    rounds=4, local_steps=15, batch_size=12, max_tokens=MAX_TOKENS, learning_rate=3e-3, schedule="constant"
)
DELTA = 1e-5
PUBLIC, PRIVATE = 256, 40


def load(file: str, rows: int, start: int = 0) -> Sequence[Example]:
    """Read rows of a CSV file as examples; a row is its own record."""
    data = DataSection(path=str(E2E / file), max_rows=start + rows, prompt_column="mr", completion_column="ref")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    examples, _ = load_examples(
        data, tokenizer, max_tokens=MAX_TOKENS, record_hash=lambda content: hashlib.sha256(content).hexdigest()
    )
    return examples[start:]


def split(bottom_blocks: int, top_blocks: int) -> Partition:
    """Cut the pretrained model."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return partition(model, bottom_blocks=bottom_blocks, top_blocks=top_blocks)


@torch.no_grad()
def held_out_loss(adapter: Path, dev: Sequence[Example]) -> float:
    """Measure the mean loss per completion token with stock transformers and PEFT, in nats."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), adapter).eval()
    total, tokens = 0.0, 0
    for start in range(0, len(dev), 50):
        batch = collate(dev[start : start + 50], pad_token_id=0)
        total += causal_lm_loss(model(batch.input_ids_BT).logits, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    return total / tokens


def train(
    noise_multiplier: float, cut: tuple[int, int], shards: dict[str, Sequence[Example]], dev: Sequence[Example]
) -> tuple[float, dict[str, float]]:
    """Fine-tune; gives the held-out loss and the epsilon of the run, by channel and in total."""
    parts, privacy = split(*cut), PrivacySection(noise_multiplier=noise_multiplier, delta=DELTA)
    with tempfile.TemporaryDirectory() as name:
        ledgers = {client: Ledger(Path(name) / client / "ledger.jsonl") for client in shards}

        def releases(client: str):  # type: ignore[no-untyped-def]
            workload = Workload(TRAINING, [example.record for example in shards[client]])
            settled = settle_noise(settle_clip(privacy, parts.bottom), workload)
            return open_gate(settled, ledgers[client], "r", bottom=parts.bottom, top=parts.top, workload=workload)

        run = simulate(
            parts,
            AutoTokenizer.from_pretrained(BASE),
            shards,
            training=TRAINING,
            lora=LoraSection(),
            codecs=CodecSection(),
            aggregation=AggregationSection(lora="factors"),
            releases=releases,
        )
        run.export(Path(name) / "adapter", base=BASE)
        spent = {
            channel or "total": max(_or_infinity(ledger.spent(channel, DELTA)) for ledger in ledgers.values())
            for channel in ("smashed", "output_gradient", "adapter", None)
        }
        return held_out_loss(Path(name) / "adapter", dev), spent


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def rows_of(file: Path) -> list[dict[str, str]]:
    """Read the rows that are there."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def append(file: Path, row: dict[str, object]) -> None:
    """Append a row, and the header before the first."""
    file.parent.mkdir(exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def key(row: dict[str, object] | dict[str, str]) -> tuple[float, int, int]:
    """Name the cell of the grid that a row is of."""
    return float(row["noise_multiplier"]), int(row["bottom_blocks"]), int(row["top_blocks"])


def train_grid() -> None:
    """Fine-tune for every cell that has no row yet."""
    file = RESULTS / "privacy_training.csv"
    there = {key(row) for row in rows_of(file)}
    dev = load("dev.csv", DEV_ROWS)
    shards = {f"client-{index}": load("train.csv", ROWS, start=index * ROWS) for index in range(CLIENTS)}
    for cut in CUTS:
        for noise_multiplier in NOISE:
            cell = {"noise_multiplier": noise_multiplier, "bottom_blocks": cut[0], "top_blocks": cut[1]}
            if key(cell) in there:
                continue
            started_s = time.monotonic()
            loss, spent = train(noise_multiplier, cut, shards, dev)
            one = epsilon([(noise_multiplier, 1)], DELTA)
            append(
                file,
                {
                    **cell,
                    "held_out_loss": round(loss, 4),
                    "epsilon_of_one_release": one or math.inf,
                    **{f"epsilon_{channel}": value for channel, value in spent.items()},
                    "delta": DELTA,
                    "unit": "sequence",
                    "relation": "replace-one",
                    "tokens": MAX_TOKENS,
                    "steps": TRAINING.rounds * TRAINING.local_steps,
                    "machine": machine(),
                },
            )
            took_s = time.monotonic() - started_s
            print(f"{cell}: held out {loss:.3f}, epsilon {spent['total']:.4g}, {took_s:.0f} s", flush=True)


def texts(examples: Sequence[Example]) -> Texts:
    """Pad examples to the run's T."""
    batch = collate(examples, pad_token_id=0, length=MAX_TOKENS)
    return Texts(batch.input_ids_BT, torch.tensor([len(example.input_ids) for example in examples]))


def attack(noise_multiplier: float, cut: tuple[int, int], public: Texts, private: Texts) -> list[AttackResult]:
    """Try every attack on the tokens behind one release of each private sequence."""
    bottom = split(*cut).bottom.eval()
    settled = settle_clip(PrivacySection(noise_multiplier=noise_multiplier), bottom)
    mechanism = smashed_mechanism(settled)
    norm = settled.clipping_norm_smashed
    assert norm is not None
    is_noisy = isinstance(mechanism, GaussianMechanism)
    knowledge = TokenKnowledge(
        bottom=bottom,
        release=mechanism.release,
        clip=(lambda x_BTD: clip(x_BTD, norm, per="token")) if is_noisy else (lambda x_BTD: x_BTD),
        public=public,
        vocabulary=bottom.config.vocab_size,
        log_density=gaussian_log_density(mechanism.noise_std(MAX_TOKENS)) if is_noisy else None,
        is_row_by_row=cut[0] == 0,
    )
    with torch.no_grad():
        smashed_BTD = mechanism.release(bottom(private.input_ids_BT))
    return list(attack_tokens(knowledge, smashed_BTD, private))


def token_attacks() -> Attacks:
    """Prepare the attacks on tokens."""
    public, private = texts(load("train.csv", PUBLIC)), texts(load("dev.csv", PRIVATE))
    return lambda noise_multiplier, cut: attack(noise_multiplier, cut, public, private)


def setting_of(noise_multiplier: float, cut: tuple[int, int]) -> AuditSetting:
    """Open what an audit of a cell works on."""
    config = ServerConfig.model_validate(
        {
            "run": {"directory": RESULTS},
            "model": {"base": str(BASE), "bottom_blocks": cut[0], "top_blocks": cut[1]},
            "training": {"max_tokens": MAX_TOKENS},
            "privacy": {"noise_multiplier": noise_multiplier},
            "codecs": {"smashed": "none", "trunk_output": "none", "output_gradient": "none"},
        }
    )
    public, private = (
        DataSection(path=str(E2E / file), max_rows=rows, prompt_column="mr", completion_column="ref")
        for file, rows in (("train.csv", PUBLIC), ("dev.csv", DEV_ROWS))
    )
    return open_setting(config, public=public, private=private, examples=PRIVATE)


def label_attacks(noise_multiplier: float, cut: tuple[int, int]) -> list[AttackResult]:
    """Try every attack on the labels behind one output gradient of each private sequence."""
    setting = setting_of(noise_multiplier, cut)
    protection = protections(setting)[-1]
    seen = [view(setting, protection, examples) for examples in (setting.public, setting.private)]
    results = gradient_results(setting, protection, *seen, on_progress=lambda part: None)
    return [result for result in results if result.target == "labels"]


def membership_attacks(noise_multiplier: float, cut: tuple[int, int]) -> list[AttackResult]:
    """Tell apart records that a round's update was trained on, and others."""
    games = MembershipGames(setting_of(noise_multiplier, cut), on_progress=lambda part: None)
    outcomes = games.play(is_protected=noise_multiplier > 0, on_progress=lambda part: None)
    return [outcome.result for outcome in outcomes]


def attack_cells(target: str, cuts: Cuts, noises: Sequence[float], attacks: Attacks) -> None:
    """Make the attacks on a target for every cell that has no rows yet."""
    file = RESULTS / "leakage.csv"
    there = {key(row) for row in rows_of(file) if row["target"] == target}
    for cut in cuts:
        for noise_multiplier in noises:
            cell = {"noise_multiplier": noise_multiplier, "bottom_blocks": cut[0], "top_blocks": cut[1]}
            if key(cell) in there:
                continue
            started_s = time.monotonic()
            results = attacks(noise_multiplier, cut)
            for result in results:
                low, high = result.interval()
                append(
                    file,
                    {
                        **cell,
                        "target": target,
                        "attack": result.attack,
                        "recovered": round(result.rate, 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "chance": round(result.chance, 4),
                        "trials": result.trials,
                        "epsilon": _or_infinity(epsilon([(noise_multiplier, 1)], DELTA)),
                    },
                )
            best, took_s = max(results, key=lambda result: result.rate), time.monotonic() - started_s
            print(f"{cell}: {best.attack} recovers {best.rate:.1%} of {target}, {took_s:.0f} s", flush=True)


def main() -> None:
    """Fill the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("training", "tokens", "labels", "membership"), default=None)
    options = parser.parse_args()
    if not (BASE.is_dir() and E2E.is_dir()):
        print(f"skipped: needs {BASE} and {E2E}")
        return
    torch.set_num_threads(1)
    if options.only in (None, "training"):
        train_grid()
    if options.only in (None, "tokens"):
        attack_cells("tokens", ATTACK_CUTS, ATTACK_NOISE, token_attacks())
    if options.only in (None, "labels"):
        attack_cells("labels", LABEL_CUTS, ATTACK_NOISE, label_attacks)
    if options.only in (None, "membership"):
        attack_cells("membership", MEMBERSHIP_CUTS, MEMBERSHIP_NOISE, membership_attacks)


if __name__ == "__main__":
    sys.exit(main())
