"""Evidence from one's own sweeps and audits, and what comes with splitfed."""

import csv
from importlib import resources
from pathlib import Path

import evidence as benchmark
import pytest

from splitfed.errors import ConfigError, DataError
from splitfed.privacy.leakage import AttackResult
from splitfed.study.audit_rows import Audit, AuditRow, AuditTerms
from splitfed.study.cost import SplitPoint
from splitfed.study.plan import LeakagePoint, LossPoint, evidence
from splitfed.study.plan.evidence import PACKAGED, as_csv, leakage_points, loss_points, packaged
from splitfed.study.sweep import run_sweep
from tests.study.sweep.small_sweep import write_base, write_sweep

WIDER = Path(__file__).parents[3] / "benchmarks" / "sweeps" / "wider.toml"
TERMS = AuditTerms("run", "a-model", 12, 768, 1, 2, 64, 32, 500, 1e-5, "replace-one", True, "noise", 0.5)


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was made: two noises, two seeds, one failed split point and a baseline."""
    base = write_base(tmp_path_factory.mktemp("base"))
    grid = "split_point = [[1, 1], [9, 9]]\nnoise_multiplier = [0, 0.01]\nseed = [0, 1]\nvariant = ['sflv1', 'central']"
    file = write_sweep(tmp_path_factory.mktemp("sweep"), grid, base=base, rounds=1)
    run_sweep(file)
    return file


def test_a_sweep_s_rows_become_points_with_means_over_seeds(sweep_file: Path) -> None:
    points = loss_points(sweep_file)
    assert [(point.bottom_blocks, point.noise_multiplier, point.runs) for point in points] == [
        (1, 0.0, 2),
        (1, 0.01, 2),
    ]
    with (sweep_file.parent / "sweep.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["noise_multiplier"] == "0.01" and not row["error"]]
    assert points[1].loss == pytest.approx(sum(float(row["held_out_loss"]) for row in rows) / 2, abs=1e-4)
    assert (points[0].n_blocks, points[0].tokens, points[0].rank, points[0].codec) == (4, 8, 2, "int8")
    assert points[0].base_loss == pytest.approx(float(rows[0]["base_loss"]), abs=1e-4)
    assert points[1].spread > 0


def test_one_s_own_sweep_takes_the_place_of_what_comes_with_splitfed(sweep_file: Path) -> None:
    found = evidence([sweep_file])
    assert set(found.loss.points) == set(loss_points(sweep_file))
    assert (found.loss_of, found.leakage_of) == (str(sweep_file), PACKAGED)


def test_a_sweep_without_a_run_that_counts_is_refused(tmp_path: Path, sweep_file: Path) -> None:
    base = sweep_file.read_text().split('base = "')[1].split('"')[0]
    none = write_sweep(tmp_path, "variant = ['central']\nseed = [0]", base=Path(base), rounds=1)
    with pytest.raises(ConfigError, match=r"sweep\.csv: cannot be read"):
        loss_points(none)
    run_sweep(none)
    with pytest.raises(ConfigError, match="no run of a split has a row without an error"):
        loss_points(none)
    (tmp_path / "noisy").mkdir()
    noisy = write_sweep(tmp_path / "noisy", "noise_multiplier = [0.01]", base=Path(base), rounds=1)
    run_sweep(noisy)
    with pytest.raises(ConfigError, match=r"sweep\.toml: No run without noise is among them"):
        evidence([noisy])


def audited(folder: Path, terms: AuditTerms = TERMS) -> Path:
    results = [("tokens", "weak", 30), ("tokens", "strong", 60), ("labels", "probe", 50), ("membership", "loss", 99)]
    rows = [
        AuditRow(AttackResult(attack, target, hits // (1 + on), 100, 0.1), is_protected=bool(on))  # type: ignore[arg-type]
        for target, attack, hits in results
        for on in (0, 1)
    ]
    folder.mkdir()
    (folder / "audit.json").write_text(Audit(terms, tuple(rows), (), 1.0).as_json())
    return folder


def test_an_audit_s_strongest_attacks_become_points(tmp_path: Path) -> None:
    found = {(point.noise_multiplier, point.recovers): point for point in leakage_points(audited(tmp_path / "audit"))}
    assert found.keys() == {(0.0, "tokens"), (0.0, "labels"), (0.5, "tokens"), (0.5, "labels")}
    strongest = found[0.5, "tokens"]
    assert (strongest.attack, strongest.recovered, strongest.chance) == ("strong", 0.3, 0.1)
    assert (strongest.n_blocks, strongest.hidden_size, strongest.tokens, strongest.top_blocks) == (12, 768, 64, 2)


def test_an_audit_that_does_not_say_its_noise_is_refused(tmp_path: Path) -> None:
    folder = audited(tmp_path / "audit")
    text = (folder / "audit.json").read_text()
    (folder / "audit.json").write_text(text.replace('"noise_multiplier": 0.5', '"other": 0.5'))
    with pytest.raises(ConfigError, match="does not say what it was made with; make it again with splitfed audit"):
        leakage_points(folder)
    with pytest.raises(DataError, match="no such file"):
        evidence(audits=[tmp_path / "nowhere"])


def test_what_comes_with_splitfed_covers_what_is_planned_by_default() -> None:
    found = evidence()
    noises = found.loss.noise_multipliers
    assert noises[0] == found.leakage.noise_multipliers[0] == 0.0
    assert noises[1] <= 0.002 <= noises[-1]
    assert {point.codec for point in found.loss.points} >= {"none", "bf16", "int8"}
    assert {point.rank for point in found.loss.points} >= {4, 8, 16}
    assert all(0 <= point.chance < 1 and 0 <= point.recovered <= 1 for point in found.leakage.points)


def test_the_cost_of_noise_carries_over_to_a_model_twice_as_wide() -> None:
    """The embedded model, D = 128, on the same text: the share of the gain that noise takes, told from D = 64."""
    measured = {point: point.loss for point in loss_points(WIDER)}
    table = evidence().loss
    quiet = min(measured.values())
    for point in measured:
        share = min(1.0, (point.loss - quiet) / (point.base_loss - quiet))
        cut = SplitPoint(point.bottom_blocks, point.top_blocks)
        told = table.cost(point.target, cut, noise=point.noise_multiplier, codec=point.codec, rank=point.rank).share
        assert min(1.0, told) == pytest.approx(share, abs=0.25)


def test_what_comes_with_splitfed_is_what_the_larger_runs_found(stories260k: Path) -> None:
    assert stories260k == benchmark.BASE
    assert as_csv(benchmark.losses()) == as_csv(packaged("loss.csv", LossPoint))
    assert as_csv(benchmark.leakage()) == as_csv(packaged("leakage.csv", LeakagePoint))


@pytest.mark.parametrize(("name", "kind"), [("loss.csv", LossPoint), ("leakage.csv", LeakagePoint)])
def test_tables_are_read_back_as_they_were_written(name: str, kind: type) -> None:
    table = resources.files("splitfed.assets").joinpath("evidence", name).read_text(encoding="utf-8")
    assert as_csv(packaged(name, kind)) == table
