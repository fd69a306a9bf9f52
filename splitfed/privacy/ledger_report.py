"""What a ledger says, for people and for programs."""

from collections.abc import Iterable, Iterator
from decimal import ROUND_CEILING, Context, Decimal
from itertools import groupby
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from splitfed.privacy.accounting import epsilon
from splitfed.privacy.ledger_file import read_ledger
from splitfed.privacy.ledger_rows import Row
from splitfed.privacy.mechanisms import RELATION, UNIT
from splitfed.privacy.spending import CHANNELS, Channel, Spending, total_statement

_COLUMNS: Final = (
    "run",
    "round",
    "channel",
    "kind",
    "noise multiplier",
    "releases",
    "records",
    "one release",
    "so far",
)
_SHOWN_DIGITS: Final = 4


class ReportLine(BaseModel):
    """The consecutive charges of one run, round, channel and kind."""

    run: str
    round: int
    channel: Channel
    kind: str
    noise_multiplier: float
    """The smallest among them; 0 = unprotected."""
    releases: int
    records: int
    """Different records named."""
    epsilon_per_release: float | None
    epsilon: float | None
    """Of all releases of the channel up to here, for the record that is worst off; None = nothing is guaranteed."""


class LedgerReport(BaseModel):
    """Everything a ledger says at one delta; ``model_dump_json()`` is its JSON form."""

    path: Path
    delta: float
    unit: str = UNIT
    relation: str = RELATION
    lines: list[ReportLine]
    releases: dict[Channel, int]
    epsilon: dict[Channel, float | None]
    """What each channel has cost the record that is worst off; None = nothing is guaranteed."""
    total: str

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Give the headings and the rows of a table."""
        rows: list[tuple[str, ...]] = [
            (
                line.run,
                str(line.round),
                line.channel.replace("_", " "),
                line.kind,
                f"{line.noise_multiplier:g}",
                f"{line.releases:,}",
                f"{line.records:,}",
                format_epsilon(line.epsilon_per_release),
                format_epsilon(line.epsilon),
            )
            for line in self.lines
        ]
        return _COLUMNS, rows

    def summary(self) -> list[str]:
        """Say in sentences what the table comes to."""
        at = f"at delta {self.delta:g}, unit {self.unit}, relation {self.relation}"
        said = [
            f"{channel.replace('_', ' ')} releases so far: nothing is guaranteed"
            if value is None
            else f"{channel.replace('_', ' ')} releases so far: epsilon {format_epsilon(value)} {at}"
            for channel, value in self.epsilon.items()
            if self.releases[channel]
        ]
        return [*said, f"in total: {self.total}"]


def report_ledger(path: Path, *, delta: float = 1e-5) -> LedgerReport:
    """Read a ledger and compose what it holds; an agent may be writing to it meanwhile.

    Args:
        path: The ledger's file.
        delta: The delta to state every epsilon at.

    Raises:
        LedgerError: If there is no ledger, or it is damaged.
        ValueError: If delta is not between 0 and 1.
    """
    spending = Spending()
    lines = [_line(rows, spending, delta) for rows in _grouped(read_ledger(path).rows)]
    return LedgerReport(
        path=path,
        delta=delta,
        lines=lines,
        releases={channel: sum(line.releases for line in lines if line.channel == channel) for channel in CHANNELS},
        epsilon={channel: spending.epsilon(channel, delta) for channel in CHANNELS},
        total=total_statement(spending.unprotected()),
    )


def format_epsilon(value: float | None) -> str:
    """Write an epsilon with four digits, rounded up: a guarantee is never stated better than it is."""
    if value is None:
        return "none"
    if value == 0:
        return "0"
    rounded = Context(prec=_SHOWN_DIGITS, rounding=ROUND_CEILING).create_decimal(Decimal(value))
    return f"{rounded:,f}" if 1e-3 <= value < 1e9 else f"{rounded:.{_SHOWN_DIGITS - 1}e}"


def _grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Gather the rows of a run, round, channel and kind, in the order in which each began within the round."""
    for _, of_round in groupby(rows, key=lambda row: (row.run, row.round)):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in of_round:
            groups.setdefault((row.channel, row.kind), []).append(row)
        yield from groups.values()


def _line(rows: list[Row], spending: Spending, delta: float) -> ReportLine:
    """Add rows to what is spent and describe them."""
    for row in rows:
        spending.add(row)
    first, noise_multiplier = rows[0], min(row.noise_multiplier for row in rows)
    return ReportLine(
        run=first.run,
        round=first.round,
        channel=first.channel,
        kind=first.kind,
        noise_multiplier=noise_multiplier,
        releases=sum(row.sequences for row in rows),
        records=len({record for row in rows for record in row.records}),
        epsilon_per_release=epsilon([(noise_multiplier, 1)], delta),
        epsilon=spending.epsilon(first.channel, delta),
    )
