"""The model card that travels with the shipped base model."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib.metadata import version

_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
pipeline_tag: text-generation
---

# The base model of the splitfed demo

A Llama of {parameters:,} parameters that has read the docstrings of Python's standard library and nothing else.
It is there so that `splitfed demo` and the tests can fine-tune a real pretrained model without a download. It
writes text that looks like a docstring and knows nothing; use it for nothing else.

- **Shape:** hidden size 128, 6 blocks, 4 attention heads, 2 key-value heads, intermediate size 256, a context of
  512 tokens, tied embeddings, float32.
- **Tokenizer:** byte-level BPE with a vocabulary of {vocabulary:,}, trained on the same text; `<s>` in front of every
  text, `</s>` after it in training.
- **Corpus:** module, class and function docstrings of the standard library of Python {python}, each once, without
  `pydoc_data`, tests, installed packages and texts that hold a mail address: {texts:,} texts, {corpus_tokens:,} tokens,
  SHA-256 `{corpus_sha256}`.
- **Held out:** source files named by a hash, about a twentieth of them: {held_out_tokens:,} tokens.
- **Training:** {steps:,} steps of AdamW under a cosine schedule, {tokens_seen:,} tokens ({epochs:.1f} passes),
  {seconds:,.0f} seconds by the clock and {cpu_seconds:,.0f} seconds of processor time on {threads} threads.
- **Held-out loss:** {held_out_loss:.4f} nats per token, a perplexity of {perplexity:.1f} (a uniform guess has a loss of
  {uniform:.2f}).
- **Packages:** torch {torch}, transformers {transformers}, tokenizers {tokenizers}.

Made by `python -m splitfed.assets.train_base_model`, with fixed seeds. The same Python, packages, thread count and
kind of processor give the same weights to the bit.

The docstrings are part of Python: Copyright © 2001 Python Software Foundation; All Rights Reserved, used under the
[PSF License Version 2](https://docs.python.org/3/license.html). The weights and the tokenizer are derived from them.
"""


@dataclass(frozen=True)
class Outcome:
    """What a training run used and measured."""

    parameters: int
    texts: int
    corpus_sha256: str
    corpus_tokens: int
    tokens_seen: int
    steps: int
    seconds: float
    cpu_seconds: float
    threads: int
    held_out_tokens: int
    held_out_loss: float
    vocabulary: int


def model_card(outcome: Outcome) -> str:
    """Write the card, in Markdown with the metadata block that the hub reads."""
    return _CARD.format(
        **vars(outcome),
        epochs=outcome.tokens_seen / outcome.corpus_tokens,
        perplexity=math.exp(outcome.held_out_loss),
        uniform=math.log(outcome.vocabulary),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        tokenizers=version("tokenizers"),
    )
