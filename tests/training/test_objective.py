"""Which tokens go in, and which carry loss. Words are tokens here: wN has the id N + 4."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.objective import IGNORED_LABEL, Objective, Sequenced

from .conftest import TEMPLATE, WORDS, word_tokenizer

EOS = 2
BOS = 1
DATA = DataSection(path="rows.csv")


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


def sequences(
    objective: str, row: tuple[Any, ...], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int
) -> list[Sequenced]:
    columns = {"text": ("text",), "completion": ("prompt", "completion"), "messages": ("messages",)}[objective]
    made = Objective(objective, columns, "rows.csv")  # type: ignore[arg-type]
    (one,) = made.sequences([row], tokenizer, max_tokens=max_tokens)
    return one


def test_text_carries_loss_everywhere_and_ends_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = [BOS, *ids(words(3)), EOS]
    assert sequences("text", (words(3),), tokenizer, max_tokens=8) == [Sequenced(whole, whole)]


def test_a_tokenizer_without_a_first_token_gets_none(bare_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = [*ids(words(3)), EOS]
    assert sequences("text", (words(3),), bare_tokenizer, max_tokens=8) == [Sequenced(whole, whole)]


def test_long_text_is_cut_into_sequences_that_lose_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = sequences("text", (words(9),), tokenizer, max_tokens=4)
    assert [len(sequence.input_ids) for sequence in cut] == [4, 4, 3]
    assert [token for sequence in cut for token in sequence.input_ids] == [BOS, *ids(words(9)), EOS]
    assert all(sequence.labels == sequence.input_ids for sequence in cut)


def test_a_last_piece_of_one_token_has_nothing_to_predict(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = sequences("text", (words(7),), tokenizer, max_tokens=4)  # 9 tokens with the first and the last
    assert [len(sequence.input_ids) for sequence in cut] == [4, 4]


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_text_gives_no_sequence(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert sequences("text", (text,), tokenizer, max_tokens=4) == []


def test_a_prompt_carries_no_loss_and_its_completion_does(tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = sequences("completion", (words(2), words(2, 10)), tokenizer, max_tokens=8)
    assert sequence.input_ids == [BOS, *ids("w0 w1 w10 w11"), EOS]
    assert sequence.labels == [IGNORED_LABEL] * 3 + [*ids("w10 w11"), EOS]
    assert sequence.tokens_left_out == 0


def test_a_long_prompt_loses_its_beginning_and_keeps_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = sequences("completion", (words(9), words(2, 10)), tokenizer, max_tokens=6)
    assert sequence.input_ids == [BOS, *ids("w7 w8 w10 w11"), EOS]
    assert sequence.labels == [IGNORED_LABEL] * 3 + [*ids("w10 w11"), EOS]
    assert sequence.tokens_left_out == 13 - 6


def test_a_long_prompt_loses_its_beginning_without_a_first_token(bare_tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = sequences("completion", (words(9), words(2, 10)), bare_tokenizer, max_tokens=6)
    assert sequence.input_ids == [*ids("w6 w7 w8 w10 w11"), EOS]


@pytest.mark.parametrize("prompt", [words(9), "w0", ""])
def test_a_completion_that_does_not_fit_keeps_its_beginning(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    (sequence,) = sequences("completion", (prompt, words(9, 10)), tokenizer, max_tokens=6)
    assert sequence.input_ids == [BOS, *ids(words(5, 10))]
    assert sequence.labels == [IGNORED_LABEL, *ids(words(5, 10))]
    assert sequence.tokens_left_out > 0


def test_an_empty_completion_gives_no_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sequences("completion", (words(3), ""), tokenizer, max_tokens=8) == []


@pytest.mark.parametrize("max_tokens", range(2, 12))
@pytest.mark.parametrize("n_prompt", range(6))
@pytest.mark.parametrize("n_completion", range(1, 6))
def test_every_length_keeps_a_learned_token_and_the_bound(
    tokenizer: PreTrainedTokenizerFast, max_tokens: int, n_prompt: int, n_completion: int
) -> None:
    row = (words(n_prompt), words(n_completion, 10))
    (sequence,) = sequences("completion", row, tokenizer, max_tokens=max_tokens)
    assert len(sequence.input_ids) == len(sequence.labels) == min(max_tokens, n_prompt + n_completion + 2)
    learned = [label for label in sequence.labels[1:] if label != IGNORED_LABEL]
    whole = [*ids(row[1]), EOS]
    assert learned == whole[: max_tokens - 1]
    assert all(
        label in (IGNORED_LABEL, token) for token, label in zip(sequence.input_ids, sequence.labels, strict=True)
    )


TURNS = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
]


def test_of_messages_the_last_turn_of_the_assistant_carries_loss() -> None:
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.chat_template = TEMPLATE
    (sequence,) = sequences("messages", (TURNS,), tokenizer, max_tokens=40)
    assert sequence.input_ids == ids("user : w1 </s> assistant : w2 </s> user : w3 </s> assistant : w4 w5 </s>")
    assert [label for label in sequence.labels if label != IGNORED_LABEL] == ids("w4 w5 </s>")
    assert sequence.labels[-3:] == ids("w4 w5 </s>")


def test_where_the_template_marks_the_assistants_turns_all_of_them_carry_loss() -> None:
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}{{ ' ' }}"
        "{% else %}{{ m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
    )
    (sequence,) = sequences("messages", (TURNS,), tokenizer, max_tokens=40)
    assert [label for label in sequence.labels if label != IGNORED_LABEL] == ids("w2 </s> w4 w5 </s>")


def test_messages_without_a_chat_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"rows\.csv: holds messages, but the model's tokenizer has no chat template"):
        sequences("messages", (TURNS,), tokenizer, max_tokens=40)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.chat_template = "{% if messages[-1]['role'] == 'assistant' %}w9 {% endif %}" + TEMPLATE
    with pytest.raises(DataError, match="writes earlier turns differently"):
        sequences("messages", (TURNS,), tokenizer, max_tokens=40)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["text"], "text"),
        (["prompt", "completion", "text"], "completion"),
        (["messages", "text"], "messages"),
        (["prompt", "text"], "text"),
    ],
)
def test_the_columns_say_what_is_learned(columns: list[str], chosen: str) -> None:
    assert Objective.of(DATA, columns, "rows.csv").name == chosen


def test_an_objective_that_is_set_outranks_the_columns() -> None:
    data = DataSection(path="rows.csv", objective="text", text_column="completion")
    assert Objective.of(data, ["prompt", "completion"], "rows.csv").columns == ("completion",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DATA, r"has none of the columns 'messages', 'prompt' with 'completion', or 'text'; it has mr, ref: "),
        (DataSection(path="rows.csv", prompt_column="mr"), r"'mr' with 'completion', or 'text'; it has mr, ref: name "),
        (
            DataSection(path="rows.csv", objective="text"),
            r"rows\.csv: has no column 'text', which data\.objective = 'text' needs; it has mr, ref: name",
        ),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_those_that_exist(data: DataSection, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Objective.of(data, ["mr", "ref"], "rows.csv")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": 5}, "of type int"),
        ({"text": None}, "missing"),
        ({}, "missing"),
        ({"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_row_that_is_not_text_is_named(row: dict[str, object], kind: str) -> None:
    objective = Objective("text", ("text",), "rows.csv")
    with pytest.raises(
        DataError, match=rf"rows\.csv, row 3: column 'text' must be text, but is {kind}; correct that row"
    ):
        objective.fields(3, row)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "must be a list of messages that is not empty"),
        ([], "must be a list of messages that is not empty"),
        (["hello"], "must hold messages with a role and a content"),
        ([{"content": "w1"}], "must hold messages with a role and a content"),
        ([{"role": "user", "content": None}], "holds a message of 'user' whose content is not text"),
        ([{"role": "user", "content": "w1"}], "ends with 'user', but the assistant's last turn is learned"),
    ],
)
def test_wrongly_shaped_messages_are_named(messages: object, said: str) -> None:
    objective = Objective("messages", ("messages",), "rows.csv")
    with pytest.raises(DataError, match=rf"rows\.csv, row 7: column 'messages' {said}; correct that row"):
        objective.fields(7, {"messages": messages})
