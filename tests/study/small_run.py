"""A run directory as a server leaves it, with an adapter that changes the model, made without training."""

import json
import shutil

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import splitfed
from splitfed.config import to_toml
from splitfed.models import canonical_config, export_adapter, initial_adapter, load_shell, tensor_hashes
from splitfed.training.setup import lora_settings
from tests.service.conftest import server_config


def write_gpt2(folder):
    """A tiny model with tied embeddings and learned positions, and the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "temperature": 0.7}))
    return folder


def write_finished_run(folder, base="demo", *, rounds=2):
    """A run of some rounds, each with an adapter of its own."""
    config = server_config(folder, base, lora={"targets": None})
    base_folder = splitfed.base_model_folder() if base == "demo" else base
    run = config.run.directory
    run.mkdir(parents=True)
    (run / "run.toml").write_text(to_toml(config))
    (run / "run.json").write_text(json.dumps({"name": "small", "base": canonical_config(base_folder)}))
    names = [name for name in initial_base_names(base_folder) if "embed_tokens" in name or "wte" in name]
    hashes = tensor_hashes(base_folder, names)
    (run / "base.json").write_text(json.dumps({name: found.sha256 for name, found in hashes.items()}))
    lora = lora_settings(config.lora)
    for number in range(1, rounds + 1):
        torch.manual_seed(number)
        state = initial_adapter(load_shell(base_folder), lora, seed=number)
        state = {name: 0.2 * torch.randn_like(tensor) for name, tensor in state.items()}
        adapter = run / "adapters" / f"round-{number:04d}"
        export_adapter(adapter, state, lora, base_folder=base_folder, base_name=str(base))
        (run / "checkpoints" / f"round-{number:04d}").mkdir(parents=True)
    shutil.copytree(adapter, run / "adapter")
    return run


def initial_base_names(base_folder):
    """Names of the checkpoint's tensors."""
    from safetensors import safe_open

    with safe_open(base_folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())
