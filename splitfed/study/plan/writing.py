"""Figures of plans as people read them."""

import math

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_THOUSAND = 1000.0


def bytes_text(count: float) -> str:
    """Write bytes to three digits: 1.23 GB."""
    power = min(len(_UNITS) - 1, int(math.log(max(count, 1), _THOUSAND) + 1e-9))
    value = count / _THOUSAND**power
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"


def seconds(value: float) -> str:
    """Write seconds to three digits: 1.23 s, 45 ms."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s"


def percent(share: float) -> str:
    """Write a share in per cent."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points."""
    return f"{100 * difference:.3g} percentage points"


def nats(value: float) -> str:
    """Write a loss, which may be below what it is compared with."""
    return f"{value:+.2f} nats"
