"""The part of a report about leakage: what an audit recovered from the run's split point."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from splitfed.errors import DataError
from splitfed.study import wording
from splitfed.study.page import Html, element, table

Rate = Annotated[FiniteFloat, Field(ge=0, le=1)]


class LeakageRow(BaseModel):
    """One attack under one protection, as ``audit.json`` has it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    target: str
    attack: str
    protection: str
    rate: Rate
    low: Rate
    high: Rate
    chance: Rate
    guarantee_per_release: str = ""
    unit: str = ""


class Leakage(BaseModel):
    """An audit, as ``splitfed audit --output`` has written it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: str
    n_blocks: int | None = None
    hidden_size: int | None = None
    max_tokens: int | None = None
    noise_multiplier: FiniteFloat | None = None
    bottom_blocks: int
    top_blocks: int
    private_sequences: int
    delta: FiniteFloat
    relation: str
    statement: str
    rows: tuple[LeakageRow, ...]
    left_out: tuple[str, ...] = ()


def read_leakage(folder: Path) -> Leakage:
    """Read what an audit has written.

    Args:
        folder: The audit's folder.

    Raises:
        DataError: If it holds no audit, or a damaged one.
    """
    file = folder / "audit.json"
    try:
        return Leakage.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file; give the folder that splitfed audit --output has written to") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give a file that this user may read") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{file}: is damaged ({place or 'JSON'}: {problem['msg']}); make the audit again") from error


def leakage_section(found: Leakage | None) -> Html:
    """Show what was recovered, with noise off and as configured; says so where nothing was audited."""
    heading = element("h2", "What leaks")
    if found is None:
        told = "Not audited: splitfed audit attacks the run’s split point, and measures what a server recovers."
        return element("section", heading, element("p", told, kind="note"))
    targets = list(dict.fromkeys(row.target for row in found.rows))
    attacks = dict.fromkeys(
        (row.target, row.attack, row.chance) for row in sorted(found.rows, key=lambda row: targets.index(row.target))
    )
    protections = list(dict.fromkeys(row.protection for row in found.rows))
    rows = []
    for target, attack, chance in attacks:
        by_protection = {row.protection: row for row in found.rows if (row.target, row.attack) == (target, attack)}
        guarantee = next((row for row in reversed(by_protection.values()) if row.unit), None)
        rows.append(
            [
                f"{target}: {attack}",
                _percent(chance),
                *(_success(by_protection.get(protection)) for protection in protections),
                "none" if guarantee is None else guarantee.guarantee_per_release,
                "–" if guarantee is None else guarantee.unit,
            ]
        )
    head = [
        "Recovered, and how",
        "Chance",
        *(protection.capitalize() for protection in protections),
        "ε a release",
        "Unit",
    ]
    return element(
        "section",
        heading,
        element(
            "p",
            f"Run {found.run}, {found.bottom_blocks} + {found.top_blocks} blocks on the devices; "
            f"{found.private_sequences} private sequences attacked; success with its 95 % interval; ε at δ = "
            f"{wording.delta(found.delta)}, relation {found.relation}.",
            kind="note",
        ),
        table(head, rows),
        *(element("p", reason, kind="note") for reason in found.left_out),
        element("p", found.statement, kind="note"),
    )


def _success(row: LeakageRow | None) -> str:
    return "–" if row is None else f"{_percent(row.rate)} ({100 * row.low:.0f}–{100 * row.high:.0f})"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
