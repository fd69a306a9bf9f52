"""How the figures of the notebooks look, and the marks that they share."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import matplotlib

from splitfed.privacy import format_epsilon
from splitfed.study.spread import Spread
from splitfed.study.sweep import Row

INK: Final = "#1a2230"
MUTED: Final = "#5c6678"
GRID: Final = "#e1e5eb"
COLOURS: Final = ("#2563c9", "#c2570c", "#0f8a5f", "#8b3fb5", "#b3261e", "#6b7280", "#b08900", "#0e7490")
"""Told apart by those who see red and green alike, too: they differ in lightness, and each line has its own mark."""
MARKS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: Final = MappingProxyType({
    "figure.figsize": (7.2, 4.0),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={list(COLOURS)})",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "errorbar.capsize": 3,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
})  # fmt: skip


def use_style() -> None:
    """Have every figure from here on look alike."""
    matplotlib.rcParams.update(_STYLE)


def spread_line(
    axes: Any, points: Mapping[Any, Spread], name: str, number: int, *, shift: float = 0.0, is_joined: bool = True
) -> None:
    """Draw a figure over an axis, each point with its spread over seeds.

    Args:
        axes: Where to draw.
        points: Figures by their place on the horizontal axis.
        name: For the legend.
        number: Which line this is, from 0: decides colour and mark.
        shift: How far to the right, so that error bars do not hide each other.
        is_joined: Join the points by a line: their places have an order.
    """
    places = list(points)
    axes.errorbar(
        [place + shift for place in places],
        [points[place].mean for place in places],
        yerr=[points[place].deviation for place in places],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKS[number % len(MARKS)],
        linestyle="-" if is_joined else "none",
        label=name,
    )


def interval_line(axes: Any, places: Sequence[float], rows: Sequence[Row], name: str, number: int) -> None:
    """Draw success rates with their 95 % intervals.

    Args:
        axes: Where to draw.
        places: Places on the horizontal axis.
        rows: For each place a row with ``recovered``, ``low`` and ``high``, from 0 to 1.
        name: For the legend.
        number: Which line this is, from 0.
    """
    rates, lows, highs = ([100 * row[column] for row in rows] for column in ("recovered", "low", "high"))
    color = COLOURS[number % len(COLOURS)]
    axes.plot(places, rates, color=color, marker=MARKS[number % len(MARKS)], label=name)
    axes.fill_between(places, lows, highs, color=color, alpha=0.12, linewidth=0)


def noise_axis(axes: Any, noises: Sequence[float], epsilons: Mapping[float, float | None] | None = None) -> None:
    """Have noise multipliers at even distances on the horizontal axis: the first is at 0, the next at 1.

    Args:
        axes: Where to draw.
        noises: The multipliers, ascending.
        epsilons: What to write below each of them; None or infinite: nothing is guaranteed.
    """
    labels = [f"{noise:g}" for noise in noises]
    name = "noise multiplier (noise ÷ sensitivity)"
    if epsilons is not None:
        labels = [f"{label}\nε {_stated(epsilons.get(noise))}" for label, noise in zip(labels, noises, strict=True)]
        name += "; below: ε of one release"
        axes.tick_params(axis="x", labelsize=8)
    axes.set_xticks(range(len(noises)), labels)
    axes.set_xlabel(name)


def _stated(epsilon: float | None) -> str:
    return format_epsilon(None if epsilon is None or math.isinf(epsilon) else epsilon)
