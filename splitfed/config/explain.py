"""One sentence for a person out of pydantic's list of validation errors."""

import difflib
import typing
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path, written as a string",
    "list_type": "a list",
    "model_type": "a table",
    "string_too_short": "a string that is not empty",
    "too_short": "a list that is not empty",
}
_TOML_TYPES = (
    (bool, "the boolean"),
    (int, "the integer"),
    (float, "the number"),
    (str, "the string"),
    (list, "the list"),
)
_LONGEST_VALUE = 60


def explain(error: ValidationError, config_class: type[BaseModel], **elsewhere: type[BaseModel]) -> str:
    """Say in one sentence what the first mistake is and what to do.

    An unknown key comes first: it is often the reason why another is missing.

    Args:
        error: What pydantic raised on validating ``config_class``.
        config_class: The class of the whole configuration file.
        **elsewhere: The classes of other files, by whose they are; a key of theirs may have come here by mistake.

    Returns:
        A sentence on one line, without a full stop, which names the dotted key.
    """
    details = error.errors(include_url=False)
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    if first["type"] == "extra_forbidden":
        return _unknown_key(first, config_class, elsewhere)
    if first["type"] == "missing":
        return _missing_key(first, config_class)
    if not first["loc"]:
        return _wrong_value(first)  # a contradiction between sections, which names their keys itself
    if first["type"] == "value_error" and _section_at(first["loc"], config_class) is not None:
        return f"[{_dotted(first['loc'])}] {_wrong_value(first)}"
    return f"{_dotted(first['loc'])} {_wrong_value(first)}"


def _unknown_key(detail: ErrorDetails, config_class: type[BaseModel], elsewhere: Mapping[str, type[BaseModel]]) -> str:
    *parents, key = detail["loc"]
    for owner, other_class in elsewhere.items():
        if (other := _section_at(parents, other_class)) is not None and str(key) in other.model_fields:
            return f"unknown key {_dotted(detail['loc'])}; it belongs in the {owner}'s configuration, so move it there"
    section = _section_at(parents, config_class)
    valid = list(section.model_fields) if section else []
    where = f"[{_dotted(parents)}]" if parents else "the file"
    nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    advice = f"did you mean {_dotted([*parents, nearest[0]])}?" if nearest else f"{where} has {', '.join(valid)}"
    return f"unknown key {_dotted(detail['loc'])}; {advice}"


def _missing_key(detail: ErrorDetails, config_class: type[BaseModel]) -> str:
    section = _section_at(detail["loc"], config_class)
    if section is not None:
        required = [name for name, field in section.model_fields.items() if field.is_required()]
        return f"the section [{_dotted(detail['loc'])}] is missing; add it with {' and '.join(required)}"
    *parents, key = detail["loc"]
    owner = _section_at(parents, config_class)
    meaning = (owner.model_fields[str(key)].description or "") if owner else ""
    return f"{_dotted(detail['loc'])} is missing; add it: {' '.join(meaning.split()).rstrip('.')}"


def _wrong_value(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, but is {_describe(detail['input'])}"
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "below {lt}",
        "literal_error": "{expected}",
        "string_pattern_mismatch": "1 to 64 letters, digits, underscores, hyphens or (not first) dots",
    }
    if kind in bounds:
        return f"must be {bounds[kind].format(**context)}, but is {_describe(detail['input'])}"
    return f"is {_describe(detail['input'])}: {detail['msg']}"


def _describe(value: object) -> str:
    for toml_type, name in _TOML_TYPES:
        if isinstance(value, toml_type):
            text = repr(value).lower() if isinstance(value, bool) else repr(value)
            return f"{name} {text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + '…'}"
    return "a table" if isinstance(value, dict) else f"a {type(value).__name__}"


def _dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _section_at(location: Sequence[int | str], config_class: type[BaseModel]) -> type[BaseModel] | None:
    """Follow a location through nested sections; None where it ends at a plain value."""
    current: type[BaseModel] | None = config_class
    for part in location:
        field = current.model_fields.get(str(part)) if current else None
        if field is None:
            return None
        candidates = (field.annotation, *typing.get_args(field.annotation))
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return current
