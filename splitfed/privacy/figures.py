"""How an epsilon is written for people."""

from decimal import ROUND_CEILING, Context, Decimal
from typing import Final

_SHOWN_DIGITS: Final = 4


def format_epsilon(value: float | None) -> str:
    """Write an epsilon with four digits, rounded up: a guarantee is never stated better than it is."""
    if value is None:
        return "none"
    if value == 0:
        return "0"
    rounded = Context(prec=_SHOWN_DIGITS, rounding=ROUND_CEILING).create_decimal(Decimal(value))
    return f"{rounded:,f}" if 1e-3 <= value < 1e9 else f"{rounded:.{_SHOWN_DIGITS - 1}e}"
