"""What holds for a whole run, the same on the server and on every agent."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from splitfed.config.privacy import PrivacySection
from splitfed.config.section import Base, Name, Section

CodecName = Literal["none", "bf16", "fp16", "int8"]


class RunIdentity(Section):
    """Which run this is."""

    name: Name = "run"
    """Name of the run, which is also its id on the wire."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random but the privacy noise: initial adapters, data order, dropout."""


class ModelSection(Section):
    """The base model and where it is cut."""

    base: Base
    """Folder of a causal language model, a hub id, or "demo" for the model that comes with splitfed."""
    bottom_blocks: Annotated[int, Field(ge=0)] = 1
    """Transformer blocks that the agent holds after the embeddings."""
    top_blocks: Annotated[int, Field(ge=0)] = 1
    """Transformer blocks that the agent holds before the head."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights and of the arithmetic."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


class LoraSection(Section):
    """The adapter that is trained."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of every LoRA factor."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of the adapter is dropped in training."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the adapted layers; left out = all linear layers of the blocks."""


class TrainingSection(Section):
    """How long and how fast to train."""

    rounds: Annotated[int, Field(ge=1)] = 3
    """Rounds of local training followed by federated averaging."""
    local_steps: Annotated[int, Field(ge=1)] = 20
    """Optimiser steps per round and agent."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences per local step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences that cross the wire at once; divides batch_size; left out = batch_size."""
    max_tokens: Annotated[int, Field(ge=2)] = 128
    """Longest sequence of the run, in tokens; with noise on, every sequence is padded to it."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate at the schedule's peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of a step's gradients, over all segments; with noise on, of each side's; left out = any."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu: how strongly local steps are held to what the round started from."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Local steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up, over all rounds."""
    max_in_flight: Annotated[int, Field(ge=1, le=64)] = 2
    """Micro-batches on their way at the same time."""

    @field_validator("micro_batch_size")
    @classmethod
    def _divides_batch_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if value is not None and batch_size is not None and batch_size % value:
            raise ValueError(f"is {value}, which does not divide batch_size = {batch_size}; choose a divisor")
        return value


class FederationSection(Section):
    """Who takes part, and how their work is combined."""

    agents: Annotated[int, Field(ge=1)] = 1
    """Agents to wait for before the first round starts."""
    variant: Literal["sflv1"] = "sflv1"
    """"sflv1": each agent has its own trunk adapter during a round; the copies are averaged at its end."""
    agent_timeout_s: Annotated[float, Field(gt=0)] = 300
    """Seconds without progress after which an agent is taken to be gone."""


class CodecSection(Section):
    """How tensors are encoded for the wire, per direction."""

    smashed: CodecName = "int8"
    """Smashed data, agent to server."""
    trunk_output: CodecName = "int8"
    """Trunk output, server to agent."""
    output_gradient: CodecName = "int8"
    """Output gradient, agent to server."""
    smashed_gradient: CodecName = "int8"
    """Smashed gradient, server to agent."""
    adapter: CodecName = "none"
    """Adapters of bottom and top, both ways, once a round."""


class RunConfig(Section):
    """What the server tells every agent that joins."""

    run: RunIdentity
    model: ModelSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    codecs: CodecSection = CodecSection()
    privacy: PrivacySection = PrivacySection()
