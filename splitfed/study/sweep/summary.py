"""A sweep in a few lines: means over seeds, and how far apart seeds are."""

import statistics
from collections.abc import Sequence

from splitfed.config.sweep_axes import text_of
from splitfed.study.sweep.table import FIGURES, Row

_HEADINGS = (
    "runs",
    "loss",
    "perplexity",
    "epsilon",
    "up kB",
    "down kB",
    "adapter kB",
)
_KB = 1e3


def summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Put rows together that differ in their seed alone: means, and sample standard deviations.

    Args:
        rows: Rows of one sweep.

    Returns:
        Headings, lines, and sentences to say below.
    """
    axes = [name for name in (rows[0] if rows else {}) if name not in {"cell", "sweep", "seed", *FIGURES}]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple("" if row[axis] is None else text_of(row[axis]) for axis in axes), []).append(row)
    lines = [[*at, *_figures([row for row in group if row["error"] is None], group)] for at, group in groups.items()]
    failed = [row for row in rows if row["error"] is not None]
    sentences = []
    if failed:
        sentences.append(
            f"Failed: {len(failed)} of {len(rows)} runs; the column error says why, and --retry-failed makes them "
            f"again. The first: {failed[0]['error']}"
        )
    if any(row["epsilon"] is not None for row in rows):
        stated = next(row for row in rows if row["epsilon"] is not None)
        sentences.append(
            f"epsilon is that of the record that is worst off, for a sequence, at delta {stated['delta']:g}, relation "
            f"{stated['relation']}."
        )
    if len(rows) > len(failed):
        sentences.append("loss is held out, in nats per token; kB are those of an agent in a round.")
    return [*axes, *_HEADINGS], lines, sentences


def _figures(rows: Sequence[Row], group: Sequence[Row]) -> list[str]:
    runs = str(len(rows)) if len(rows) == len(group) else f"{len(rows)} of {len(group)}"
    if not rows:
        return [runs, *[""] * (len(_HEADINGS) - 1)]

    def mean(*columns: str) -> float:
        return statistics.mean(sum(row[column] for column in columns) for row in rows)

    spent = [row["epsilon"] for row in rows if row["epsilon"] is not None]
    up_kb, down_kb = (mean(f"activation_{way}_bytes") / _KB for way in ("up", "down"))
    return [
        runs,
        _spread([row["held_out_loss"] for row in rows], 4),
        _spread([row["perplexity"] for row in rows], 2),
        f"{max(spent):.4g}" if spent else "",
        f"{up_kb:.0f}",
        f"{down_kb:.0f}",
        f"{mean('adapter_up_bytes', 'adapter_down_bytes') / _KB:.0f}",
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
