"""What a run has changed: loss and perplexity of its base model, and of the base model with the run's adapter.

Shapes: B sequences, T tokens, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from splitfed.config import DataSection
from splitfed.study.evaluate_texts import generated
from splitfed.study.export import with_adapter
from splitfed.study.run_folder import RunFolder
from splitfed.study.whole_model import open_whole_model
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import ExampleSet, collate, load_examples
from splitfed.training.likeness import likeness, read_asked
from splitfed.training.measured import Ground, Measured, about_texts, headings
from splitfed.training.prompts import declared_length, end_tokens, positions_of
from splitfed.training.setup import DTYPES
from splitfed.training.tokenizer import open_tokenizer

OnStage = Callable[[str, float], None]

_BATCH_TOKENS: Final = 2048
_LOAD, _LOSS, _TEXTS = 1.0, 4.0, 20.0
"""Rough shares of the time."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        run: The run.
        round: The round whose adapter is measured.
        ground: What was measured on.
        base: The base model.
        adapted: The base model with the adapter.
        texts: Texts that each of both has written.
        signature: How BLEU was computed; empty where it was not.
    """

    run: str
    round: int
    ground: Ground
    base: Measured
    adapted: Measured
    texts: int = 0
    signature: str = ""

    def as_json(self) -> str:
        """Give everything as one JSON object."""
        figures = {
            "run": self.run,
            "round": self.round,
            **asdict(self.ground),
            "base": self.base.as_row(),
            "adapted": self.adapted.as_row(),
            "texts": self.texts,
            "signature": self.signature,
        }
        return json.dumps(figures, ensure_ascii=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal."""
        adapted = f"base + adapter of round {self.round}"
        rows = [["base", *self.base.cells()], [adapted, *self.adapted.cells()]]
        return headings(has_texts=bool(self.texts)), rows

    def summary(self) -> list[str]:
        """Give the sentences below the table."""
        return [*self.ground.summary(), *about_texts(self.texts, self.signature)]


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
    examples, _ = load_examples(data, tokenizer, max_tokens=length, record_hash=_unsalted)
    asked = read_asked(data, tokenizer, _unsalted) if writes_texts else []
    progress.of("the base model", _LOAD)
    whole = open_whole_model(folder, dtype=DTYPES[run.config.model.dtype])
    end, most = end_tokens(folder, tokenizer), max_tokens or length
    if asked:
        declared_length(asked, most, positions=positions_of(whole.config))
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
        ground=Ground.of(data.path, examples, length),
        base=found[0],
        adapted=found[1],
        texts=len(asked),
        signature="" if found[0].texts is None else found[0].texts.signature,
    )


def _unsalted(content: bytes) -> str:
    """Name a record where nothing is charged."""
    return hashlib.sha256(content).hexdigest()


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
