"""Models of well-known shapes with random weights, and text to match: made once in a temporary folder."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast


def gpt2_small() -> GPT2Config:
    """GPT-2 small: 12 blocks, hidden 768; without dropout, so that both sides of a comparison compute the same."""
    return GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def llama_1b() -> LlamaConfig:
    """Llama-3.2-1B: 16 blocks, hidden 2048, tied embeddings of 128,256 tokens."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def write_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, *, shard_size: str = "500MB") -> Path:
    """Write a model with random weights and a tokenizer whose words are single tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_words(file: Path, *, rows: int, tokens: int, vocabulary: int) -> Path:
    """Write rows of so many random words each."""
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(rows):
            words = " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(tokens))
            out.write(json.dumps({"text": words}) + "\n")
    return file
