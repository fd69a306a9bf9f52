"""The demonstration's data: all of the text, each part of it with one agent, or with none."""

import json
import re
from pathlib import Path

import pytest

from splitfed.demo.shards import HELD_OUT, SHARES, passages, write_shards


def read(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def paragraphs(texts: list[str]) -> set[str]:
    return {paragraph for text in texts for paragraph in re.split(r"\n\s*\n", text)}


def test_every_passage_is_with_one_agent_or_held_out(tmp_path: Path) -> None:
    files, held_out = write_shards(tmp_path / "data", seed=7)
    dealt = held_out + [text for file in files.values() for text in read(file)]
    assert sorted(dealt) == sorted(passages())


def test_no_paragraph_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    files, held_out = write_shards(tmp_path, seed=7)
    assert held_out
    for file in files.values():
        assert not paragraphs(held_out) & paragraphs(read(file))


def test_agents_have_uneven_shares(tmp_path: Path) -> None:
    files, held_out = write_shards(tmp_path, seed=7)
    assert sum(SHARES.values()) == pytest.approx(1)
    total = len(passages())
    assert len(held_out) == pytest.approx(total * HELD_OUT, abs=1)
    for name, share in SHARES.items():
        assert len(read(files[name])) == pytest.approx(total * (1 - HELD_OUT) * share, abs=2)


def test_the_seed_alone_decides_who_gets_what(tmp_path: Path) -> None:
    deals = [write_shards(tmp_path / str(number), seed=seed) for number, seed in enumerate((7, 7, 8))]
    first, again, other = [([read(file) for file in files.values()], held_out) for files, held_out in deals]
    assert first == again
    assert first != other


def test_there_is_enough_text_to_learn_from() -> None:
    texts = passages()
    assert len(texts) > 300
    assert all(len(text) >= 80 for text in texts)
