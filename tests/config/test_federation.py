"""The [federation] section: what goes together, and what would have no effect."""

from pathlib import Path
from typing import Any

import pytest

from splitfed.config import FederationSection, load_server_config
from splitfed.errors import ConfigError


def federation(folder: Path, keys: str, *, variant: str = "async") -> FederationSection:
    """Read a server's file with these keys in its section on the federation."""
    file = folder / "server.toml"
    file.write_text(f'[run]\ndirectory = "run"\n[model]\nbase = "demo"\n[federation]\nvariant = "{variant}"\n{keys}')
    return load_server_config(file).federation


@pytest.mark.parametrize(
    ("keys", "at_work"),
    [
        ("agents = 3", 3),
        ("agents = 3\npopulation = 5", 5),
        ("agents = 9\ncohort = 4", 4),
        ("agents = 9\ncohort = 4\nover_selection = 2", 6),
    ],
)
def test_a_bound_on_staleness_that_cannot_be_kept_is_refused_as_the_file_is_read(
    tmp_path: Path, keys: str, at_work: int
) -> None:
    kept = federation(tmp_path, f"{keys}\nmax_staleness = {at_work - 1}")
    assert (kept.most_at_work, kept.max_staleness) == (at_work, at_work - 1)
    said = (
        rf"server.toml: \[federation\] max_staleness is {at_work - 2}, but {at_work} agents at work make up to "
        rf"{at_work - 1} steps in between; raise it$"
    )
    with pytest.raises(ConfigError, match=said):
        federation(tmp_path, f"{keys}\nmax_staleness = {at_work - 2}")


def test_no_staleness_at_all_is_possible_for_one_agent_only(tmp_path: Path) -> None:
    assert federation(tmp_path, "max_staleness = 0").max_staleness == 0
    with pytest.raises(ConfigError, match="max_staleness is 0, but 3 agents at work make up to 2 steps in between"):
        federation(tmp_path, "agents = 3\nmax_staleness = 0")


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "parallel"])
@pytest.mark.parametrize("key", ["max_staleness = 9", "max_staleness = 0", "staleness_exponent = 1.0"])
def test_staleness_without_stale_steps_is_refused(tmp_path: Path, variant: str, key: str) -> None:
    name = key.partition(" ")[0]
    said = (
        rf'toml: \[federation\] {name} needs variant = "async", not "{variant}", whose steps are never stale; set it, '
        rf"or leave {name} out$"
    )
    with pytest.raises(ConfigError, match=said):
        federation(tmp_path, key, variant=variant)


@pytest.mark.parametrize("variant", ["sflv2", "parallel"])
def test_over_selection_is_refused_where_a_round_needs_all_that_it_asked(tmp_path: Path, variant: str) -> None:
    keys = "agents = 4\ncohort = 2\nover_selection = 1"
    with pytest.raises(ConfigError, match=rf'\[federation\] over_selection is 1, but with variant = "{variant}" '):
        federation(tmp_path, keys, variant=variant)
    for other in ("sflv1", "async"):
        assert federation(tmp_path, keys, variant=other).over_selection == 1


@pytest.mark.parametrize("keys", ["agents = 3", "agents = 3\nquorum = 2", "agents = 3\ncohort = 3"])
def test_merging_late_updates_is_refused_where_none_can_be_late(tmp_path: Path, keys: str) -> None:
    said = r'\[federation\] late_updates = "merge" has nothing to merge: without straggler_margin, over_selection or a '
    with pytest.raises(ConfigError, match=said):
        federation(tmp_path, f'{keys}\nlate_updates = "merge"', variant="sflv1")


@pytest.mark.parametrize(
    "keys",
    [
        {"agents": 3, "straggler_margin": 2.0},
        {"agents": 3, "cohort": 2, "over_selection": 1},
        {"agents": 3, "cohort": 2},
        {"agents": 2, "population": 3, "cohort": 2},
    ],
)
def test_late_updates_are_merged_where_an_agent_can_be_late(keys: dict[str, Any]) -> None:
    assert FederationSection(late_updates="merge", **keys).late_updates == "merge"
