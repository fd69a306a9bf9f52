"""From rows to token sequences: which tokens go in, and which of them carry loss.

The formats are those of TRL: ``text``, ``prompt`` and ``completion``, ``messages``.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from splitfed.config import DataSection
from splitfed.errors import DataError
from splitfed.training.rows import Row

IGNORED_LABEL = -100
"""Label of a position that carries no loss, as in torch's cross-entropy."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

ObjectiveName = Literal["text", "completion", "messages"]


class Sequenced(NamedTuple):
    """Token ids and, at the same positions, labels; and how many more tokens of the row did not fit."""

    input_ids: list[int]
    labels: list[int]
    tokens_left_out: int = 0


class Objective:
    """What is learned from the rows of one file."""

    def __init__(self, name: ObjectiveName, columns: tuple[str, ...], source: str) -> None:
        self.name = name
        self.columns = columns
        self.source = source

    @classmethod
    def of(cls, data: DataSection, columns: Sequence[str], source: str) -> "Objective":
        """Choose the configured objective, or for "auto" the first whose columns exist.

        Args:
            data: The agent's section on its data.
            columns: Columns that the file has.
            source: The file, for messages.

        Raises:
            DataError: If a column that the objective needs does not exist.
        """
        needed: dict[ObjectiveName, tuple[str, ...]] = {
            "messages": (data.messages_column,),
            "completion": (data.prompt_column, data.completion_column),
            "text": (data.text_column,),
        }
        existing = ", ".join(columns) or "no columns"
        if data.objective != "auto":
            for column in needed[data.objective]:
                if column not in columns:
                    raise DataError(
                        f"{source}: has no column {column!r}, which data.objective = {data.objective!r} needs; "
                        f"it has {existing}: name the right one in [data]"
                    )
            return cls(data.objective, needed[data.objective], source)
        for name, wanted in needed.items():
            if set(wanted) <= set(columns):
                return cls(name, wanted, source)
        raise DataError(
            f"{source}: has none of the columns {data.messages_column!r}, {data.prompt_column!r} with "
            f"{data.completion_column!r}, or {data.text_column!r}; it has {existing}: "
            "name the right ones in [data], such as prompt_column and completion_column"
        )

    def fields(self, number: int, row: Row) -> tuple[Any, ...]:
        """Take from a row what is learned, after checking its types.

        Args:
            number: Number of the row, from 1.
            row: Its columns.

        Raises:
            DataError: If a column is missing or of the wrong type.
        """
        values = tuple(row.get(column) for column in self.columns)
        for column, value in zip(self.columns, values, strict=True):
            if self.name == "messages":
                _check_messages(value, f"{self.source}, row {number}: column {column!r}")
            elif not _is_text(value):
                kind = {type(None): "missing", str: "not valid Unicode"}.get(
                    type(value), f"of type {type(value).__name__}"
                )
                where = f"{self.source}, row {number}"
                raise DataError(f"{where}: column {column!r} must be text, but is {kind}; correct that row")
        return values

    def sequences(
        self, rows: Sequence[tuple[Any, ...]], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
    ) -> list[list[Sequenced]]:
        """Turn rows, as ``fields`` gives them, into sequences of at most ``max_tokens`` tokens.

        Returns:
            For each row its sequences; none where no token carries loss.

        Raises:
            DataError: If the tokenizer has no chat template that fits the messages.
        """
        if self.name == "text":
            return [_cut(ids, max_tokens) for ids in _text_ids([text for (text,) in rows], tokenizer)]
        if self.name == "completion":
            whole = _completion_sequences(rows, tokenizer)
        else:
            whole = [_conversation(messages, tokenizer, self.source) for (messages,) in rows]
        return [_fit(sequence, max_tokens, keeps_first=_starts_with_bos(tokenizer)) for sequence in whole]


def _is_text(value: object) -> bool:
    """Say whether a value is a string that exists in UTF-8, which half of a surrogate pair does not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_messages(value: object, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of messages that is not empty; correct that row")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} must hold messages with a role and a content; correct that row")
        if not _is_text(message.get("content")):
            raise DataError(
                f"{where} holds a message of {message['role']!r} whose content is not text; correct that row"
            )
    if value[-1]["role"] != "assistant":
        raise DataError(
            f"{where} ends with {value[-1]['role']!r}, but the assistant's last turn is learned; correct that row"
        )


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Give the tokens before and after a document: the first one where the tokenizer sets one, and the end."""
    start = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
    return start, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    start, end = _frame(tokenizer)
    return [start + ids + end if ids else [] for ids in _ids(texts, tokenizer)]


def _completion_sequences(rows: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase) -> list[Sequenced]:
    start, end = _frame(tokenizer)
    prompts = _ids([prompt for prompt, _ in rows], tokenizer)
    completions = _ids([completion for _, completion in rows], tokenizer)
    whole = []
    for prompt, completion in zip(prompts, completions, strict=True):
        context, learned = start + prompt, completion + end if completion else []
        whole.append(Sequenced(context + learned, [IGNORED_LABEL] * len(context) + learned))
    return whole


def _conversation(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, source: str) -> Sequenced:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{source}: holds messages, but the model's tokenizer has no chat template; use prompt and completion"
        )
    marks_turns = bool(_GENERATION_MARK.search(str(tokenizer.chat_template)))
    whole: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=marks_turns)
    ids: list[int] = whole["input_ids"]
    if marks_turns:
        mask = whole["assistant_masks"]
        return Sequenced(ids, [token if on else IGNORED_LABEL for token, on in zip(ids, mask, strict=True)])
    before: Any = tokenizer.apply_chat_template(messages[:-1], return_dict=True, add_generation_prompt=True)
    context: list[int] = before["input_ids"]
    if ids[: len(context)] != context:
        raise DataError(
            f"{source}: the tokenizer's chat template writes earlier turns differently after the assistant's answer, "
            "so what to learn is unclear; use prompt and completion"
        )
    return Sequenced(ids, [IGNORED_LABEL] * len(context) + ids[len(context) :])


def _cut(ids: list[int], max_tokens: int) -> list[Sequenced]:
    """Cut a text into sequences; a last piece of one token has nothing to predict."""
    pieces = [ids[at : at + max_tokens] for at in range(0, len(ids), max_tokens)]
    return [Sequenced(piece, piece) for piece in pieces if len(piece) > 1]


def _fit(sequence: Sequenced, max_tokens: int, *, keeps_first: bool) -> list[Sequenced]:
    """Shorten a sequence from the left, but keep what carries loss as long as it fits, and one token before it."""
    ids, labels, _ = sequence
    learned = [at for at, label in enumerate(labels) if label != IGNORED_LABEL and at > 0]
    if not learned:
        return []
    left_out = max(0, len(ids) - max_tokens)
    begin = min(left_out, learned[0] - 1)
    window = slice(begin, begin + max_tokens)
    if keeps_first and begin > 0:
        return [Sequenced([ids[0], *ids[window][1:]], [IGNORED_LABEL, *labels[window][1:]], left_out)]
    return [Sequenced(ids[window], labels[window], left_out)]
