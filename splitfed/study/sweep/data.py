"""The data of a sweep: read once, dealt anew for each run, and known by a hash of their content."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from splitfed.config.sweep import SweepDataSection
from splitfed.errors import DataError
from splitfed.training.data import Example, load_examples
from splitfed.training.objective import Objective
from splitfed.training.rows import read_rows
from splitfed.training.shards import dirichlet_shards, iid_shards, label_shards, topic_of


@dataclass(frozen=True)
class SweepData:
    """What runs train and are measured on.

    Attributes:
        train: Examples to deal.
        labels: Label of each of them; empty where none is configured.
        held_out: Examples to measure on.
    """

    train: Sequence[Example]
    labels: Sequence[str]
    held_out: Sequence[Example]


def data_hash(data: SweepDataSection) -> str:
    """Hash the rows of training and held-out data, whatever file they are in.

    Raises:
        DataError: If a file cannot be read, or lacks the column of the label.
    """
    digest = hashlib.sha256()
    for path in filter(None, (data.path, data.held_out_path)):
        for _, row in _rows(data, path):
            if path == data.path and data.label_column is not None and data.label_column not in row:
                raise DataError(
                    f"{path}: has no column {data.label_column!r}; it has {', '.join(row)}: name one of these in "
                    "data.label_column"
                )
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def load_sweep_data(data: SweepDataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> SweepData:
    """Read and cut the data; which rows are held out depends on their content alone.

    Args:
        data: The section.
        tokenizer: The base model's tokenizer.
        max_tokens: The run's T.

    Raises:
        DataError: If a file is missing, empty, wrongly shaped, or leaves nothing to learn.
    """
    train, held_out = load_examples(data, tokenizer, max_tokens=max_tokens, record_hash=_record)
    if not len(held_out):
        raise DataError(f"{data.held_out_path}: has nothing to measure on; give rows with a token to learn")
    by_record = _labels(data)
    count = min(data.held_out_examples or len(held_out), len(held_out))
    return SweepData(
        train,
        [by_record[record] for record in train.sequence_records] if by_record else [],
        [held_out[place * len(held_out) // count] for place in range(count)],
    )


def deal(found: SweepData, data: SweepDataSection, *, agents: int, seed: int) -> dict[str, list[Example]]:
    """Give each agent its examples.

    Args:
        found: The data.
        data: How they are dealt.
        agents: Number of agents.
        seed: Decides who gets what.

    Raises:
        ValueError: If there are too few examples, or they cannot be dealt in that way.
    """
    names = [f"agent-{number:02d}" for number in range(agents)]
    drawn = _drawn(len(found.train), data.examples_per_agent, agents, seed)
    labels = [found.labels[index] for index in drawn] if data.deal != "iid" else []
    shards: Mapping[str, Sequence[int]]
    if data.deal == "dirichlet":
        assert data.alpha is not None
        shards = dirichlet_shards(labels, names, data.alpha, seed)
    elif data.deal == "labels":
        assert data.labels_per_agent is not None
        shards = label_shards(labels, names, data.labels_per_agent, seed)
    else:
        shards = iid_shards(len(drawn), names, seed)
    return {name: [found.train[drawn[index]] for index in shard] for name, shard in shards.items()}


def _drawn(n: int, per_agent: int | None, agents: int, seed: int) -> list[int]:
    """Draw the examples that are dealt at all."""
    if per_agent is None:
        return list(range(n))
    if per_agent * agents > n:
        raise ValueError(
            f"data.examples_per_agent = {per_agent} for {agents} agents takes {per_agent * agents} examples, but there "
            f"are {n}; lower it, or give more data"
        )
    key = hashlib.sha256(json.dumps(["sweep", "pool", agents, seed]).encode()).digest()[:16]
    order = np.random.Generator(np.random.Philox(key=int.from_bytes(key))).permutation(n)
    return [int(index) for index in order[: per_agent * agents]]


def _record(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _rows(data: SweepDataSection, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with closing(read_rows(data, path)) as rows:
        yield from islice(rows, data.max_rows)


def _labels(data: SweepDataSection) -> dict[str, str]:
    """Find the label of each record; of rows that are learned from alike, the first one's."""
    found: dict[str, str] = {}
    if data.label_column is None:
        return found
    objective: Objective | None = None
    for number, row in _rows(data, data.path):
        objective = objective or Objective.of(data, list(row), data.path)
        content = json.dumps(objective.fields(number, row), ensure_ascii=False, sort_keys=True, default=str)
        label = str(row[data.label_column])
        if data.label_attribute is not None:
            label = topic_of(label, data.label_attribute)
        found.setdefault(_record(content.encode()), label)
    return found
