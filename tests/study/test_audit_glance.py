"""The cheapest attacks of an audit alone."""

import pytest

from splitfed.config import load_server_config
from splitfed.study.audit import audit
from splitfed.study.audit_glance import glance
from tests.study.audited_run import write_config, write_rows


@pytest.mark.parametrize(
    ("top_blocks", "attacks"), [(0, ["nearest neighbour", "known head"]), (1, ["nearest neighbour"])]
)
def test_noise_off_comes_first_and_then_the_runs_protection(tmp_path, top_blocks, attacks) -> None:
    config = load_server_config(
        write_config(tmp_path / "server.toml", top_blocks=top_blocks, privacy="noise_multiplier = 0.5")
    )
    files = [write_rows(tmp_path / f"{name}.jsonl", 20, seed=seed) for seed, name in enumerate(("public", "private"))]
    rows = glance(config, *files, examples=4)
    assert [(row.is_protected, row.result.attack) for row in rows] == [
        (is_on, attack) for is_on in (False, True) for attack in attacks
    ]
    bare, hidden = (next(row for row in rows if row.is_protected is is_on) for is_on in (False, True))
    assert bare.result.rate == 1
    assert hidden.result.rate < 0.5
    assert (bare.epsilon, bare.unit, hidden.unit) == (None, "", "sequence")
    assert hidden.epsilon is not None


def test_its_rows_are_those_of_an_audit(tmp_path) -> None:
    config = load_server_config(
        write_config(tmp_path / "server.toml", bottom_blocks=0, top_blocks=0, privacy="noise_multiplier = 0.0")
    )
    files = [write_rows(tmp_path / f"{name}.jsonl", 12, seed=seed) for seed, name in enumerate(("public", "private"))]
    found = {row.result.attack: row for row in audit(config, *files, examples=2).rows}
    rows = glance(config, *files, examples=2)
    assert len(rows) == 2
    assert all(found[row.result.attack] == row for row in rows)
