"""What models come to on a data file, in figures and in words."""

import math
from dataclasses import dataclass
from typing import Self

import torch

from splitfed.training.client_step import count_label_tokens
from splitfed.training.data import ExampleSet
from splitfed.training.likeness import Likeness


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

    def cells(self) -> list[str]:
        """Give the figures for a table, in the order of `headings`."""
        figures = [f"{self.loss:.4f}", f"{self.perplexity:,.2f}"]
        return figures if self.texts is None else [*figures, f"{self.texts.bleu:.1f}", f"{self.texts.rouge_l:.1f}"]


@dataclass(frozen=True)
class Ground:
    """What figures were measured on.

    Attributes:
        data: The file.
        rows: Rows of it that were used.
        dropped_rows: Rows without a token that carries loss.
        shortened_rows: Rows of which a part was cut off to fit the run's T.
        sequences: Sequences that the rows were cut into.
        tokens: Tokens that carry loss.
        max_tokens: The run's T.
    """

    data: str
    rows: int
    dropped_rows: int
    shortened_rows: int
    sequences: int
    tokens: int
    max_tokens: int

    @classmethod
    def of(cls, data: str, examples: ExampleSet, max_tokens: int) -> Self:
        """Count what a file holds.

        Args:
            data: The file.
            examples: What was read from it.
            max_tokens: The run's T.
        """
        return cls(
            data=data,
            rows=examples.rows - examples.dropped_rows,
            dropped_rows=examples.dropped_rows,
            shortened_rows=examples.shortened_rows,
            sequences=len(examples),
            tokens=sum(count_label_tokens(torch.tensor([example.labels])) for example in examples),
            max_tokens=max_tokens,
        )

    def summary(self) -> list[str]:
        """Give the sentences below a table of losses."""
        told = [
            f"Loss in nats per token, over {self.tokens:,} tokens that carry loss, in {self.sequences:,} sequences of "
            f"up to {self.max_tokens} tokens from {self.rows:,} rows of {self.data}."
        ]
        if self.shortened_rows or self.dropped_rows:
            told.append(
                f"Rows that were shortened: {self.shortened_rows:,}; without a token to learn: {self.dropped_rows:,}."
            )
        return told


def headings(*, has_texts: bool) -> list[str]:
    """Give what stands above a model's figures."""
    return ["model", "loss", "perplexity", *(["BLEU", "ROUGE-L"] if has_texts else [])]


def about_texts(texts: int, signature: str) -> list[str]:
    """Give the sentence below a table that compares texts; none where there are no texts."""
    if not texts:
        return []
    return [f"BLEU and ROUGE-L (F1) of 100, of {texts:,} greedy completions; BLEU is sacrebleu's, {signature}."]
