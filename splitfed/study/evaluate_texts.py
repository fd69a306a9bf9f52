"""How like the completions of a data file a model's own are: greedy texts, BLEU and ROUGE-L.

Shapes: B sequences, T tokens.
"""

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Final

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from splitfed.config import DataSection
from splitfed.errors import ConfigError
from splitfed.training.objective import IGNORED_LABEL, Objective
from splitfed.training.rows import read_rows

_BATCH: Final = 16
_ANY_LENGTH: Final = 2**31


@dataclass(frozen=True)
class Asked:
    """A row with a prompt and a completion.

    Attributes:
        input_ids: The prompt, as training has it; at least one token.
        completion: What the file answers.
    """

    input_ids: list[int]
    completion: str


@dataclass(frozen=True)
class Likeness:
    """How like texts are to those that they are compared with.

    Attributes:
        bleu: BLEU of all texts together, 0 to 100.
        rouge_l: Mean F1 of ROUGE-L, 0 to 100.
        signature: How BLEU was computed.
    """

    bleu: float
    rouge_l: float
    signature: str


def read_asked(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """Read prompts and completions; a row without either is left out.

    Args:
        data: The file, its columns, and how many rows of it to read.
        tokenizer: The base model's tokenizer.

    Raises:
        ConfigError: If it has no prompts and completions.
        DataError: If a row cannot be used.
    """
    asked: list[Asked] = []
    with closing(read_rows(data, data.path)) as rows:
        numbered = list(islice(rows, data.max_rows))
    objective = Objective.of(data, list(numbered[0][1]), data.path)
    if objective.name != "completion":
        raise ConfigError(
            f"--generate compares with completions, but {data.path} has no columns {data.prompt_column!r} and "
            f"{data.completion_column!r}; name the right ones with --prompt-column and --completion-column"
        )
    fields = [objective.fields(number, row) for number, row in numbered]
    for (_, completion), sequences in zip(
        fields, objective.sequences(fields, tokenizer, max_tokens=_ANY_LENGTH), strict=True
    ):
        for sequence in sequences:
            begin = next(at for at, label in enumerate(sequence.labels) if label != IGNORED_LABEL)
            if begin > 0:
                asked.append(Asked(sequence.input_ids[:begin], completion))
    if not asked:
        raise ConfigError(f"--generate needs a row with a prompt and a completion, and {data.path} has none")
    return asked


@torch.no_grad()
def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    *,
    max_tokens: int,
    end: Collection[int],
    on_progress: Callable[[float], None],
) -> list[str]:
    """Write a text after each prompt, with the most likely tokens.

    Prompts of one length go through the model together, so that nothing is padded and no text depends on another.

    Args:
        model: The model, as transformers has it.
        tokenizer: Its tokenizer.
        asked: The prompts.
        max_tokens: Most tokens of prompt and text together.
        end: Tokens that end a text.
        on_progress: Told the part that is done.

    Returns:
        The texts, in the order of the prompts.
    """
    texts = [""] * len(asked)
    done = 0
    by_length = sorted(range(len(asked)), key=lambda at: len(asked[at].input_ids))
    pad = next(iter(sorted(end)), 0)
    for length, group in groupby(by_length, key=lambda at: len(asked[at].input_ids)):
        places = list(group)
        settings = GenerationConfig(
            do_sample=False, max_length=max_tokens, eos_token_id=sorted(end) or None, pad_token_id=pad
        )
        for start in range(0, len(places), _BATCH):
            batch = places[start : start + _BATCH]
            ids_BT = torch.tensor([asked[at].input_ids for at in batch])
            whole_BT = model.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings
            )
            for at, ids in zip(batch, whole_BT[:, length:].tolist(), strict=True):
                stop = next((index for index, token in enumerate(ids) if token in end), len(ids))
                texts[at] = str(tokenizer.decode(ids[:stop], skip_special_tokens=True))
            done += len(batch)
            on_progress(done / len(asked))
    return texts


def likeness(texts: Sequence[str], asked: Sequence[Asked]) -> Likeness:
    """Compare texts with the completions of the file, each without the white space around it.

    Args:
        texts: One for each row.
        asked: The rows.

    Source: BLEU as sacrebleu computes it (Post, A call for clarity in reporting BLEU scores, 2018); ROUGE-L as
    rouge-score does, without stemming, with words of any script (Lin, ROUGE: a package
    for automatic evaluation of summaries, 2004).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    ours, theirs = [text.strip() for text in texts], [one.completion.strip() for one in asked]
    metric = BLEU()
    bleu = metric.corpus_score(ours, [theirs])
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    f1 = [rouge.score(target, text)["rougeL"].fmeasure for target, text in zip(theirs, ours, strict=True)]
    return Likeness(bleu.score, 100 * sum(f1) / len(f1), str(metric.get_signature()))


class _Words:
    """Words of any script, in lower case: what rouge-score takes for words, and what it leaves out as not English."""

    def tokenize(self, text: str) -> list[str]:
        """Give the words of a text."""
        return re.findall(r"[^\W_]+", text.lower())
