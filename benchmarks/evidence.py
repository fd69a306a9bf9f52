"""What plans go by, from the tables of larger runs: writes splitfed/assets/evidence from results/ and sweeps/.

Losses are those of the sweeps of noise, codecs and ranks; leakage is what the strongest attack of each cell recovered.
Needs the model beside the repository, in shared/, for its size alone.
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from splitfed.study.cost import model_shape
from splitfed.study.plan import LeakagePoint, LossPoint, LossTable
from splitfed.study.plan.evidence import as_csv, loss_points
from splitfed.study.plan.leakage import TARGETS

HERE = Path(__file__).resolve().parent
BASE = HERE.parents[1] / "shared" / "models" / "stories260k"
ASSETS = HERE.parent / "splitfed" / "assets" / "evidence"
SWEEPS = ("noise", "codecs", "ranks")
TOKENS = 160


def losses() -> list[LossPoint]:
    """Give the losses of all sweeps, each setting once, in order."""
    points = LossTable(point for name in SWEEPS for point in loss_points(HERE / "sweeps" / f"{name}.toml")).points
    return sorted(
        points, key=lambda each: (each.bottom_blocks, each.top_blocks, each.noise_multiplier, each.codec, each.rank)
    )


def leakage() -> Iterable[LeakagePoint]:
    """Give the strongest attack of each cell."""
    shape = model_shape(BASE)
    with (HERE / "results" / "leakage.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["target"] in TARGETS]
    cells: dict[tuple[str, int, int, float], dict[str, str]] = {}
    for row in rows:
        place = int(row["bottom_blocks"]), int(row["top_blocks"]), float(row["noise_multiplier"])
        cell = row["target"], *place
        if cell not in cells or float(row["recovered"]) > float(cells[cell]["recovered"]):
            cells[cell] = row
    for (target, *place), row in sorted(cells.items()):
        figures = row["attack"], float(row["recovered"]), float(row["chance"])
        yield LeakagePoint(shape.n_blocks, shape.hidden_size, TOKENS, *place, target, *figures)  # type: ignore[arg-type]


def main() -> int:
    """Write both tables."""
    if not BASE.is_dir():
        print(f"skipped: {BASE} is not there")
        return 0
    for name, points in (("loss.csv", losses()), ("leakage.csv", list(leakage()))):
        (ASSETS / name).write_text(as_csv(points), encoding="utf-8")
        print(f"{name}: {len(points)} settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
