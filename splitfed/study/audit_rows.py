"""What an audit found, and how it is written: rows for people, for spreadsheets and for programs."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from splitfed.privacy.leakage import AttackResult

LOWER_BOUND: Final = (
    "An attack's success is a lower bound on what leaks, never a guarantee: a stronger attack may recover more. "
    "What is guaranteed is epsilon, where there is one."
)

ORDER: Final = ("tokens", "labels", "mask", "membership")
RECOVERS: Final = {
    "tokens": "tokens",
    "labels": "labels",
    "mask": "loss mask",
    "membership": "membership",
}
READS: Final = {
    "tokens": "smashed data",
    "labels": "output gradient",
    "mask": "output gradient",
    "membership": "adapter update",
}
"""What each kind of attack starts from."""


@dataclass(frozen=True)
class AuditRow:
    """One attack under one protection.

    Attributes:
        result: What it achieved.
        is_protected: The run's protection was on.
        epsilon: Epsilon of one release of what the attack reads; None where none is guaranteed.
        unit: Whom that protects; empty where nobody is.
        guarantee: Epsilon in words, with the mechanisms that guarantee something else.
        note: What else there is to say.
    """

    result: AttackResult
    is_protected: bool
    epsilon: float | None = None
    unit: str = ""
    guarantee: str = "none"
    note: str = ""

    @property
    def protection(self) -> str:
        """The protection in words."""
        return "as configured" if self.is_protected else "noise off"

    def as_row(self) -> dict[str, str | int | float | None]:
        """Give the figures by name."""
        return {
            "reads": READS[self.result.target],
            "protection": self.protection,
            **self.result.as_row(),
            "epsilon_per_release": self.epsilon,
            "guarantee_per_release": self.guarantee,
            "unit": self.unit,
            "note": self.note,
        }


@dataclass(frozen=True)
class AuditTerms:
    """What an audit's figures hold for.

    Attributes:
        run: Name of the run.
        base: The base model.
        n_blocks: Blocks of the base model.
        hidden_size: D.
        bottom_blocks: Blocks of the bottom.
        top_blocks: Blocks of the top.
        max_tokens: The run's T.
        private_sequences: Sequences that were attacked.
        public_sequences: Public sequences that the attacks learned from.
        delta: The delta at which epsilon is stated.
        relation: The neighbouring relation.
        is_protected: Whether the run has any noise on.
        configured: The run's noise in words; empty where it has none.
        noise_multiplier: The noise multiplier of smashed data and output gradients; 0 where there is none.
    """

    run: str
    base: str
    n_blocks: int
    hidden_size: int
    bottom_blocks: int
    top_blocks: int
    max_tokens: int
    private_sequences: int
    public_sequences: int
    delta: float
    relation: str
    is_protected: bool
    configured: str = ""
    noise_multiplier: float = 0.0

    @property
    def cut(self) -> str:
        """The split point in words."""
        bottom = f"{self.bottom_blocks} {'block' if self.bottom_blocks == 1 else 'blocks'} in the bottom"
        return f"{bottom}, {self.top_blocks} in the top"


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        terms: What it holds for.
        rows: An attack under a protection each.
        left_out: A sentence for each kind of attack that does not apply, with the reason.
        seconds: How long it took.
    """

    terms: AuditTerms
    rows: tuple[AuditRow, ...]
    left_out: tuple[str, ...]
    seconds: float

    def as_json(self) -> str:
        """Give everything as one JSON object."""
        content = {
            **asdict(self.terms),
            "statement": LOWER_BOUND,
            "rows": [row.as_row() for row in self.rows],
            "left_out": list(self.left_out),
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(content, ensure_ascii=False, indent=1)

    def as_csv(self) -> str:
        """Give the rows as CSV, each with the terms that it holds for."""
        out = io.StringIO()
        terms = asdict(self.terms)
        writer = csv.DictWriter(out, fieldnames=[*terms, *self.rows[0].as_row()], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**terms, **row.as_row()} for row in self.rows)
        return out.getvalue()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal: a line an attack, the protections side by side."""
        headings = ["recovers", "attack", "chance", "noise off"]
        if self.terms.is_protected:
            headings += ["as configured", "ε per release", "for one"]
        return headings, [self._line(pair) for pair in self.pairs()]

    def pairs(self) -> list[tuple[AuditRow | None, AuditRow | None]]:
        """Put each attack's rows together: with noise off and as configured; None where it was not made."""
        found: dict[tuple[str, str], list[AuditRow | None]] = {}
        for row in self.rows:
            kind = row.result.target
            name = row.result.attack if kind != "mask" else ""  # whichever figure of a row told most
            found.setdefault((kind, name), [None, None])[row.is_protected] = row
        ordered = sorted(found.items(), key=lambda item: ORDER.index(item[0][0]))
        return [(pair[0], pair[1]) for _, pair in ordered]

    def summary(self) -> list[str]:
        """Give the sentences below the table."""
        terms = self.terms
        kinds = {row.result.target for row in self.rows}
        sentences = [
            f"Run {terms.run} on {terms.base}, {terms.cut}: {terms.private_sequences} private sequences of "
            f"{terms.max_tokens} tokens attacked, after learning from {terms.public_sequences} public ones.",
            f"Recovered are {', '.join(f'{RECOVERS[kind]} from {READS[kind]}' for kind in ORDER if kind in kinds)}; "
            "success with its 95 % interval; chance is the best guess without looking.",
        ]
        if terms.is_protected:
            sentences += [
                f"As configured: {terms.configured}.",
                f"Epsilon (ε) is at delta {terms.delta:g}, relation {terms.relation}, for one release of what is read.",
            ]
        else:
            sentences.append("The run's configuration has no noise, so nothing is guaranteed.")
        for is_protected in (False, True):
            surest = strongest(self.rows, "membership", is_protected=is_protected)
            if surest is not None and surest.note:
                sentences.append(f"Membership, {surest.protection}: {surest.note}.")
        return [*sentences, *self.left_out, LOWER_BOUND]

    def _line(self, pair: tuple[AuditRow | None, AuditRow | None]) -> list[str]:
        off, on = pair
        first = off or on
        assert first is not None
        kind = first.result.target
        line = [RECOVERS[kind], first.result.attack, percent(first.result.chance), success(off)]
        if self.terms.is_protected:
            line += [success(on), on.guarantee if on else "–", (on.unit if on else "") or "–"]
        return line


def success(row: AuditRow | None) -> str:
    """Write a rate with its interval, in per cent, the interval rounded outwards."""
    if row is None:
        return "–"
    low, high = row.result.interval()
    return f"{percent(row.result.rate)} ({math.floor(100 * low)}–{math.ceil(100 * high)})"


def percent(rate: float) -> str:
    """Write a rate in per cent."""
    return f"{100 * rate:.1f} %"


def strongest(rows: Sequence[AuditRow], target: str, *, is_protected: bool) -> AuditRow | None:
    """Find the attack on a target that recovered most under a protection; None where there was none."""
    of_target = [row for row in rows if row.result.target == target and row.is_protected == is_protected]
    return max(of_target, key=lambda row: row.result.rate, default=None)
