"""Private-looking data from text that ships with Python: the language reference, cut into uneven shards."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

SHARES = {"clinic": 0.6, "branch": 0.3, "phone": 0.1}
"""Each agent's part of the text."""

HELD_OUT = 0.1
"""Part of the text that nobody trains on."""

_LEAST_CHARACTERS = 80
_LONGEST_CHARACTERS = 600


def passages() -> list[str]:
    """Cut the language reference into passages of a few paragraphs, in its own order.

    Topics overlap, and some are the same under several names: each paragraph is taken once, so that nothing that is
    held out is trained on elsewhere.
    """
    found: list[str] = []
    seen: set[str] = set()
    for name in sorted(topics):
        passage = ""
        for paragraph in map(str.strip, re.split(r"\n\s*\n", topics[name])):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            passage = f"{passage}\n\n{paragraph}".strip()
            if len(passage) >= _LONGEST_CHARACTERS:
                found.append(passage)
                passage = ""
        if len(passage) >= _LEAST_CHARACTERS:
            found.append(passage)
    return found


def write_shards(folder: Path, *, seed: int) -> tuple[dict[str, Path], list[str]]:
    """Write each agent's data file.

    Args:
        folder: Where to; it is made.
        seed: Decides who gets what.

    Returns:
        The file of each agent, and the passages that are held out from all.
    """
    texts = passages()
    random.Random(seed).shuffle(texts)
    n_held_out = round(len(texts) * HELD_OUT)
    held_out, rest = texts[:n_held_out], texts[n_held_out:]
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    start = 0.0
    for name, share in SHARES.items():
        part = rest[round(start * len(rest)) : round((start + share) * len(rest))]
        start += share
        files[name] = folder / f"{name}.jsonl"
        _write(files[name], part)
    return files, held_out


def _write(file: Path, texts: Sequence[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
