"""The file of a sweep: what all of its runs have in common, and the grid of what they differ in."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from splitfed.config.agent import DataSection
from splitfed.config.aggregation import AggregationSection
from splitfed.config.federation import FederationSection
from splitfed.config.privacy import PrivacySection
from splitfed.config.run import CodecSection, LoraSection, ModelSection, TrainingSection
from splitfed.config.section import LocalPath, Section
from splitfed.config.sweep_axes import checked_axes
from splitfed.config.toml_file import read_toml

_ALIKE = "agents of a sweep are alike"
_PRESENT = "in one process nobody is late or goes"
_WITHOUT_EFFECT = {
    ("model", "least_bottom_blocks"): _ALIKE,
    ("model", "least_top_blocks"): _ALIKE,
    ("lora", "least_rank"): _ALIKE,
    ("codecs", "adapter"): "adapters of a sweep are not encoded",
    ("federation", "population"): _PRESENT,
    ("federation", "over_selection"): _PRESENT,
    ("federation", "quorum"): _PRESENT,
    ("federation", "straggler_margin"): _PRESENT,
    ("federation", "late_updates"): _PRESENT,
    ("federation", "agent_timeout_s"): _PRESENT,
    ("privacy", "denoise"): "only a server takes noise away",
    ("privacy", "sample_rate"): "a sample that is drawn in secret cannot be drawn again",
}


class SweepDataSection(DataSection):
    """The data of all agents together, and how it is dealt to them."""

    deal: Literal["iid", "dirichlet", "labels"] = "iid"
    """Who gets what: "iid": all agents alike; "dirichlet": each a mix of labels of its own; "labels": each a few labels
    only."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """With deal = "dirichlet": how alike the mixes are; 0.1 = each agent has few labels, 100 = all have the same."""
    labels_per_agent: Annotated[int, Field(ge=1)] | None = None
    """With deal = "labels": labels that an agent has."""
    label_column: str | None = None
    """Column of the label that rows are dealt by."""
    label_attribute: str | None = None
    """Attribute of that column to take for the label, where it reads name[...], food[...]; left out = all of it."""
    examples_per_agent: Annotated[int, Field(ge=1)] | None = None
    """Examples that each agent gets, drawn anew for each seed; left out = all are dealt."""
    held_out_examples: Annotated[int, Field(ge=1)] | None = None
    """Held-out examples to measure on, at even distances; left out = all."""

    def refuse_half_a_deal(self) -> None:
        """Refuse a way to deal without what it needs.

        Raises:
            ValueError: If a key is missing, or has no meaning with this way to deal.
        """
        for key, deal in (("alpha", "dirichlet"), ("labels_per_agent", "labels")):
            if (getattr(self, key) is None) == (self.deal == deal):
                raise ValueError(f'data.{key} and data.deal = "{deal}" belong together; give both or neither')
        if self.deal != "iid" and self.label_column is None:
            raise ValueError(f'data.deal = "{self.deal}" needs data.label_column, the label of each row; set it')


class OutputSection(Section):
    """Where the rows go."""

    csv: LocalPath
    """The table: a row for each run of the grid; one that exists is gone on with."""


class SweepConfig(Section):
    """Everything in a sweep's file."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    codecs: CodecSection = CodecSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    data: SweepDataSection
    grid: Annotated[dict[str, list[Any]], BeforeValidator(checked_axes)]
    """What runs differ in: a list of values for each axis."""
    output: OutputSection

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Self:
        for (section, key), why in _WITHOUT_EFFECT.items():
            part = getattr(self, section)
            if getattr(part, key) != type(part).model_fields[key].default:
                raise ValueError(f"{section}.{key} has no place in a sweep: {why}; leave it out")
        if self.data.held_out_path is None and not self.data.held_out_fraction:
            raise ValueError("there is nothing to measure on; set data.held_out_path, or data.held_out_fraction")
        if self.data.label_column is None and self.data.label_attribute is not None:
            raise ValueError("data.label_attribute is one of data.label_column; set that too, or leave it out")
        return self


def load_sweep_config(path: Path | str) -> SweepConfig:
    """Read a sweep's file; relative paths in it start at the file's own folder.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key, an axis or a value that is not allowed.
    """
    return read_toml(path, SweepConfig, if_missing="give the path of a sweep's TOML file")
