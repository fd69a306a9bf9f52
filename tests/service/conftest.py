"""What the service tests stand on: small data, small runs."""

import json
from pathlib import Path
from typing import Any

import pytest

import splitfed
from splitfed.config import (
    CodecSection,
    FederationSection,
    LoraSection,
    ModelSection,
    RunSection,
    ServerConfig,
    ServerSection,
    TrainingSection,
)
from splitfed.config.aggregation import AggregationSection
from splitfed.config.generation import GenerationSection

OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")


def write_texts(file: Path, who: str, rows: int) -> Path:
    """Write a small data file that is unlike any other's."""
    file.write_text(
        "".join(
            json.dumps({"text": f"{who} number {n} says that {n} times {n % 7} is {n * (n % 7)}. " * (1 + n % 3)})
            + "\n"
            for n in range(rows)
        )
    )
    return file


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """The embedded model."""
    return splitfed.base_model_folder()


def server_config(folder: Path, base: Path | str = "demo", **sections: Any) -> ServerConfig:
    """Configure a small run in a folder; both factors are trained unless it says otherwise."""
    training = {"rounds": 2, "local_steps": 3, "batch_size": 4, "max_tokens": 32, "learning_rate": 3e-3}
    return ServerConfig(
        run=RunSection(name="small", directory=folder / "run", seed=3),
        model=ModelSection(base=str(base), **sections.get("model", {})),
        lora=LoraSection(rank=4, alpha=8.0, **sections.get("lora", {})),
        training=TrainingSection(**{**training, **sections.get("training", {})}),
        federation=FederationSection(**sections.get("federation", {})),
        codecs=sections.get("codecs", OPEN),
        aggregation=AggregationSection(**sections.get("aggregation", {"lora": "factors"})),
        server=ServerSection(address="127.0.0.1:0", **sections.get("server", {})),
        generation=GenerationSection(**sections.get("generation", {})),
        tls=sections.get("tls"),
    )
