"""A run of the embedded model in this process, from the data files that agents would read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.config import CodecSection, DataSection, FederationSection, LoraSection, ModelSection, TrainingSection
from splitfed.config.aggregation import AggregationSection
from splitfed.training.data import ExampleSet, load_examples
from splitfed.training.simulate import Simulation, simulate


def examples_in(file: Path, max_tokens: int) -> ExampleSet:
    """Read a data file as an agent does."""
    tokenizer = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    train, _ = load_examples(
        DataSection(path=str(file)), tokenizer, max_tokens=max_tokens, record_hash=lambda content: content.hex()[:8]
    )
    return train


def simulate_files(
    files: Mapping[str, Path],
    training: TrainingSection,
    *,
    seed: int,
    lora: LoraSection | None = None,
    codecs: CodecSection | None = None,
    federation: FederationSection | None = None,
    aggregation: AggregationSection | None = None,
) -> Simulation:
    """Run one client per file, cut as a run file cuts by default."""
    base = splitfed.base_model_folder()
    cut = ModelSection(base="demo")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = splitfed.partition(model, bottom_blocks=cut.bottom_blocks, top_blocks=cut.top_blocks)
    examples = {name: examples_in(file, training.max_tokens) for name, file in files.items()}
    tokenizer = AutoTokenizer.from_pretrained(base)
    return simulate(
        parts,
        tokenizer,
        examples,
        training=training,
        lora=lora,
        codecs=codecs,
        federation=federation,
        aggregation=aggregation,
        seed=seed,
    )
