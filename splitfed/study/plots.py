"""The plots of a report, as SVG that takes its colours and its font from the page around it."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours that no plot uses otherwise, each of which stands for a variable of the page's style sheet.
INK, MUTED, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--first", SECOND: "--second"}

_MOST_LETTERS = 16

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "splitfed",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """One named quantity over the rounds, and the same of each agent behind it. None = nothing to draw there."""

    name: str
    color: str
    values: Sequence[float | None]
    per_agent: Sequence[Sequence[float | None]] = ()


def line_plot(rounds: Sequence[int], series: Sequence[Series], *, label: str, description: str) -> str:
    """Draw quantities over the rounds as lines, each agent's thin behind it.

    Args:
        rounds: Numbers of the rounds.
        series: What to draw; each sequence of values is as long as ``rounds``.
        label: Of the vertical axis.
        description: For readers who do not see the plot.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(rounds, label)
        for one in series:
            for values in one.per_agent:
                axes.plot(rounds, _gaps(values), color=one.color, linewidth=0.9, alpha=0.4, marker="o", markersize=2)
        for one in series:
            size = 6 if len(rounds) <= 16 else 3
            axes.plot(
                rounds, _gaps(one.values), color=one.color, linewidth=2.2, marker="o", markersize=size, label=one.name
            )
        axes.margins(y=0.12)
        _legend(axes, len(series))
        return _svg(figure, description)


def bar_plot(rounds: Sequence[int], series: Sequence[Series], *, label: str, description: str) -> str:
    """Draw quantities over the rounds as bars side by side; arguments and result as in ``line_plot``."""
    width = 0.7 / len(series)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(rounds, label)
        for index, one in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * width
            places = [number + shift for number in rounds]
            axes.bar(places, _gaps(one.values), width=width * 0.92, color=one.color, label=one.name)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        _legend(axes, len(series))
        return _svg(figure, description)


def stacked_plot(names: Sequence[str], series: Sequence[Series], *, label: str, description: str) -> str:
    """Draw what adds up to a whole as a bar for each name.

    Args:
        names: Whose bars, from top to bottom.
        series: The parts, from left to right; each sequence of values is as long as ``names``.
        label: Of the horizontal axis.
        description: For readers who do not see the plot.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.7, 1.3 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        begin = [0.0] * len(names)
        for one in series:
            values = [value or 0.0 for value in one.values]
            axes.barh(range(len(names)), values, left=begin, height=0.62, color=one.color, label=one.name)
            begin = [start + value for start, value in zip(begin, values, strict=True)]
        axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        _legend(axes, len(series))
        return _svg(figure, description)


def _short(name: str) -> str:
    """Cut a name to what leaves room for its bar."""
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _axes(rounds: Sequence[int], label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.7, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    return figure, axes


def _legend(axes: Any, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # an element of a page has no XML prologue
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[\d. ]+"', svg)
    assert box is not None
    element = (
        f'<svg role="img" aria-label="{html.escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}>'
    )
    return element + svg[svg.index(">") + 1 :]
