"""How like the completions of a data file texts are: what is asked for, BLEU and ROUGE-L."""

import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Final

from transformers import PreTrainedTokenizerBase

from splitfed.config import DataSection
from splitfed.errors import ConfigError, DataError
from splitfed.training.data import RecordHash
from splitfed.training.objective import IGNORED_LABEL, Objective
from splitfed.training.prompts import Prompt
from splitfed.training.rows import read_rows

_ANY_LENGTH: Final = 2**31


@dataclass(frozen=True)
class Asked(Prompt):
    """A row with a prompt and a completion: the prompt as training has it.

    Attributes:
        completion: What the file answers.
    """

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


def read_asked(data: DataSection, tokenizer: PreTrainedTokenizerBase, record_hash: RecordHash) -> list[Asked]:
    """Read prompts and completions; a row without either is left out.

    Args:
        data: The file, its columns, and how many rows of it to read.
        tokenizer: The base model's tokenizer.
        record_hash: Salted hash of a row's content.

    Raises:
        ConfigError: If no row has a prompt.
        DataError: If it has no prompts and completions, or a row cannot be used.

    Guarantees:
        * A row is the record that it is in training.
    """
    asked: list[Asked] = []
    with closing(read_rows(data, data.path)) as rows:
        numbered = list(islice(rows, data.max_rows))
    objective = Objective.of(data, list(numbered[0][1]), data.path)
    if objective.name != "completion":
        raise DataError(
            f"--generate compares with completions, but {data.path} has no columns {data.prompt_column!r} and "
            f"{data.completion_column!r}; name the right ones in [data], such as prompt_column and completion_column"
        )
    fields = [objective.fields(number, row) for number, row in numbered]
    for content, sequences in zip(fields, objective.sequences(fields, tokenizer, max_tokens=_ANY_LENGTH), strict=True):
        content_bytes = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str).encode()
        for sequence in sequences:
            begin = next(at for at, label in enumerate(sequence.labels) if label != IGNORED_LABEL)
            if begin > 0:
                asked.append(Asked(sequence.input_ids[:begin], record_hash(content_bytes), content[1]))
    if not asked:
        raise ConfigError(f"--generate needs a row with a prompt and a completion, and {data.path} has none")
    return asked


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
