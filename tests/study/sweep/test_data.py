"""The data of a sweep: dealt by labels, drawn by seed, and known by content."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from splitfed.config.sweep import SweepDataSection
from splitfed.study.sweep.data import SweepData, data_hash, deal, load_sweep_data
from tests.study.sweep.small_sweep import FRUIT, ROWS, write_rows
from tests.training.conftest import word_tokenizer

LABELLED: dict[str, Any] = {"label_column": "kind", "label_attribute": "fruit", "held_out_fraction": 0.2}


def section(folder: Path, **keys: Any) -> SweepDataSection:
    return SweepDataSection(path=str(write_rows(folder / "rows.jsonl")), **keys)


def load(data: SweepDataSection) -> SweepData:
    return load_sweep_data(data, word_tokenizer(with_bos=True), max_tokens=8)


def test_every_example_has_the_label_of_its_row(tmp_path: Path) -> None:
    data = section(tmp_path, **LABELLED)
    found = load(data)
    rows = [json.loads(line) for line in Path(data.path).read_text().splitlines()]
    by_text = {row["text"]: row["kind"].removeprefix("fruit[").partition("]")[0] for row in rows}
    assert len(by_text) == ROWS
    texts = [" ".join(f"w{token - 4}" for token in each.input_ids if token >= 4) for each in found.train]
    whole = [(text, label) for text, label in zip(texts, found.labels, strict=True) if text in by_text]
    assert len(whole) > 20
    assert all(by_text[text] == label for text, label in whole)


def test_agents_get_few_labels_where_they_are_dealt_by_label(tmp_path: Path) -> None:
    data = section(tmp_path, deal="labels", labels_per_agent=1, **LABELLED)
    found = load(data)
    by_record = {example.record: label for example, label in zip(found.train, found.labels, strict=True)}
    shards = deal(found, data, agents=3, seed=0)
    kinds = [sorted({by_record[each.record] for each in shard}) for shard in shards.values()]
    assert sorted(kinds) == [[fruit] for fruit in sorted(FRUIT)]


def test_a_small_alpha_makes_mixes_unlike(tmp_path: Path) -> None:
    def largest_share(alpha: float) -> float:
        data = section(tmp_path, deal="dirichlet", alpha=alpha, **LABELLED)
        found = load(data)
        by_record = {example.record: label for example, label in zip(found.train, found.labels, strict=True)}
        (shard, *_) = deal(found, data, agents=3, seed=1).values()
        return max(Counter(by_record[each.record] for each in shard).values()) / len(shard)

    assert largest_share(0.01) > largest_share(1000.0)


def test_each_seed_draws_its_own_examples_and_never_more_than_there_are(tmp_path: Path) -> None:
    data = section(tmp_path, held_out_fraction=0.2, examples_per_agent=5)
    found = load(data)
    first, second = (deal(found, data, agents=2, seed=seed) for seed in (0, 1))
    assert [len(shard) for shard in first.values()] == [5, 5]
    assert first == deal(found, data, agents=2, seed=0) != second
    with pytest.raises(
        ValueError, match=r"data\.examples_per_agent = 5 for 90 agents takes 450 examples, but there are"
    ):
        deal(found, data, agents=90, seed=0)


def test_held_out_examples_are_the_same_in_every_run_and_never_dealt(tmp_path: Path) -> None:
    data = section(tmp_path, held_out_fraction=0.3)
    found, few = load(data), load(section(tmp_path, held_out_fraction=0.3, held_out_examples=4))
    assert load(data).held_out == found.held_out
    assert [each in found.held_out for each in few.held_out] == [True] * 4
    dealt = {each.record for shard in deal(found, data, agents=3, seed=0).values() for each in shard}
    assert not dealt & {each.record for each in found.held_out}
    assert len(found.held_out) + len(found.train) == ROWS


def test_the_hash_is_of_the_rows_that_are_read_and_not_of_the_file(tmp_path: Path) -> None:
    data = section(tmp_path, held_out_fraction=0.3)
    lines = Path(data.path).read_text().splitlines()
    as_list = tmp_path / "list.json"
    as_list.write_text(json.dumps([json.loads(line) for line in lines]))
    assert data_hash(data) == data_hash(SweepDataSection(path=str(as_list)))
    assert data_hash(data) != data_hash(data.model_copy(update={"max_rows": ROWS - 1}))
    held_out = data.model_copy(update={"held_out_path": str(as_list)})
    assert len({data_hash(data), data_hash(held_out)}) == 2
