"""A sweep whose runs take a tenth of a second: a random model of 4 blocks, and rows of a few words."""

import json
import random
from pathlib import Path

from tests.equivalence.tiny_models import tiny_model
from tests.training.conftest import word_tokenizer

FRUIT, ROWS = ("apple", "pear", "plum"), 60


def write_base(folder: Path) -> Path:
    """Write a base model with its tokenizer."""
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer(with_bos=True).save_pretrained(folder)
    return folder


def write_rows(file: Path, *, seed: int = 0) -> Path:
    """Write rows of 4 to 7 words, each of one of three kinds."""
    draw = random.Random(seed)
    rows = []
    for number in range(ROWS):
        words = [f"w{draw.randrange(10)}" for _ in range(draw.randint(4, 7))]
        rows.append({"text": " ".join(words), "kind": f"fruit[{FRUIT[number % 3]}], size[{number}]"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_sweep(folder: Path, grid: str, *, base: Path, rounds: int = 2, data: str = "", more: str = "") -> Path:
    """Write a sweep's file, with its rows beside it."""
    write_rows(folder / "rows.jsonl")
    file = folder / "sweep.toml"
    file.write_text(
        f'[model]\nbase = "{base}"\n[lora]\nrank = 2\n'
        f"[training]\nrounds = {rounds}\nlocal_steps = 2\nbatch_size = 2\nmax_tokens = 8\nlearning_rate = 0.01\n"
        f'[federation]\nagents = 2\n[data]\npath = "rows.jsonl"\nheld_out_fraction = 0.3\n{data}\n'
        f'[output]\ncsv = "sweep.csv"\n{more}\n[grid]\n{grid}\n'
    )
    return file
