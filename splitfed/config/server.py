"""The server's configuration file."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from splitfed.config.aggregation import AggregationSection
from splitfed.config.contradictions import refuse_contradictions
from splitfed.config.federation import FederationSection
from splitfed.config.generation import GenerationSection
from splitfed.config.privacy import PrivacySection, refuse_unsound
from splitfed.config.run import (
    CodecSection,
    LoraSection,
    ModelSection,
    RunConfig,
    RunIdentity,
    TrainingSection,
    decided_rule,
)
from splitfed.config.section import ListeningAddress, LocalPath, Section, Threads, TlsSection


class RunSection(RunIdentity):
    """Which run this is, and where the server keeps it."""

    directory: LocalPath
    """Folder for the checkpoints, adapters and metrics of this run."""


class ServerSection(Section):
    """Where the daemon listens and what it may use."""

    address: ListeningAddress = "127.0.0.1:50151"
    """Address that agents connect to for training."""
    fed_address: ListeningAddress | None = None
    """Address for adapters; left out = the same as address."""
    threads: Threads = None
    """CPU threads for arithmetic; left out = the library's choice."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port for Prometheus metrics on loopback; left out = no metrics are served."""


class ServerConfig(Section):
    """Everything in a server's file."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    codecs: CodecSection = CodecSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    server: ServerSection = ServerSection()
    generation: GenerationSection = GenerationSection()
    tls: TlsSection | None = None

    @field_validator("privacy")
    @classmethod
    def _fits_the_split_point(cls, value: PrivacySection, info: ValidationInfo) -> PrivacySection:
        if (model := info.data.get("model")) is not None:
            refuse_unsound(value, bottom_blocks=model.bottom_blocks, top_blocks=model.top_blocks)
        return value

    @model_validator(mode="after")
    def _is_one_plan(self) -> Self:
        refuse_contradictions(self.model, self.lora, self.federation, self.aggregation, self.privacy)
        return self

    @property
    def run_id(self) -> str:
        """Id of the run in every message."""
        return self.run.name

    def shared(self) -> RunConfig:
        """Give what agents are told: nothing about this machine, so a base folder is known by its name only."""
        base = Path(self.model.base)
        return RunConfig(
            run=RunIdentity(name=self.run.name, seed=self.run.seed),
            model=self.model.model_copy(update={"base": base.name}) if base.is_absolute() else self.model,
            lora=self.lora,
            training=self.training,
            federation=self.federation,
            codecs=self.codecs,
            aggregation=self._aggregation(),
            privacy=self.privacy,
        )

    def _aggregation(self) -> AggregationSection:
        """Give the section with nothing left to the rank of the run: agents may have others."""
        rule = decided_rule(self.lora, self.aggregation, self.privacy)
        if rule.lora != "flora" or rule.flora_rank is not None:
            return self.aggregation
        return self.aggregation.model_copy(update={"flora_rank": self.lora.rank})

    def shared_json(self) -> str:
        """Give ``shared()`` as JSON, which ``RunConfig.model_validate_json`` reads back on the agent."""
        return self.shared().model_dump_json()
