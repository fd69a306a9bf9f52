"""The plot of an audit: each attack's success with noise off and as configured, beside chance."""

import io
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure

from splitfed.study.audit_rows import READS, RECOVERS, Audit, AuditRow

_INK, _MUTED, _GRID, _ON, _OFF = "#1a2230", "#5c6678", "#e1e5eb", "#2563c9", "#c2570c"
_STYLE: Final = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
_APART: Final = 0.16


def draw(audit: Audit) -> bytes:
    """Draw an audit as a PNG.

    Args:
        audit: With at least one row.
    """
    pairs = audit.pairs()
    places, place, above = [], 0.0, None
    for pair in pairs:
        target = _first(pair).result.target
        place += 1.0 if above in (None, target) else 1.7
        places.append(place)
        above = target
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 1.6 + 0.42 * place), layout="constrained")
        axes = figure.subplots()
        for at, pair in zip(places, pairs, strict=True):
            _attack(axes, at, pair)
        _headings(axes, places, pairs)
        axes.set_yticks(places, [_first(pair).result.attack for pair in pairs])
        axes.set_ylim(place + 0.6, places[0] - 1.1)
        axes.set_xlim(-1.5, 101.5)
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.set_xlabel("recovered, with the 95 % interval · a lower bound on what leaks, never a guarantee")
        terms = audit.terms
        configured = f"\nas configured: {terms.configured}" if terms.configured else ""
        axes.set_title(
            f"{terms.run}: {terms.cut}, {terms.private_sequences} sequences{configured}",
            loc="left",
            fontsize=11,
            pad=26,
        )
        axes.legend(
            *_legend(axes),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            borderaxespad=0.2,
            handletextpad=0.3,
            markerscale=0.7,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _attack(axes: Any, at: float, pair: tuple[AuditRow | None, AuditRow | None]) -> None:
    """Draw one attack's line: chance as a tick, a dot with its interval for each protection."""
    chance = 100 * _first(pair).result.chance
    axes.plot(
        [chance], [at], color=_MUTED, marker="|", markersize=20, markeredgewidth=2, linestyle="none", label="chance"
    )
    named = (("noise off", _OFF, -_APART), ("as configured", _ON, _APART))
    for row, (name, color, shift) in zip(pair, named, strict=True):
        if row is None:
            continue
        low, high = (100 * bound for bound in row.result.interval())
        rate = 100 * row.result.rate
        axes.plot([low, high], [at + shift] * 2, color=color, linewidth=2, alpha=0.45, solid_capstyle="butt")
        axes.plot([rate], [at + shift], color=color, marker="o", markersize=6, linestyle="none", label=name)


def _headings(axes: Any, places: list[float], pairs: list[tuple[AuditRow | None, AuditRow | None]]) -> None:
    """Write above each group what it recovers, and from what."""
    above = None
    for at, pair in zip(places, pairs, strict=True):
        target = _first(pair).result.target
        if target != above:
            axes.text(0, at - 0.62, f"{RECOVERS[target]} from {READS[target]}", color=_MUTED, fontsize=9, va="center")
        above = target


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Name each kind of mark once, chance last."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    names = [name for name in ("noise off", "as configured", "chance") if name in once]
    return [once[name] for name in names], names


def _first(pair: tuple[AuditRow | None, AuditRow | None]) -> AuditRow:
    found = pair[0] or pair[1]
    assert found is not None
    return found
