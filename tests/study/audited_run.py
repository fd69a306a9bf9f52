"""A run small enough to audit in a test: the model that comes with splitfed, and a few prompts with completions."""

import json
import random

from splitfed.config import DataSection, load_server_config
from splitfed.study.audit_setting import open_setting

_WORDS = [name for name in dir(str) if name.isalpha() and len(name) < 6]


def write_rows(path, count, *, seed):
    """Prompts of two words and completions of three, all different."""
    draw = random.Random(seed)
    rows = [
        {"prompt": " ".join(draw.sample(_WORDS, 2)), "completion": " " + " ".join(draw.sample(_WORDS, 3))}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path, *, bottom_blocks=1, top_blocks=1, privacy="", **training):
    """A server's configuration; what is not said is as small as it can be."""
    settings = {"max_tokens": 14, "local_steps": 2, "batch_size": 2, "rounds": 1} | training
    lines = [
        '[run]\nname = "small"\ndirectory = "run"',
        f'[model]\nbase = "demo"\nbottom_blocks = {bottom_blocks}\ntop_blocks = {top_blocks}',
        "[lora]\nrank = 2",
        "[training]",
        *(f"{name} = {value}" for name, value in settings.items()),
        f"[privacy]\n{privacy}",
    ]
    path.write_text("\n".join(lines))
    return path


def setting_of(folder, *, public=40, private=16, examples=4, **options):
    """Open a small run in a folder."""
    config = load_server_config(write_config(folder / "server.toml", **options))
    files = [
        DataSection(path=str(write_rows(folder / f"{name}.jsonl", count, seed=seed)))
        for seed, (name, count) in enumerate((("public", public), ("private", private)))
    ]
    return open_setting(config, public=files[0], private=files[1], examples=examples)
