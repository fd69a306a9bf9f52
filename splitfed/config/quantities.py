"""Sizes, times and links as people write them: ``512MiB``, ``5s``, ``20mbit,40ms``."""

import math
import re
from collections.abc import Mapping
from typing import Final

_NUMBER: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-zµ]*)\s*")
_SIZES: Final = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_TIMES: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_RATES: Final = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_size(text: str) -> int:
    """Read a number of bytes, such as 4GB (4 · 10⁹) or 512MiB (512 · 2²⁰).

    Raises:
        ValueError: If it is no size, or none above zero.
    """
    return round(_parse(text, _SIZES, "a size with its unit, such as 4GB or 512MiB"))


def parse_time(text: str) -> float:
    """Read a time in seconds, such as 5s or 40ms.

    Raises:
        ValueError: If it is no time, or none above zero.
    """
    return _parse(text, _TIMES, "a time with its unit, such as 5s or 40ms")


def parse_rate(text: str) -> float:
    """Read a rate in bits per second, such as 20mbit.

    Raises:
        ValueError: If it is no rate, or none above zero.
    """
    return _parse(text, _RATES, "a rate with its unit, such as 20mbit or 1gbit")


def _parse(text: str, units: Mapping[str, float], wanted: str) -> float:
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    value = float(match[1]) * units[unit] if match and unit in units else 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"is {text!r}; write {wanted}")
    return value
