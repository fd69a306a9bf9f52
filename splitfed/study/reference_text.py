"""Text that every Python has, for studies that need no data set: the language reference behind ``help()``."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

KINDS: Final = ("prose", "mixed", "code")
"""How a topic is laid out: a third of all topics each, by the share of their lines that are indented as code is."""

_INDENT: Final = "   "


def write_reference(path: Path | str, *, start: int = 0, step: int = 1, most_letters: int | None = None) -> Path:
    """Write topics of the language reference as a JSONL file: a row each, with ``topic``, ``kind`` and ``text``.

    ``kind`` is a label to deal rows by, one of ``KINDS``.

    Args:
        path: Where to write it.
        start: The first topic to take, in the order of their names.
        step: Take every so many; files with the same step and other starts below it have no topic in common.
        most_letters: Leave out what a text has beyond.

    Returns:
        The file.

    Raises:
        ValueError: If there is no topic to take, or ``step`` is below 1.
    """
    names = sorted(topics)
    if not (0 <= start < len(names) and step >= 1):
        raise ValueError(
            f"start is {start} and step {step}; give a start from 0 to {len(names) - 1} and a step of 1 or more."
        )
    by_layout = sorted(names, key=lambda name: (_indented(topics[name]), name))
    kinds = {name: KINDS[place * len(KINDS) // len(names)] for place, name in enumerate(by_layout)}
    rows = [{"topic": name, "kind": kinds[name], "text": topics[name][:most_letters]} for name in names[start::step]]
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _indented(text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(line.startswith(_INDENT) for line in lines) / max(len(lines), 1)
