"""Train the shipped base model: ``python -m splitfed.assets.train_base_model [--output DIR] [--steps N]``.

A Llama of a million parameters learns the docstrings of the running Python's standard library. The same Python,
packages, thread count and kind of processor give the same weights to the bit; another Python has another corpus and so
gives another model.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from splitfed.assets import base_model_folder
from splitfed.assets.docstrings import corpus, corpus_sha256
from splitfed.assets.model_card import Outcome, model_card

# Shape letters: B sequences, T tokens, V vocabulary.

SEED = 20
VOCABULARY = 2048
CONTEXT_TOKENS = 512
BATCH_SEQUENCES = 4
STEPS = 4000
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
THREADS = 2
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def main(arguments: list[str] | None = None) -> None:
    """Train, print the progress and the held-out loss, and write the model's folder."""
    parser = argparse.ArgumentParser(prog="python -m splitfed.assets.train_base_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=base_model_folder(), help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)

    train_texts, held_out_texts = corpus()
    tokenizer = train_tokenizer(train_texts)
    model = new_model(tokenizer)
    outcome = train(model, tokenizer, train_texts, held_out_texts, steps=options.steps)
    print(f"held-out loss {outcome.held_out_loss:.4f}, perplexity {math.exp(outcome.held_out_loss):.2f}")

    options.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    (options.output / "README.md").write_text(model_card(outcome), encoding="utf-8")
    print(f"written to {options.output}")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary; every text is then encoded with the beginning-of-sequence token in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.15 million parameters, initialised from the fixed seed."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_texts: list[str],
    held_out_texts: list[str],
    *,
    steps: int,
) -> Outcome:
    """Train with AdamW under a cosine schedule on packed sequences, shuffled anew in every epoch."""
    documents = _documents(tokenizer, train_texts)
    held_out_BT = _pack(_documents(tokenizer, held_out_texts))
    batches = _Batches(documents)
    optimiser = torch.optim.AdamW(_parameter_groups(model), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, min(WARMUP_STEPS, steps // 2), steps)
    started, cpu_started = time.perf_counter(), time.process_time()
    for step in range(1, steps + 1):
        batch_BT = batches.next()
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            speed = step * batch_BT.numel() / seconds
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s {seconds:.0f} s", flush=True)
        if step % 500 == 0:
            print(f"held-out loss {held_out_loss(model, held_out_BT):.4f}", flush=True)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Outcome(
        parameters=model.num_parameters(),
        texts=len(train_texts),
        corpus_sha256=corpus_sha256(train_texts),
        corpus_tokens=sum(map(len, documents)),
        tokens_seen=steps * BATCH_SEQUENCES * CONTEXT_TOKENS,
        steps=steps,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        threads=THREADS,
        held_out_tokens=held_out_BT.numel(),
        held_out_loss=held_out_loss(model, held_out_BT),
        vocabulary=VOCABULARY,
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, sequences_BT: Tensor) -> float:
    """Mean cross-entropy per token in nats over packed sequences of one length."""
    model.eval()
    losses = [
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.item() * len(batch_BT)
        for batch_BT in sequences_BT.split(BATCH_SEQUENCES)
    ]
    model.train()
    return float(sum(losses) / len(sequences_BT))


class _Batches:
    """Endless batches: every epoch permutes the documents and cuts their concatenation anew."""

    def __init__(self, documents: list[list[int]]) -> None:
        self._documents = documents
        self._random = random.Random(SEED)
        self._sequences_BT = torch.empty(0, CONTEXT_TOKENS, dtype=torch.long)

    def next(self) -> Tensor:
        while len(self._sequences_BT) < BATCH_SEQUENCES:
            epoch = self._random.sample(self._documents, len(self._documents))
            self._sequences_BT = torch.cat([self._sequences_BT, _pack(epoch)])
        batch_BT, self._sequences_BT = self._sequences_BT.tensor_split([BATCH_SEQUENCES])
        return batch_BT


def _documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _pack(documents: list[list[int]]) -> Tensor:
    ids = torch.tensor([token for document in documents for token in document])
    return ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)


def _parameter_groups(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """Weight decay on the matrices, none on the norms."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    main()
