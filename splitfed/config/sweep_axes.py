"""The axes of a sweep's grid: their names, which keys they set, and which values they take."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from splitfed.config.aggregation import AggregationSection
from splitfed.config.federation import FederationSection
from splitfed.config.privacy import PrivacySection
from splitfed.config.run import CodecName, CodecSection, LoraSection, ModelSection, TrainingSection
from splitfed.config.section import Section

BASELINES: Final = ("central", "fedlora")
"""Ways to train without a split, which stand among the variants."""

_SECTIONS: Final[dict[str, tuple[type[Section], frozenset[str] | None]]] = {
    "model": (ModelSection, frozenset({"bottom_blocks", "top_blocks", "dtype"})),
    "lora": (LoraSection, frozenset({"rank", "alpha", "dropout", "targets"})),
    "training": (TrainingSection, None),
    "federation": (
        FederationSection,
        frozenset({"agents", "cohort", "variant", "max_staleness", "staleness_exponent", "merge_ends"}),
    ),
    "codecs": (CodecSection, frozenset({"smashed", "trunk_output", "output_gradient", "smashed_gradient"})),
    "aggregation": (AggregationSection, None),
    "privacy": (PrivacySection, frozenset(PrivacySection.model_fields) - {"denoise", "sample_rate"}),
}
"""Which keys may differ within a sweep; None = all of the section."""
_BlockCount = Annotated[int, Field(ge=0)]
_SPECIAL: Final[dict[str, tuple[Any, tuple[str, ...]]]] = {
    "split_point": (
        Annotated[list[_BlockCount], Field(min_length=2, max_length=2)],
        ("model.bottom_blocks", "model.top_blocks"),
    ),
    "noise_multiplier": (None, ("privacy.noise_multiplier",)),
    "codec": (
        CodecName,
        ("codecs.smashed", "codecs.trunk_output", "codecs.output_gradient", "codecs.smashed_gradient"),
    ),
    "variant": (Literal["sflv1", "sflv2", "parallel", "async", "central", "fedlora"], ("federation.variant",)),
    "seed": (Annotated[int, Field(ge=0, lt=2**63)], ()),
    "data.deal": (Literal["iid", "dirichlet", "labels"], ("data.deal",)),
    "data.alpha": (Annotated[float, Field(gt=0)], ("data.alpha",)),
    "data.labels_per_agent": (Annotated[int, Field(ge=1)], ("data.labels_per_agent",)),
    "data.examples_per_agent": (Annotated[int, Field(ge=1)], ("data.examples_per_agent",)),
}
_MOST_RUNS: Final = 100_000


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: As the file has it.
        values: Type of its values.
        keys: Dotted keys that a value sets: one each of a list of values, or all the same.
    """

    name: str
    values: Any
    keys: tuple[str, ...]

    def settings(self, value: Any) -> dict[str, Any]:
        """Give the keys that a value sets."""
        return dict(zip(self.keys, value if self.name == "split_point" else [value] * len(self.keys), strict=True))


def axes() -> dict[str, Axis]:
    """Give every axis there is, by its name."""
    found = {
        f"{section}.{key}": Axis(f"{section}.{key}", field.rebuild_annotation(), (f"{section}.{key}",))
        for section, (of, names) in _SECTIONS.items()
        for key, field in of.model_fields.items()
        if names is None or key in names
    }
    special = {name: Axis(name, values or found[keys[0]].values, keys) for name, (values, keys) in _SPECIAL.items()}
    return special | found


def text_of(value: object) -> str:
    """Write an axis' value as a table has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, int) for each in value):
        return "+".join(map(str, value))
    return json.dumps(value)


def checked_axes(grid: object) -> dict[str, list[Any]]:
    """Check a grid, and give its values as their keys will have them.

    Args:
        grid: A list of values for each axis; ``training.rank`` may be a table in a table.

    Raises:
        ValueError: If it is no grid, has an unknown axis, or a value that its key does not take.
    """
    if not isinstance(grid, dict):
        raise ValueError("must be a table with a list of values for each axis, such as seed = [0, 1, 2]")
    known = axes()
    found: dict[str, list[Any]] = {}
    for name, values in _flat(grid).items():
        if name not in known:
            raise ValueError(f"has the unknown axis {name}; {_advice(name, known)}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"has no list of values for {name}; write {name.rpartition('.')[2]} = [...]")
        found[name] = [_checked(known[name], value) for value in values]
        texts = [text_of(value) for value in found[name]]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"has {twice[0]} twice in {name}; leave it there once")
    _refuse_overlap(found, known)
    if (runs := math.prod(map(len, found.values()))) > _MOST_RUNS:
        raise ValueError(f"has {runs} runs, more than {_MOST_RUNS}; divide it into several files")
    return found


def _flat(grid: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in grid.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _checked(axis: Axis, value: object) -> Any:
    try:
        return TypeAdapter(axis.values, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        said = detail["msg"].removeprefix("Value error, ")
        raise ValueError(f"has {text_of(value)} in {axis.name}: {said[0].lower()}{said[1:]}; correct it") from error


def _refuse_overlap(found: Mapping[str, Any], known: Mapping[str, Axis]) -> None:
    owner: dict[str, str] = {}
    for name in found:
        for key in known[name].keys:
            if key in owner:
                raise ValueError(f"sets {key} in two axes, {owner[key]} and {name}; leave one of them out")
            owner[key] = name


def _advice(name: str, known: Mapping[str, Axis]) -> str:
    last = name.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    nearest = same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    nearest = nearest or [
        each
        for each in known
        if each.rpartition(".")[2] in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1)
    ]
    if nearest:
        return f"did you mean {nearest[0]}?"
    return "there are split_point, noise_multiplier, codec, variant, seed, and keys such as training.learning_rate"
