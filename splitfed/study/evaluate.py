"""What a run has changed: loss and perplexity of its base model, and of the base model with the run's adapter.

Shapes: B sequences, T tokens, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from splitfed.config import DataSection
from splitfed.errors import ConfigError
from splitfed.study.evaluate_texts import Asked, Likeness, generated, likeness, read_asked
from splitfed.study.export import with_adapter
from splitfed.study.run_folder import RunFolder
from splitfed.study.whole_model import open_whole_model
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import ExampleSet, collate, load_examples
from splitfed.training.prompts import end_tokens, positions_of
from splitfed.training.setup import DTYPES
from splitfed.training.tokenizer import open_tokenizer

OnStage = Callable[[str, float], None]

_BATCH_TOKENS: Final = 2048
_LOAD, _LOSS, _TEXTS = 1.0, 4.0, 20.0
"""Rough shares of the time."""


@dataclass(frozen=True)
class Measured:
    """What one model comes to.

    Attributes:
        loss: Mean loss per token that carries loss, in nats.
        texts: How like the completions its own texts are; None where none were written.
    """

    loss: float
    texts: Likeness | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_row(self) -> dict[str, float | None]:
        """Give the figures by name; None for what is not finite."""
        figures = {"loss": self.loss, "perplexity": self.perplexity}
        if self.texts is not None:
            figures |= {"bleu": self.texts.bleu, "rouge_l": self.texts.rouge_l}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        run: The run.
        round: The round whose adapter is measured.
        data: The file.
        rows: Rows of it that were used.
        dropped_rows: Rows without a token that carries loss.
        shortened_rows: Rows of which a part was cut off to fit the run's T.
        sequences: Sequences that the rows were cut into.
        tokens: Tokens that carry loss.
        max_tokens: The run's T.
        base: The base model.
        adapted: The base model with the adapter.
        texts: Texts that each of both has written.
        signature: How BLEU was computed; empty where it was not.
    """

    run: str
    round: int
    data: str
    rows: int
    dropped_rows: int
    shortened_rows: int
    sequences: int
    tokens: int
    max_tokens: int
    base: Measured
    adapted: Measured
    texts: int = 0
    signature: str = ""

    def as_json(self) -> str:
        """Give everything as one JSON object."""
        figures = asdict(self) | {"base": self.base.as_row(), "adapted": self.adapted.as_row()}
        return json.dumps(figures, ensure_ascii=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal."""
        headings = ["model", "loss", "perplexity", *(["BLEU", "ROUGE-L"] if self.texts else [])]
        rows = []
        for name, one in (("base", self.base), (f"base + adapter of round {self.round}", self.adapted)):
            row = [name, f"{one.loss:.4f}", f"{one.perplexity:,.2f}"]
            if one.texts is not None:
                row += [f"{one.texts.bleu:.1f}", f"{one.texts.rouge_l:.1f}"]
            rows.append(row)
        return headings, rows

    def summary(self) -> list[str]:
        """Give the sentences below the table."""
        told = [
            f"Loss in nats per token, over {self.tokens:,} tokens that carry loss, in {self.sequences:,} sequences of "
            f"up to {self.max_tokens} tokens from {self.rows:,} rows of {self.data}."
        ]
        if self.shortened_rows or self.dropped_rows:
            told.append(
                f"Rows that were shortened: {self.shortened_rows:,}; without a token to learn: {self.dropped_rows:,}."
            )
        if self.texts:
            told.append(
                f"BLEU and ROUGE-L (F1) of 100, of {self.texts:,} greedy completions; BLEU is sacrebleu's, "
                f"{self.signature}."
            )
        return told


def evaluate_run(
    run: RunFolder,
    data: DataSection,
    *,
    base: str | None = None,
    writes_texts: bool = False,
    max_tokens: int | None = None,
    on_stage: OnStage = lambda what, part: None,
) -> Evaluation:
    """Measure a round's adapter on a data file, with transformers and PEFT alone.

    Args:
        run: The round.
        data: The file, its columns, and how many rows of it to read.
        base: Where the base model is, if not where the run's configuration says.
        writes_texts: Let both models write completions, and compare these with those of the file.
        max_tokens: Most tokens of prompt and text together; None = those of the run's training.
        on_stage: Told what is being done, and the part of the whole that is done, from 0 to 1.

    Raises:
        FingerprintMismatch: If the base model is not the run's.
        WeightsError: If the base model cannot be used.
        ConfigError: If the adapter does not fit it, or a prompt leaves no room for text.
        DataError: If the data cannot be used.
        RunDirectoryError: If the adapter cannot be read.

    Guarantees:
        * The losses are those of stock transformers, with and without PEFT's adapter.
    """
    progress = _Progress(on_stage, _LOAD + 2 * (_LOSS + (_TEXTS if writes_texts else 0)))
    on_stage("reading", 0.0)
    folder, length = run.base_folder(base), run.config.training.max_tokens
    tokenizer = open_tokenizer(folder)
    examples, _ = load_examples(
        data, tokenizer, max_tokens=length, record_hash=lambda content: hashlib.sha256(content).hexdigest()
    )
    asked = read_asked(data, tokenizer) if writes_texts else []
    progress.of("the base model", _LOAD)
    whole = open_whole_model(folder, dtype=DTYPES[run.config.model.dtype])
    end, most = end_tokens(folder, tokenizer), _room(asked, max_tokens or length, positions_of(whole.config))
    run.adapter()  # a damaged one is told of as such
    model = with_adapter(whole, run)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    found = []
    for name, without in (("base", model.disable_adapter), ("base + adapter", nullcontext)):
        with without():
            loss = _loss(model, examples, pad, progress.of(f"loss, {name}", _LOSS))
            texts = None
            if asked:
                step = progress.of(f"texts, {name}", _TEXTS)
                texts = likeness(generated(model, tokenizer, asked, max_tokens=most, end=end, on_progress=step), asked)
        found.append(Measured(loss, texts))
    on_stage("done", 1.0)
    return Evaluation(
        run=run.config.run_id,
        round=run.round,
        data=data.path,
        rows=examples.rows - examples.dropped_rows,
        dropped_rows=examples.dropped_rows,
        shortened_rows=examples.shortened_rows,
        sequences=len(examples),
        tokens=_counted(examples),
        max_tokens=length,
        base=found[0],
        adapted=found[1],
        texts=len(asked),
        signature="" if found[0].texts is None else found[0].texts.signature,
    )


class _Progress:
    """Adds the parts of an evaluation up to a whole."""

    def __init__(self, on_stage: OnStage, whole: float) -> None:
        self._on_stage, self._whole, self._done = on_stage, whole, 0.0

    def of(self, what: str, share: float) -> Callable[[float], None]:
        """Start a part of the work, and give what takes its own progress."""
        start = self._done
        self._done += share
        self._on_stage(what, start / self._whole)
        return lambda part: self._on_stage(what, (start + share * part) / self._whole)


def _batches(examples: ExampleSet) -> Iterator[list[int]]:
    """Put examples of like length together, longest first: what does not fit fails at once."""
    lengths = [len(example.input_ids) for example in examples]
    batch: list[int] = []
    for at in sorted(range(len(examples)), key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


@torch.no_grad()
def _loss(model: Any, examples: ExampleSet, pad_token_id: int, on_progress: Callable[[float], None]) -> float:
    """Give the mean loss per token; causal, so what pads on the right is seen by nobody."""
    total, tokens, done = 0.0, 0, 0
    for batch in _batches(examples):
        collated = collate([examples[at] for at in batch], pad_token_id=pad_token_id)
        logits_BTV = model(collated.input_ids_BT).logits.float()
        total += causal_lm_loss(logits_BTV, collated.labels_BT, 1.0).item()
        tokens += count_label_tokens(collated.labels_BT)
        done += len(batch)
        on_progress(done / len(examples))
    return total / max(tokens, 1)


def _counted(examples: ExampleSet) -> int:
    return sum(count_label_tokens(torch.tensor([example.labels])) for example in examples)


def _room(asked: Sequence[Asked], max_tokens: int, positions: int | None) -> int:
    """Check the length of prompt and text together, before anything is computed."""
    if not asked:
        return max_tokens
    if positions is not None and max_tokens > positions:
        raise ConfigError(f"--max-tokens is {max_tokens}, but the base model counts to {positions}; lower it")
    longest = max(len(one.input_ids) for one in asked)
    if longest >= max_tokens:
        raise ConfigError(
            f"a prompt has {longest} tokens, which leaves no room for text in {max_tokens} (the prompt included); "
            "raise --max-tokens, or leave --generate out"
        )
    return max_tokens
