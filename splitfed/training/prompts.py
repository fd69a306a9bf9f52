"""What a text is generated from: prompts as token ids, and the record that the privacy ledger counts for each."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from splitfed.config import DataSection
from splitfed.errors import ConfigError, DataError
from splitfed.training.data import RecordHash
from splitfed.training.rows import Row, read_rows


@dataclass(frozen=True)
class Wanted:
    """What is to be generated.

    Attributes:
        texts: Prompts as text.
        files: Files of prompts.
        max_tokens: Most tokens of prompt and text together; None = those of the run's training.
        temperature: Logits are divided by it before a token is drawn; 0 or None = the most likely token.
        top_p: Draw among the most likely tokens with so much probability together.
        seed: Seed of the draws; None = from the operating system.
    """

    texts: Sequence[str] = ()
    files: Sequence[str] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Prompt:
    """What one text is generated from.

    Attributes:
        input_ids: Token ids, at least one.
        record: Salted hash of what it was made of: that of a row to train on, where a row has the same content.
    """

    input_ids: list[int]
    record: str


class PromptReader:
    """Turns text and rows into prompts.

    Args:
        data: The agent's section on its data, for the names of columns.
        tokenizer: The base model's tokenizer.
        record_hash: Salted hash of a row's content.
    """

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase, record_hash: RecordHash) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._record_hash = record_hash

    def of(self, wanted: Wanted) -> list[Prompt]:
        """Give all prompts that are wanted, in their order: those of texts, then those of files.

        Raises:
            ConfigError: If there is none.
            DataError: If one cannot be used.
        """
        prompts = [self.of_text(text) for text in wanted.texts]
        for file in wanted.files:
            prompts += self.of_file(file)
        if not prompts:
            raise ConfigError("there is nothing to generate from; give --prompt TEXT, or a --file with a row at least")
        return prompts

    def of_text(self, text: str, source: str = "--prompt") -> Prompt:
        """Make a prompt of a text.

        Args:
            text: The text.
            source: Where it is from, for messages.

        Raises:
            DataError: If it has no token, or is not text.
        """
        return self._prompt(text, (text,), source)

    def of_file(self, file: str) -> Iterator[Prompt]:
        """Make a prompt of each row of a file: of its messages, its prompt, or its text, whichever is there first.

        Of a conversation that ends with the assistant, the last turn is left out. The record of a row is that of all
        that would be trained on, its completion included.

        Args:
            file: JSON lines, CSV, Parquet or text.

        Raises:
            DataError: If the file cannot be read, or a row has no prompt.
        """
        data = self._data.model_copy(update={"format": "auto", "path": file, "held_out_path": None})
        with closing(read_rows(data, file)) as rows:
            for number, row in rows:
                yield self._of_row(row, f"{file}, row {number}")

    def _of_row(self, row: Row, source: str) -> Prompt:
        data = self._data
        if data.messages_column in row:
            messages = row[data.messages_column]
            return self._prompt_of_messages(messages, (messages,), source)
        if data.prompt_column in row:
            completion = row.get(data.completion_column)
            content = (row[data.prompt_column],) if completion is None else (row[data.prompt_column], completion)
            return self._prompt(content[0], content, source)
        if data.text_column in row:
            return self._prompt(row[data.text_column], (row[data.text_column],), source)
        raise DataError(
            f"{source}: has none of the columns {data.messages_column!r}, {data.prompt_column!r} or "
            f"{data.text_column!r}; it has {', '.join(row) or 'no columns'}: name the right one in [data]"
        )

    def _prompt(self, text: Any, content: tuple[Any, ...], source: str) -> Prompt:
        if not isinstance(text, str) or text != text.encode(errors="replace").decode():
            kind = "not valid Unicode" if isinstance(text, str) else f"of type {type(text).__name__}"
            raise DataError(f"{source}: the prompt must be text, but is {kind}; correct it")
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        if ids and ids[-1] == end and not text.endswith(str(self._tokenizer.eos_token)):
            ids = ids[:-1]  # a tokenizer that ends every text: this one goes on
        return self._checked(ids, content, source)

    def _prompt_of_messages(self, messages: Any, content: tuple[Any, ...], source: str) -> Prompt:
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise DataError(f"{source}: messages must be a list of {{role, content}} that is not empty; correct it")
        if self._tokenizer.chat_template is None:
            raise DataError(f"{source}: holds messages, but the model's tokenizer has no chat template; give a prompt")
        asked: Sequence[Any] = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if not asked:
            raise DataError(f"{source}: there is nothing before the assistant's turn; give a message to answer")
        whole: Any = self._tokenizer.apply_chat_template(list(asked), return_dict=True, add_generation_prompt=True)
        return self._checked(whole["input_ids"], content, source)

    def _checked(self, ids: list[int], content: tuple[Any, ...], source: str) -> Prompt:
        if not ids:
            raise DataError(f"{source}: the prompt is empty; give a word to begin with")
        content_bytes = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()
        return Prompt(ids, self._record_hash(content_bytes))


def declared_length(prompts: Sequence[Prompt], max_tokens: int, *, positions: int | None) -> int:
    """Check the length that is declared for every sequence.

    Args:
        prompts: At least one.
        max_tokens: Most tokens of prompt and text together.
        positions: Most tokens that the base model can count; None: any number.

    Returns:
        ``max_tokens``.

    Raises:
        ConfigError: If the model cannot count so far, or a prompt leaves no room for a token.
    """
    if positions is not None and max_tokens > positions:
        raise ConfigError(f"--max-tokens is {max_tokens}, but the base model counts to {positions}; lower it")
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if longest >= max_tokens:
        raise ConfigError(
            f"a prompt has {longest} tokens, which leaves no room for text in {max_tokens} (--max-tokens, the prompt "
            "included); shorten it, or raise --max-tokens"
        )
    return max_tokens


def positions_of(config: PreTrainedConfig) -> int | None:
    """Give the most tokens that a model can count; None: any number."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Give what ends a text: what the base model's generation configuration says, otherwise its tokenizer.

    Args:
        folder: The base model.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If there is a generation configuration that cannot be read.
    """
    try:
        said = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:  # there is none
        said = None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder}/generation_config.json cannot be used ({error}); correct or remove it") from error
    if said is None:
        said = tokenizer.eos_token_id
    return frozenset([said] if isinstance(said, int) else said or [])
