"""Runs that differ in their seed alone, as one figure and how far apart they are."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from splitfed.study.sweep import Row


@dataclass(frozen=True)
class Spread:
    """A figure over several runs.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; 0 for one run, which says nothing of others.
        runs: How many there are.
    """

    mean: float
    deviation: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Put values together.

        Raises:
            ValueError: If there is none.
        """
        each = list(values)
        if not each:
            raise ValueError("There is no run to take the mean of; choose rows that the table has.")
        return cls(statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.runs > 1 else " (one run)")


def over_seeds(
    rows: Iterable[Row], by: Sequence[str], figure: str | Callable[[Row], float | None] = "held_out_loss"
) -> dict[Any, Spread]:
    """Put rows together that are alike in some columns.

    Args:
        rows: Rows of a table.
        by: Columns that tell one point from another.
        figure: Column of the figure, or what gives it for a row; rows in which it is None are left out.

    Returns:
        The figure by point, in the order of the table: a point is the value of the column, or with several columns
        the tuple of their values.

    Raises:
        ValueError: If no column is named.
    """
    if not by:
        raise ValueError("No column is named; give those that tell one point from another.")
    values: dict[Any, list[float]] = {}
    for row in rows:
        value = figure(row) if callable(figure) else row[figure]
        if value is not None:
            point = tuple(row[column] for column in by) if len(by) > 1 else row[by[0]]
            values.setdefault(point, []).append(value)
    return {point: Spread.of(each) for point, each in values.items()}


def apart(
    rows: Iterable[Row], others: Iterable[Row], by: Sequence[str], figure: str = "held_out_loss"
) -> dict[Any, Spread]:
    """Say by how much rows differ from those of the same seed, which leaves out what the seeds have in common.

    Args:
        rows: Rows of a table.
        others: What they are compared with: one row for a seed.
        by: Columns that tell one point from another.
        figure: Column of the figure.

    Returns:
        Figure minus the other's figure by point, as `over_seeds` has them; seeds without an other are left out.
    """
    of_seed = {row["seed"]: row[figure] for row in others}
    return over_seeds(rows, by, lambda row: row[figure] - of_seed[row["seed"]] if row["seed"] in of_seed else None)


def by_depth(split_points: Iterable[str]) -> list[str]:
    """Put split points in order, such as "1+0": by the blocks that a device holds, then by those of its bottom.

    Args:
        split_points: As the table of a sweep has them; each is given once.
    """
    return sorted(set(split_points), key=blocks_held)


def blocks_held(split_point: str) -> tuple[int, int]:
    """Give the blocks that a device holds in all, and those of its bottom.

    Raises:
        ValueError: If it is not a split point.
    """
    try:
        bottom, top = (int(blocks) for blocks in split_point.split("+"))
    except ValueError as error:
        raise ValueError(f"{split_point!r} is not a split point; write one such as 1+1.") from error
    return bottom + top, bottom
