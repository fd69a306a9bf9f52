"""The agent's own data as examples: token ids, labels, and the record that the privacy ledger counts.

Shapes: B sequences, T tokens.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.objective import IGNORED_LABEL, Objective, Sequenced
from splitfed.training.rows import read_rows

RecordHash = Callable[[bytes], str]

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train or evaluate on.

    Attributes:
        input_ids: Token ids, at most the run's T of them.
        labels: At each position the token to predict there, or -100 where none carries loss. Not shifted.
        record: Salted hash of the row that the sequence comes from; a row cut into k sequences is in k examples.
    """

    input_ids: list[int]
    labels: list[int]
    record: str


_NOTHING = Example([], [], "")


class ExampleSet(Sequence[Example]):
    """Many examples in little memory: 8 bytes a token.

    Attributes:
        rows: Rows that were read.
        dropped_rows: Rows left out because no token carries loss, such as an empty completion.
        shortened_rows: Rows of which a part was cut off to fit the run's T.
        most_of_a_row: Most sequences that one row was cut into.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.dropped_rows = 0
        self.shortened_rows = 0
        self.most_of_a_row = 0
        self._input_ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])
        self._records: list[str] = []

    def add_row(self, sequences: Sequence[Sequenced], record: str) -> None:
        """Append the sequences of one row, which may be none."""
        self.rows += 1
        self.dropped_rows += not sequences
        self.shortened_rows += any(sequence.tokens_left_out for sequence in sequences)
        self.most_of_a_row = max(self.most_of_a_row, len(sequences))
        for sequence in sequences:
            self._input_ids.extend(sequence.input_ids)
            self._labels.extend(sequence.labels)
            self._ends.append(len(self._input_ids))
            self._records.append(record)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        tokens = slice(self._ends[at], self._ends[at + 1])
        return Example(self._input_ids[tokens].tolist(), self._labels[tokens].tolist(), self._records[at])

    @property
    def sequence_records(self) -> list[str]:
        """The record of each sequence."""
        return list(self._records)

    @property
    def records(self) -> list[str]:
        """The distinct records, in the order of the file."""
        return list(dict.fromkeys(self._records))


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right to one length.

    Attributes:
        input_ids_BT: Token ids, int64, shape [B, T].
        labels_BT: Labels, int64, shape [B, T]; -100 where none carries loss, padding included.
        records: Record of each sequence that is an example.
        is_real_B: False where a row holds no example, shape [B]; None = all rows do, and may show it.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    records: list[str]
    is_real_B: Tensor | None = None


def load_examples(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, record_hash: RecordHash
) -> tuple[ExampleSet, ExampleSet]:
    """Read the agent's data and cut it into examples.

    Args:
        data: The agent's section on its data.
        tokenizer: The base model's tokenizer.
        max_tokens: The run's T, at least 2.
        record_hash: Salted hash of a row's content in hexadecimal digits, which names it in the ledger.

    Returns:
        What to train on and what to evaluate on; the second is empty when nothing is held out. With
        ``held_out_fraction``, a row's content and the salt decide on which side it is: equal rows stay together, in
        every run under that salt, and how many are held out says nothing about what they are.

    Raises:
        DataError: If a file is missing, empty, wrongly shaped, or leaves nothing to learn.
        ValueError: If ``max_tokens`` is below 2.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; a sequence has 2 tokens or more, one to predict from the other")
    train, held_out = _load(
        data, data.path, tokenizer, max_tokens, record_hash, held_out_fraction=data.held_out_fraction
    )
    if data.held_out_path is not None:
        held_out, _ = _load(data, data.held_out_path, tokenizer, max_tokens, record_hash, held_out_fraction=0.0)
    elif data.held_out_fraction and not (len(train) and len(held_out)):
        n_rows, purpose = train.rows + held_out.rows, "evaluate" if len(train) else "train"
        raise DataError(
            f"{data.path}: data.held_out_fraction = {data.held_out_fraction} leaves none of {n_rows} rows to {purpose} "
            "on; change it, or give data.held_out_path"
        )
    return train, held_out


def collate(examples: Sequence[Example | None], *, pad_token_id: int, length: int | None = None) -> Batch:
    """Pad examples on the right and stack them.

    Args:
        examples: At least one; None = a row of padding that carries no loss.
        pad_token_id: Token id of the padding.
        length: Tokens to pad to, the run's T with noise on; None = the longest example.

    Returns:
        The batch. With a ``length`` it has the same form and takes the same work whatever rows hold an example.

    Raises:
        ValueError: If there are no examples, or one is longer than ``length``.
    """
    longest = max((len(example.input_ids) for example in examples if example is not None), default=0)
    T = longest if length is None else length
    if not examples or T == 0:
        raise ValueError("there are no examples to collate")
    if longest > T:
        raise ValueError(f"an example has {longest} tokens, more than the length {T} to pad to")
    held = [_NOTHING if example is None else example for example in examples]
    is_real = [example is not None for example in examples]
    return Batch(
        torch.tensor([_filled(example.input_ids, pad_token_id, T) for example in held]),
        torch.tensor([_filled(example.labels, IGNORED_LABEL, T) for example in held]),
        [example.record for example in examples if example is not None],
        None if length is None and all(is_real) else torch.tensor(is_real),
    )


def _filled(values: list[int], filler: int, length: int) -> list[int]:
    return values + [filler] * (length - len(values))


def _load(
    data: DataSection,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    record_hash: RecordHash,
    *,
    held_out_fraction: float,
) -> tuple[ExampleSet, ExampleSet]:
    sides = ExampleSet(), ExampleSet()
    objective: Objective | None = None
    with closing(read_rows(data, path)) as rows:
        numbered = islice(rows, data.max_rows)
        while chunk := list(islice(numbered, _ROWS_AT_ONCE)):
            objective = objective or Objective.of(data, list(chunk[0][1]), path)
            fields = [objective.fields(number, row) for number, row in chunk]
            for content, sequences in zip(
                fields, objective.sequences(fields, tokenizer, max_tokens=max_tokens), strict=True
            ):
                content_bytes = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()
                is_held_out = _is_held_out(content_bytes, held_out_fraction, record_hash)
                sides[is_held_out].add_row(sequences, record_hash(content_bytes))
    n_rows = sum(side.rows for side in sides)
    if n_rows == 0:
        raise DataError(f"{path}: is empty; give a file with at least one row")
    if not any(len(side) for side in sides):
        raise DataError(f"{path}: none of its {n_rows} rows has a token to learn; look at the columns named in [data]")
    return sides


def _is_held_out(content: bytes, fraction: float, record_hash: RecordHash) -> bool:
    """Draw a row's side by a hash under the salt: by a public one, the count that a server sees would be of its own
    making.
    """
    return fraction > 0 and int(record_hash(b"held out\0" + content)[:16], 16) < fraction * 2**64
