"""Rows of a table, chosen by what is in their columns."""

from collections.abc import Iterable

from splitfed.study.sweep import Row


def where(rows: Iterable[Row], **columns: object) -> list[Row]:
    """Take the rows that have these values in these columns.

    Args:
        rows: Rows of a table.
        columns: A value for each column by its name.

    Raises:
        KeyError: If a row has no such column.
    """
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def strongest(rows: Iterable[Row], by: str) -> dict[object, Row]:
    """Take the row of the attack that recovered most, for each value of a column; the first one of equals.

    Args:
        rows: Rows with ``recovered``.
        by: The column.

    Returns:
        The rows by that value, ascending.
    """
    found: dict[object, Row] = {}
    for row in rows:
        if row[by] not in found or row["recovered"] > found[row[by]]["recovered"]:
            found[row[by]] = row
    return dict(sorted(found.items(), key=lambda item: item[0]))  # type: ignore[arg-type, return-value]
