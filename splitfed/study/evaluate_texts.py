"""Greedy texts of a whole model, with transformers alone.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, Final

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from splitfed.training.prompts import Prompt

_BATCH: Final = 16


@torch.no_grad()
def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Prompt],
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
