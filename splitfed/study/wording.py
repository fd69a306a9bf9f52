"""How a report writes its numbers. What was not shared is said to be so, never filled in."""

import math

from splitfed.study.page import Html, element

NOT_SHARED = element("span", "not shared", kind="absent")
NOTHING = element("span", "nothing is guaranteed", kind="absent")


def loss(value: float | None) -> Html:
    """Nats per token, to three decimals."""
    return NOT_SHARED if value is None else Html(f"{value:.3f}")


def delta(value: float | None) -> Html:
    """A probability such as 1e-5."""
    return NOT_SHARED if value is None else Html(f"{value:g}".replace("e-0", "e-"))


def perplexity(value: float) -> str:
    """The perplexity of a loss in nats."""
    return f"{math.exp(value):,.1f}" if value < 20 else "over 10⁸"


def count(value: float | None) -> Html:
    """A whole number with separators."""
    return NOT_SHARED if value is None else Html(f"{value:,.0f}")


def seconds(value: float | None) -> Html:
    """Seconds, to a tenth."""
    return NOT_SHARED if value is None else Html(f"{value:,.1f}")


def share(part_s: float, whole_s: float) -> Html:
    """Seconds, with the per cent of the whole that they are."""
    return Html(f"{part_s:,.1f} ({100 * part_s / whole_s if whole_s else 0:.0f} %)")


def total(statement: str) -> Html:
    """What an agent says of all channels together; its delta, unit and relation have columns of their own."""
    value, separator, _ = statement.partition(" at delta ")
    if separator and value.startswith("epsilon "):
        return element("span", f"ε {value.removeprefix('epsilon ')}")
    return element("span", statement, kind="long")


def size(value: int | None) -> Html:
    """Bytes in decimal units."""
    if value is None:
        return NOT_SHARED
    scaled, unit = next(((value / scale, name) for scale, name in _UNITS if value >= scale), (value, "B"))
    return Html(f"{scaled:,.1f} {unit}" if unit != "B" else f"{value} B")


def epsilon(value: float | None) -> Html:
    """An epsilon in three significant digits or more; infinity means that nothing is guaranteed."""
    if value is None:
        return NOT_SHARED
    if not math.isfinite(value):
        return NOTHING
    if value >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return Html(f"{mantissa} × 10<sup>{int(exponent)}</sup>")
    return Html(f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}")


_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
