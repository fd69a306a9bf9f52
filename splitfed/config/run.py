"""What holds for a whole run, the same on the server and on every agent."""

from typing import Annotated, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from splitfed.config.aggregation import AggregationSection
from splitfed.config.federation import FederationSection
from splitfed.config.privacy import PrivacySection
from splitfed.config.section import Base, Name, Section
from splitfed.errors import JoinRefused

CodecName = Literal["none", "bf16", "fp16", "int8"]
DIRECTIONS: Final = ("smashed", "trunk_output", "output_gradient", "smashed_gradient")
"""What crosses the cut in a step; each has a codec of its own."""


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
    least_bottom_blocks: Annotated[int, Field(ge=0)] | None = None
    """Fewest blocks that an agent with a split point of its own may hold after the embeddings; left out =
    bottom_blocks."""
    least_top_blocks: Annotated[int, Field(ge=0)] | None = None
    """Fewest blocks that an agent with a split point of its own may hold before the head; left out = top_blocks."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights and of the arithmetic."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @field_validator("least_bottom_blocks", "least_top_blocks")
    @classmethod
    def _is_at_most_the_runs(cls, value: int | None, info: ValidationInfo) -> int | None:
        name = str(info.field_name).removeprefix("least_")
        blocks = info.data.get(name)
        if value is not None and blocks is not None and value > blocks:
            raise ValueError(f"is {value}, more than {name} = {blocks}; lower it, or leave it out")
        return value

    @property
    def widest(self) -> "ModelSection":
        """The section whose trunk has the blocks of every agent's."""
        bottom = self.bottom_blocks if self.least_bottom_blocks is None else self.least_bottom_blocks
        top = self.top_blocks if self.least_top_blocks is None else self.least_top_blocks
        return self.model_copy(update={"bottom_blocks": bottom, "top_blocks": top})


class LoraSection(Section):
    """The adapter that is trained."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of every LoRA factor."""
    least_rank: Annotated[int, Field(ge=1)] | None = None
    """Smallest rank that an agent may choose for its own adapter, in place of rank; left out = every agent has rank."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of the adapter is dropped in training."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the adapted layers; left out = all linear layers of the blocks."""

    @field_validator("least_rank")
    @classmethod
    def _is_at_most_rank(cls, value: int | None, info: ValidationInfo) -> int | None:
        rank = info.data.get("rank")
        if value is not None and rank is not None and value > rank:
            raise ValueError(f"is {value}, more than rank = {rank}; lower it, or leave it out")
        return None if value == rank else value  # one rank for all is what leaving it out says

    @property
    def has_unlike_ranks(self) -> bool:
        """Agents may choose among more ranks than one; an agent's own copy of the section, at its rank, says so too."""
        return self.least_rank is not None


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
    """Largest L2 norm of a step's gradients, over all segments; with noise on, of each segment's; left out = none
    is clipped."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu: how strongly local steps are held to what the round started from."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Local steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up, over all rounds; "constant" has no warm-up."""
    max_in_flight: Annotated[int, Field(ge=1, le=64)] = 2
    """Micro-batches on their way at the same time."""

    @field_validator("micro_batch_size")
    @classmethod
    def _divides_batch_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if value is not None and batch_size is not None and batch_size % value:
            raise ValueError(f"is {value}, which does not divide batch_size = {batch_size}; choose a divisor")
        return value

    @field_validator("schedule")
    @classmethod
    def _knows_of_the_warm_up(cls, value: str, info: ValidationInfo) -> str:
        warmup_steps = info.data.get("warmup_steps")
        if value == "constant" and warmup_steps:
            raise ValueError(
                f'is "constant", which has no warm-up, with warmup_steps = {warmup_steps}; set it to '
                '"constant_with_warmup", or leave warmup_steps out'
            )
        return value


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


def decided_rule(lora: LoraSection, aggregation: AggregationSection, privacy: PrivacySection) -> AggregationSection:
    """Settle what is averaged, where the run leaves it open.

    Args:
        lora: The run's section.
        aggregation: The run's section.
        privacy: What the run asks of its agents.
    """
    return aggregation.decided(
        has_unlike_ranks=lora.has_unlike_ranks, is_noised=privacy.is_on and privacy.adapter != "none"
    )


class RunConfig(Section):
    """What the server tells every agent that joins."""

    run: RunIdentity
    model: ModelSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    codecs: CodecSection = CodecSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()

    @property
    def residual_rank(self) -> int:
        """Rank of the frozen adapter under the trained one; 0 where the rule has none."""
        return (self.rule.flora_rank or self.lora.rank) if self.rule.lora == "flora" else 0

    @property
    def rule(self) -> AggregationSection:
        """What becomes of a round's updates, with nothing left open."""
        return decided_rule(self.lora, self.aggregation, self.privacy)

    def check_rank(self, rank: int) -> None:
        """Check the rank of an agent's adapter.

        Raises:
            JoinRefused: If the run does not allow it.
        """
        least, most = self.lora.least_rank or self.lora.rank, self.lora.rank
        if least <= rank <= most:
            return
        ranks = f"ranks {least} to {most}" if self.lora.has_unlike_ranks else f"rank {most} for all"
        raise JoinRefused(
            f"[agent] rank is {rank}, but the run {self.run.name!r} has {ranks}; set it accordingly, or leave it out."
        )
