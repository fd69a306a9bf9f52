"""What a ledger says, for people and for programs."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel

from splitfed.privacy.figures import format_epsilon
from splitfed.privacy.ledger_file import read_ledger
from splitfed.privacy.ledger_rows import LedgerContents, Row
from splitfed.privacy.mechanisms import RELATION, UNIT, Unit
from splitfed.privacy.spending import CHANNELS, WORDS, Channel, Spending
from splitfed.privacy.witness import Noted, name_of, read_noted

_COLUMNS: Final = (
    "run",
    "round",
    "channel",
    "kind",
    "noise multiplier",
    "unit",
    "releases",
    "records",
    "one release",
    "charged so far",
)


class ReportLine(BaseModel):
    """The consecutive charges of one run, round, channel and kind."""

    run: str
    round: int
    channel: Literal["smashed", "output_gradient", "adapter", "loss", "step"]
    """"step" = all channels of local steps whose examples were drawn in secret."""
    kind: str
    noise_multiplier: float
    """The smallest among them, for its unit; 0 = no epsilon is guaranteed."""
    unit: Unit
    """Whom the mechanism protects."""
    eta: float | None
    """Metric privacy: one release guarantees eta · distance."""
    sample_rate: float | None
    """Of a step: the probability with which it drew each example."""
    channels: list[Channel]
    """What left: the channel, or those of a step."""
    releases: int
    records: int
    """Different records named."""
    epsilon_per_release: float | None
    """For one ``unit``."""
    epsilon: float | None
    """Of all releases of the channel up to here (for a step, of all channels), for a sequence of the record that is
    worst off; None = nothing is guaranteed."""


class LedgerReport(BaseModel):
    """Everything a ledger says at one delta and relation; ``model_dump_json()`` is its JSON form."""

    path: Path
    delta: float
    unit: str = UNIT
    relation: str = RELATION
    lines: list[ReportLine]
    releases: dict[Channel, int]
    epsilon: dict[Channel, float | None]
    """What is charged to each channel for a sequence of the record that is worst off; None = no epsilon. None of them
    is a guarantee by itself: what an adapter learned from a record is charged to it alone, and takes part in what the
    other channels release of other records."""
    epsilon_per_token: dict[Channel, float | None]
    """The same for one of its tokens, of channels whose mechanism protects tokens."""
    eta: dict[Channel, float]
    """Of channels with metric privacy: what all releases guarantee is eta · distance."""
    epsilon_total: float | None
    """Over all channels."""
    total: str
    warnings: list[str] = []
    """Why the figures may be too small."""

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Give the headings and the rows of a table."""
        rows: list[tuple[str, ...]] = [
            (
                line.run,
                str(line.round),
                line.channel.replace("_", " "),
                line.kind,
                f"{line.noise_multiplier:g}" if line.eta is None else f"eta {line.eta:g}",
                line.unit,
                f"{line.releases:,}",
                f"{line.records:,}",
                format_epsilon(line.epsilon_per_release),
                format_epsilon(line.epsilon),
            )
            for line in self.lines
        ]
        return _COLUMNS, rows

    def summary(self) -> list[str]:
        """Say in sentences what the table comes to; the last one alone is a guarantee."""
        at = f"at delta {self.delta:g}, unit {{}}, relation {self.relation}"
        said = []
        for channel, value in self.epsilon.items():
            name = f"charged to the {WORDS[channel].removeprefix('the ')} so far"
            if channel in self.eta:
                said.append(f"{name}: {self.eta[channel]:.6g} · distance of two embeddings, and no epsilon")
            elif self.releases[channel]:
                said.append(
                    f"{name}: no epsilon"
                    if value is None
                    else f"{name}: epsilon {format_epsilon(value)} {at.format(self.unit)}"
                )
            if (per_token := self.epsilon_per_token.get(channel)) is not None:
                said.append(f"{name}: epsilon {format_epsilon(per_token)} {at.format('token')}")
        return [*said, f"in total: {self.total}", *self.warnings]


def report_ledger(
    path: Path, *, delta: float = 1e-5, relation: str = RELATION, witnesses: Path | None = None
) -> LedgerReport:
    """Read a ledger and compose what it holds; an agent may be writing to it meanwhile.

    Args:
        path: The ledger's file.
        delta: The delta to state every epsilon at.
        relation: The neighbouring relation: "replace-one" or "zero-out".
        witnesses: Folder that knows how far ledgers have come; None = an older copy goes unnoticed.

    Raises:
        LedgerError: If there is no ledger, or it is damaged.
        ValueError: If delta is not between 0 and 1, or there is no such relation.
    """
    noted = {} if witnesses is None else read_noted(witnesses)
    spending, contents = Spending(), read_ledger(path)
    lines = [_line(rows, spending, delta, relation) for rows in _grouped(contents.rows)]
    tokens = [channel for channel in CHANNELS if spending.units(channel) == {"token"} and spending.eta(channel) is None]
    return LedgerReport(
        path=path,
        delta=delta,
        relation=relation,
        lines=lines,
        releases={channel: sum(line.releases for line in lines if channel in line.channels) for channel in CHANNELS},
        epsilon={channel: spending.epsilon(channel, delta, relation=relation) for channel in CHANNELS},
        epsilon_per_token={
            channel: spending.epsilon(channel, delta, unit="token", relation=relation) for channel in tokens
        },
        eta={channel: eta for channel in CHANNELS if (eta := spending.eta(channel)) is not None},
        epsilon_total=spending.epsilon(None, delta, relation=relation),
        total=spending.total_statement(delta, relation=relation),
        warnings=_warnings(contents, noted),
    )


def _warnings(contents: LedgerContents, noted: Mapping[str, Noted]) -> list[str]:
    """Say what is missing of a ledger, as far as it can be known."""
    assert contents.header is not None
    said, rows = [], len(contents.rows)
    own = noted.get(name_of(contents.header.salt_sha256))
    if own is not None and own.shows_older(rows, contents.check):
        said.append(
            f"warning: this is an older copy: it has {rows} rows, but this device has written {own.rows}, so more was "
            "spent than it says; look at the newest one"
        )
    if contents.torn_bytes:
        said.append(
            "the last line is unfinished: an agent is writing it, or was killed while it did, and then nothing left"
        )
    return said


def _grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Gather the rows of a run, round, channel and kind, in the order in which each began within the round."""
    for _, of_round in groupby(rows, key=lambda row: (row.run, row.round)):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in of_round:
            groups.setdefault((row.channel, row.kind), []).append(row)
        yield from groups.values()


def _line(rows: list[Row], spending: Spending, delta: float, relation: str) -> ReportLine:
    """Add rows to what is spent and describe them."""
    one = Spending()
    weakest = min(rows, key=lambda row: row.noise_multiplier)
    one.add(weakest.model_copy(update={"sequences": 1, "records": weakest.records[:1] or ("",)}))
    for row in rows:
        spending.add(row)
    channel = weakest.channel
    so_far: str | None = None if channel == "step" else channel
    return ReportLine(
        run=weakest.run,
        round=weakest.round,
        channel=channel,
        kind=weakest.kind,
        noise_multiplier=weakest.noise_multiplier,
        unit=weakest.unit,
        eta=weakest.eta,
        sample_rate=weakest.sample_rate,
        channels=list(weakest.channels or ()) if channel == "step" else [channel],
        releases=sum(row.sequences for row in rows),
        records=len({record for row in rows for record in row.records}),
        epsilon_per_release=one.epsilon(so_far, delta, unit=weakest.unit, relation=relation),
        epsilon=spending.epsilon(so_far, delta, relation=relation),
    )
