"""From the file of a sweep to its runs: every point of the grid with a configuration of its own, or why it has none."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from splitfed.config.aggregation import AggregationSection
from splitfed.config.contradictions import refuse_contradictions
from splitfed.config.explain import explain
from splitfed.config.federation import FederationSection
from splitfed.config.privacy import PrivacySection, refuse_unsound
from splitfed.config.run import DIRECTIONS, CodecSection, LoraSection, ModelSection, TrainingSection
from splitfed.config.section import Section
from splitfed.config.sweep import SweepConfig, SweepDataSection
from splitfed.config.sweep_axes import BASELINES, Axis, axes

Method = Literal["split", "central", "fedlora"]

_SECTIONS: Final = ("model", "lora", "training", "federation", "codecs", "aggregation", "privacy", "data")
_OF_A_SPLIT: Final = ("model.bottom", "model.top", "codecs.", "aggregation.", "privacy.", "federation.")
_OF_A_DEAL: Final = ("data.deal", "data.alpha", "data.labels_per_agent")


class CellConfig(Section):
    """Everything that decides the result of one run, but the content of base model and data."""

    method: Method
    """ "split", or a baseline that needs no split."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of everything random."""
    model: ModelSection
    lora: LoraSection
    training: TrainingSection
    federation: FederationSection
    codecs: CodecSection
    aggregation: AggregationSection
    privacy: PrivacySection
    data: SweepDataSection

    @model_validator(mode="after")
    def _is_one_plan(self) -> Self:
        self.data.refuse_half_a_deal()
        in_a_round = self.federation.cohort or self.federation.agents
        if in_a_round < self.aggregation.least_updates:
            raise ValueError(
                f"a round has {in_a_round} updates, but aggregation.{self.aggregation.needs} needs "
                f"{self.aggregation.least_updates}; raise federation.agents, or cohort"
            )
        everyone = self.federation.model_copy(update={"quorum": in_a_round})
        refuse_contradictions(self.model, self.lora, everyone, self.aggregation, self.privacy)
        refuse_unsound(self.privacy, bottom_blocks=self.model.bottom_blocks, top_blocks=self.model.top_blocks)
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        point: Its value on each axis that has a meaning for it, in the order of the file.
        config: Its configuration; None where its settings do not go together.
        refusal: Why there is none, in a sentence.
    """

    point: Mapping[str, Any]
    config: CellConfig | None
    refusal: str = ""

    @property
    def work(self) -> int:
        """Rows and tokens to train on: what the time that a run takes goes with, roughly."""
        if self.config is None:
            return 0
        training, federation = self.config.training, self.config.federation
        rows = training.rounds * training.local_steps * training.batch_size * training.max_tokens
        return rows * (federation.cohort or federation.agents)


def cells(config: SweepConfig) -> list[Cell]:
    """Give every run of a sweep, each once: all of one seed before the next, so that a part of them is of use.

    A baseline has neither split point nor noise, codec or rule: points that differ in these alone are one run.
    """
    known = axes()
    order = sorted(config.grid, key=lambda name: name != "seed")
    found: dict[str, Cell] = {}
    for values in itertools.product(*(config.grid[name] for name in order)):
        at = dict(zip(order, values, strict=True))
        cell = _cell(config, {name: at[name] for name in config.grid}, known)
        found.setdefault(json.dumps(cell.point), cell)
    return list(found.values())


def _cell(config: SweepConfig, point: dict[str, Any], known: Mapping[str, Axis]) -> Cell:
    variant = point.get("variant", point.get("federation.variant"))
    method = variant if variant in BASELINES else "split"
    vain = () if method == "split" else _OF_A_SPLIT + (_OF_A_DEAL if method == "central" else ())
    point = {
        name: value
        for name, value in point.items()
        if value == method or not any(_lies_in(key, vain) for key in known[name].keys)
    }
    sections = {name: getattr(config, name).model_dump() for name in _SECTIONS}
    for name, value in point.items():
        for key, setting in known[name].settings(value).items():
            section, _, field = key.partition(".")
            sections[section][field] = setting
    if method != "split":
        sections |= _without_a_split(sections, method)
    try:
        made = CellConfig.model_validate({"method": method, "seed": point.get("seed", 0), **sections})
    except ValidationError as error:
        return Cell(point, None, explain(error, CellConfig))
    return Cell(point, made)


def _lies_in(key: str, places: tuple[str, ...]) -> bool:
    return key != "federation.agents" and key.startswith(places)


def _without_a_split(sections: Mapping[str, dict[str, Any]], method: str) -> dict[str, dict[str, Any]]:
    """Give the sections that a baseline does not look at, such that the same baseline has the same everywhere."""
    changed = {
        "model": {**sections["model"], "bottom_blocks": 0, "top_blocks": 0},
        "federation": FederationSection(agents=sections["federation"]["agents"]).model_dump(),
        "codecs": CodecSection.model_validate(dict.fromkeys(DIRECTIONS, "none")).model_dump(),
        "aggregation": AggregationSection().model_dump(),
        "privacy": PrivacySection(noise_multiplier=0).model_dump(),
    }
    if method == "central":
        alike: dict[str, Any] = {"deal": "iid", "alpha": None, "labels_per_agent": None}
        changed["data"] = {**sections["data"], **alike, "label_column": None, "label_attribute": None}
    return changed
