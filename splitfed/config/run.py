"""What holds for a whole run, the same on the server and on every agent."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from splitfed.config.aggregation import AggregationSection
from splitfed.config.privacy import PrivacySection
from splitfed.config.section import Base, Name, Section
from splitfed.errors import JoinRefused

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
    least_bottom_blocks: Annotated[int, Field(ge=0)] | None = None
    """Fewest blocks that an agent with a split point of its own may hold there; left out = bottom_blocks."""
    least_top_blocks: Annotated[int, Field(ge=0)] | None = None
    """The same before the head; left out = top_blocks."""
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
    """Smallest rank that an agent may choose for its own adapter, in place of rank; left out = all have rank."""
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
        return value


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


class FederationSection(Section):
    """Who takes part, and how their work is combined."""

    agents: Annotated[int, Field(ge=1)] = 1
    """Agents to wait for before the first round starts."""
    population: Annotated[int, Field(ge=1)] | None = None
    """Most agents that may ever take part, some of them from a later round on; left out = agents."""
    cohort: Annotated[int, Field(ge=1)] | None = None
    """Agents per round, drawn anew for each from those that are here; left out = all that are here."""
    over_selection: Annotated[int, Field(ge=0)] = 0
    """Agents asked beyond the cohort: a round is over with the first cohort updates, and the rest are late."""
    quorum: Annotated[int, Field(ge=1)] = 1
    """Updates below which no round is over, whoever is missing."""
    straggler_margin: Annotated[float, Field(ge=1)] | None = None
    """How many times the median agent's time a round waits for the others; left out = until agent_timeout_s."""
    late_updates: Literal["drop", "merge"] = "drop"
    """What becomes of an update whose round is over: nothing, or its change counts in the round that it comes in."""
    variant: Literal["sflv1", "sflv2", "parallel", "async"] = "sflv1"
    """How agents share the trunk's adapter in a round: "sflv1": each has its own copy, and the copies are averaged;
    "sflv2": it goes from agent to agent; "parallel": all train it in joint steps; "async": each at its own pace."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """With variant = "async": steps of others that may come between an agent's forward and its step; left out = four
    times the agents of the round."""
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    """With variant = "async": a step with s others in between moves by (1 + s) ** -exponent of the learning rate."""
    merge_ends: Literal["round", "step"] = "round"
    """When bottom and top are merged: their adapters once a round or, with variant = "parallel", their gradients at
    every step."""
    agent_timeout_s: Annotated[float, Field(gt=0)] = 300
    """Seconds without progress after which an agent is taken to be gone."""

    @field_validator("merge_ends")
    @classmethod
    def _has_joint_steps(cls, value: str, info: ValidationInfo) -> str:
        if value == "step" and info.data.get("variant") not in (None, "parallel"):
            raise ValueError('is "step", which needs variant = "parallel": other variants have no step in common')
        return value

    @field_validator("population")
    @classmethod
    def _holds_the_agents(cls, value: int | None, info: ValidationInfo) -> int | None:
        agents = info.data.get("agents")
        if value is not None and agents is not None and value < agents:
            raise ValueError(f"is {value}, fewer than agents = {agents}; raise it, or leave it out")
        return value

    @field_validator("cohort")
    @classmethod
    def _fits_the_population(cls, value: int | None, info: ValidationInfo) -> int | None:
        population = info.data.get("population") or info.data.get("agents")
        if value is not None and population is not None and value > population:
            raise ValueError(f"is {value}, more than may ever take part ({population}); lower it, or raise population")
        return value

    @field_validator("over_selection")
    @classmethod
    def _leaves_someone_to_ask(cls, value: int, info: ValidationInfo) -> int:
        cohort, population = info.data.get("cohort"), info.data.get("population") or info.data.get("agents")
        if value and cohort is None and "cohort" in info.data:
            raise ValueError(f"is {value}, but without a cohort everyone is asked; set cohort, or leave it out")
        if value and cohort is not None and population is not None and cohort + value > population:
            raise ValueError(
                f"is {value}, which with cohort = {cohort} asks more than may ever take part ({population}); lower it"
            )
        return value

    @field_validator("quorum")
    @classmethod
    def _can_be_met(cls, value: int, info: ValidationInfo) -> int:
        for name in ("cohort", "agents"):
            most = info.data.get(name)
            if most is not None and value > most:
                raise ValueError(f"is {value}, more than {name} = {most}: no round would ever be over; lower it")
        return value

    @model_validator(mode="after")
    def _can_keep_its_bound_on_staleness(self) -> Self:
        in_between = self.most_at_work - 1
        if self.variant == "async" and self.max_staleness is not None and self.max_staleness < in_between:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but {self.most_at_work} clients at work make up to "
                f"{in_between} steps in between; raise it"
            )
        return self

    @property
    def most_at_work(self) -> int:
        """Agents that may be at work in a round at the same time."""
        if self.cohort is not None:
            return self.cohort + self.over_selection
        return self.population or self.agents


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
        has_unlike_ranks=lora.least_rank is not None, is_noised=privacy.is_on and privacy.adapter != "none"
    )


def refuse_contradictions(
    model: ModelSection,
    lora: LoraSection,
    federation: FederationSection,
    aggregation: AggregationSection,
    privacy: PrivacySection,
) -> None:
    """Refuse settings of which each is sound and the whole is not.

    Args:
        model: The run's section.
        lora: The run's section.
        federation: The run's section.
        aggregation: The run's section.
        privacy: What the run asks of its agents.

    Raises:
        ValueError: If no round could be over, or an update could never be counted, or would leave unprotected.
    """
    rule = decided_rule(lora, aggregation, privacy)
    has_unlike_devices = lora.least_rank is not None or model.widest != model
    if federation.merge_ends == "step" and has_unlike_devices:
        raise ValueError(
            'federation.merge_ends = "step" needs agents that hold the same; leave out [model] least_bottom_blocks and '
            'least_top_blocks and [lora] least_rank, or set merge_ends = "round"'
        )
    if privacy.denoise and model.widest != model:
        raise ValueError(
            "privacy.denoise takes noise away at one split point; leave out [model] least_bottom_blocks and "
            "least_top_blocks, or denoise"
        )
    if federation.quorum < aggregation.least_updates:
        raise ValueError(
            f"federation.quorum is {federation.quorum}, but byzantine = {aggregation.byzantine} needs "
            f"{aggregation.least_updates} updates in every round; raise quorum"
        )
    if federation.late_updates == "merge":
        if federation.variant != "sflv1":
            raise ValueError(
                f'federation.late_updates = "merge" needs variant = "sflv1", not "{federation.variant}": only with a '
                'trunk adapter of its own can an agent go on once its round is over; set "drop"'
            )
        if rule.lora == "alternating":
            raise ValueError(
                'federation.late_updates = "merge" does not go with aggregation.lora = "alternating": the next round '
                'trains the other factor; set "drop"'
            )
    if federation.merge_ends == "step" and privacy.is_on and privacy.adapter == "update":
        raise ValueError(
            'federation.merge_ends = "step" sends a gradient at every step, which privacy.adapter = "update" does not '
            'protect; set adapter = "dp-sgd", or merge_ends = "round"'
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
        least, most = self.lora.least_rank, self.lora.rank
        if rank == most or (least is not None and least <= rank <= most):
            return
        ranks = f"rank {most} for all" if least is None else f"ranks {least} to {most}"
        raise JoinRefused(
            f"[agent] rank is {rank}, but the run {self.run.name!r} has {ranks}; set it accordingly, or leave it out."
        )
