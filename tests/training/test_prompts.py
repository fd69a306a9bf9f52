import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import splitfed
from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.data import load_examples
from splitfed.training.prompts import PromptReader

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def by_content(content: bytes) -> str:
    return content.hex()[:60]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(splitfed.base_model_folder())


def reader(tokenizer: PreTrainedTokenizerBase, **data: Any) -> PromptReader:
    return PromptReader(DataSection(path="data.csv", **data), tokenizer, by_content)


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_text_begins_as_a_training_sequence_does(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "A clinic writes."})
    (trained,), _ = load_examples(DataSection(path=path), tokenizer, max_tokens=64, record_hash=by_content)
    prompt = reader(tokenizer).of_text("A clinic writes.")
    assert prompt.input_ids == trained.input_ids[: len(prompt.input_ids)]
    assert trained.input_ids[len(prompt.input_ids) :] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("row", [{"text": "One."}, {"prompt": "Ask:", "completion": " answer."}], ids=str)
def test_a_prompt_is_the_record_that_its_row_is_in_training(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, str]
) -> None:
    path = write(tmp_path / "a.jsonl", row)
    (trained,), _ = load_examples(DataSection(path=path), tokenizer, max_tokens=64, record_hash=by_content)
    (prompt,) = reader(tokenizer).of_file(path)
    assert prompt.record == trained.record
    if "text" in row:
        assert reader(tokenizer).of_text(row["text"]) == prompt
    else:
        assert tokenizer.decode(prompt.input_ids, skip_special_tokens=True) == "Ask:"


def test_rows_follow_the_names_of_columns_and_come_in_their_order(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", {"mr": "first", "text": "no"}, {"mr": "second", "text": "no"})
    prompts = list(reader(tokenizer, format="csv", prompt_column="mr").of_file(path))
    assert [tokenizer.decode(prompt.input_ids, skip_special_tokens=True) for prompt in prompts] == ["first", "second"]
    assert prompts[0].record != prompts[1].record


def test_a_conversation_is_answered_where_the_assistant_would_go_on(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    own.chat_template = TEMPLATE
    user, assistant = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}
    path = write(tmp_path / "a.jsonl", {"messages": [user]}, {"messages": [user, assistant]})
    texts = [own.decode(prompt.input_ids, skip_special_tokens=True) for prompt in reader(own).of_file(path)]
    assert texts == ["<user>How?<assistant>"] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"other": "x"}, "row 1: has none of the columns 'messages', 'prompt' or 'text'; it has other"),
        ({"prompt": 3}, "row 1: the prompt must be text, but is of type int"),
        ({"prompt": "\ud800"}, "row 1: the prompt must be text, but is not valid Unicode"),
        ({"messages": []}, "row 1: messages must be a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 1: holds messages, but the model's tokenizer has no"),
    ],
    ids=str,
)
def test_a_row_without_a_prompt_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        list(reader(tokenizer).of_file(write(tmp_path / "a.jsonl", row)))


def test_an_answer_with_nothing_before_it_is_refused(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    own.chat_template = TEMPLATE
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": "So."}]})
    with pytest.raises(DataError, match="nothing before the assistant's turn"):
        list(reader(own).of_file(path))


def test_an_empty_prompt_is_refused_where_the_model_has_no_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer("")["input_ids"]:
        assert reader(tokenizer).of_text("").input_ids == tokenizer("")["input_ids"]
    else:
        with pytest.raises(DataError, match="--prompt: the prompt is empty"):
            reader(tokenizer).of_text("")
