"""From files to examples and batches."""

import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.data import Example, ExampleSet, collate, load_examples

Write = Callable[[str, str | bytes], str]


def salted(content: bytes, salt: bytes = b"salt") -> str:
    return hmac.digest(salt, content, "sha256").hex()


def load(
    path: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int = 16, **settings: Any
) -> tuple[ExampleSet, ExampleSet]:
    return load_examples(DataSection(path=path, **settings), tokenizer, max_tokens=max_tokens, record_hash=salted)


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_the_sequences_of_a_row_share_its_record_and_rows_differ(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    train, held_out = load(write("a.jsonl", lines("w1 w2 w3 w4 w5 w6", "w7")), tokenizer, max_tokens=4)
    assert [example.input_ids for example in train] == [[1, 5, 6, 7], [8, 9, 10, 2], [1, 11, 2]]
    assert train[0].record == train[1].record != train[2].record
    assert train.records == [train[0].record, train[2].record]
    assert len(held_out) == 0


def test_a_row_that_is_cut_is_told_from_a_row_that_stands_there_twice(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    cut, _ = load(write("a.jsonl", lines("w1 w2 w3 w4 w5 w6", "w7")), tokenizer, max_tokens=4)
    twice, _ = load(write("b.jsonl", lines("w1", "w7", "w1")), tokenizer, max_tokens=4)
    assert (cut.most_of_a_row, twice.most_of_a_row) == (2, 1)
    assert len(twice) - len(twice.records) == 1


def test_a_record_is_the_salted_hash_of_the_columns_that_are_learned(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, _ = load(write("a.jsonl", '{"prompt": "w1", "completion": "w2", "id": 1}\n'), tokenizer)
    again, _ = load(write("b.csv", "id,completion,prompt\n2,w2,w1\n"), tokenizer)
    other, _ = load(write("c.csv", "completion,prompt\nw1,w2\n"), tokenizer)
    assert first[0].record == again[0].record == salted(b'["w1", "w2"]')
    assert other[0].record != first[0].record


def test_rows_with_nothing_to_learn_are_counted(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    train, _ = load(write("a.csv", "prompt,completion\nw1,w2\nw3,\nw4 w5 w6 w7,w8\n"), tokenizer, max_tokens=5)
    assert (train.rows, train.dropped_rows, train.shortened_rows, len(train)) == (3, 1, 1, 2)


def test_examples_are_read_like_a_list(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    train, _ = load(write("a.jsonl", lines("w1", "w2", "w3")), tokenizer)
    assert train[-1] == list(train)[2] == train[1:][1]
    assert train[0] == Example([1, 5, 2], [1, 5, 2], train[0].record)
    with pytest.raises(IndexError):
        train[3]


def test_max_rows_bounds_what_is_read(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", lines("w1", "w2") + "not JSON\n")
    train, _ = load(path, tokenizer, max_rows=2)
    assert train.rows == 2


def test_more_rows_than_are_tokenized_at_once_keep_their_order(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    train, _ = load(write("a.jsonl", lines(*(f"w{number % 40}" for number in range(2500)))), tokenizer)
    assert [example.input_ids[1] for example in train] == [4 + number % 40 for number in range(2500)]


def test_a_held_out_file_is_read_beside_the_training_file(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held_out = load(write("a.jsonl", lines("w1")), tokenizer, held_out_path=write("b.csv", "text\nw2\nw3\n"))
    assert (len(train), len(held_out)) == (1, 2)


def test_equal_rows_stay_on_one_side_whatever_the_order_and_only_the_salt_tells_on_which(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [f"w{first} w{second}" for first in range(40) for second in range(10)]
    path = write("a.jsonl", lines(*texts, *texts))
    turned = write("b.jsonl", lines(*reversed(texts)))
    train, held_out = load(path, tokenizer, held_out_fraction=0.25)
    assert set(train.records).isdisjoint(held_out.records)
    # 400 distinct rows: 100 expected, standard deviation sqrt(400 * 0.25 * 0.75) = 8.7; 5 of them = 43.
    assert abs(len(held_out.records) - 100) < 43
    data = DataSection(path=turned, held_out_fraction=0.25)
    _, again = load_examples(data, tokenizer, max_tokens=16, record_hash=salted)
    _, other = load_examples(data, tokenizer, max_tokens=16, record_hash=lambda content: salted(content, b"other"))
    sets = [{tuple(example.input_ids) for example in each} for each in (held_out, again, other)]
    assert sets[0] == sets[1]
    # Independent sides: 400 / 16 = 25 rows in common expected, standard deviation 4.8.
    assert len(sets[0] & sets[2]) < 25 + 5 * 4.8


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ("", {}, "is empty; give a file with at least one row"),
        ("\n\n", {}, "is empty; give a file with at least one row"),
        (lines("", ""), {}, r"none of its 2 rows has a token to learn; look at the columns named in \[data\]"),
        (
            lines("w1"),
            {"held_out_fraction": 0.0001},
            r"data\.held_out_fraction = 0\.0001 leaves none of 1 rows to evaluate on; change it, or give",
        ),
        (
            lines("w1"),
            {"held_out_fraction": 0.9999},
            r"data\.held_out_fraction = 0\.9999 leaves none of 1 rows to train on; change it, or give",
        ),
        ('{"mr": "w1", "ref": "w2"}\n', {}, r"has none of the columns .* it has mr, ref: name the right ones"),
    ],
)
def test_a_file_that_leaves_nothing_to_learn_is_explained(
    write: Write, tokenizer: PreTrainedTokenizerFast, content: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl: {said}"):
        load(write("a.jsonl", content), tokenizer, **settings)


def test_a_sequence_of_one_token_is_refused(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_tokens is 1"):
        load(write("a.jsonl", lines("w1")), tokenizer, max_tokens=1)


def test_batches_are_padded_on_the_right_by_position() -> None:
    # The padding's id may be that of a real token, here the end: it carries loss where it is real.
    examples = [Example([5, 6, 2], [-100, 6, 2], "a"), Example([7, 2], [7, 2], "b")]
    batch = collate(examples, pad_token_id=2)
    assert torch.equal(batch.input_ids_BT, torch.tensor([[5, 6, 2], [7, 2, 2]]))
    assert torch.equal(batch.labels_BT, torch.tensor([[-100, 6, 2], [7, 2, -100]]))
    assert batch.records == ["a", "b"]
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64


def test_batches_can_all_have_the_runs_length() -> None:
    batch = collate([Example([5], [5], "a")], pad_token_id=0, length=4)
    assert batch.input_ids_BT.tolist() == [[5, 0, 0, 0]]
    assert batch.labels_BT.tolist() == [[5, -100, -100, -100]]


def test_a_row_without_an_example_is_padding_that_carries_no_loss() -> None:
    batch = collate([None, Example([5, 6], [5, 6], "a"), None], pad_token_id=9, length=3)
    assert batch.input_ids_BT.tolist() == [[9, 9, 9], [5, 6, 9], [9, 9, 9]]
    assert batch.labels_BT.tolist() == [[-100] * 3, [5, 6, -100], [-100] * 3]
    assert batch.records == ["a"]
    assert batch.is_real_B is not None
    assert batch.is_real_B.tolist() == [False, True, False]
    empty = collate([None, None], pad_token_id=9, length=3)
    assert empty.input_ids_BT.shape == (2, 3)
    assert empty.records == []


def test_a_batch_of_the_runs_length_has_one_form_whatever_rows_hold_an_example() -> None:
    text = Example([5], [5], "a")
    for rows in ([text, text], [text, None], [None, None]):
        batch = collate(rows, pad_token_id=9, length=3)
        assert batch.is_real_B is not None
        assert batch.is_real_B.tolist() == [row is not None for row in rows]
    assert collate([text, text], pad_token_id=9).is_real_B is None


def test_what_cannot_be_collated_is_refused() -> None:
    with pytest.raises(ValueError, match="an example has 3 tokens, more than the length 2"):
        collate([Example([1, 2, 3], [1, 2, 3], "a")], pad_token_id=0, length=2)
    with pytest.raises(ValueError, match="no examples"):
        collate([], pad_token_id=0)
    with pytest.raises(ValueError, match="no examples"):
        collate([None, None], pad_token_id=0)


def test_real_rows_become_prompts_and_completions(e2e: Path, stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    path = e2e / "dev.csv"
    settings = {"prompt_column": "mr", "completion_column": "ref", "max_rows": 200}
    train, _ = load(str(path), tokenizer, max_tokens=256, **settings)
    assert (train.rows, train.dropped_rows, train.shortened_rows) == (200, 0, 0)
    first = train[0]
    learned = [label for label in first.labels if label != -100]
    assert tokenizer.decode(first.input_ids).startswith("<s> name[Alimentum], area[city centre]")
    assert (
        tokenizer.decode(learned[:-1]) == "There is a place in the city centre, Alimentum, that is not family-friendly."
    )
    assert learned[-1] == tokenizer.eos_token_id
    assert first.record == salted(json.dumps(_first_row(path)).encode())
    assert len(train.records) == len({hashlib.sha256(repr(example).encode()).digest() for example in train})


def _first_row(path: Path) -> list[str]:
    import csv

    with path.open(newline="") as lines_:
        row = next(csv.DictReader(lines_))
    return [row["mr"], row["ref"]]
