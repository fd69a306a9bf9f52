"""What holds for a whole run: what its sections refuse, and which devices it allows."""

from pathlib import Path

import pytest

from splitfed.config import FederationSection, LoraSection, ModelSection, RunConfig, RunIdentity, load_server_config
from splitfed.errors import ConfigError, JoinRefused


def federation(folder: Path, keys: str) -> FederationSection:
    """Read a server's file with these keys in its section on the federation."""
    file = folder / "server.toml"
    file.write_text(f'[run]\ndirectory = "run"\n[model]\nbase = "demo"\n[federation]\nvariant = "async"\n{keys}')
    return load_server_config(file).federation


def run_of_ranks(least: int | None, most: int) -> RunConfig:
    return RunConfig(
        run=RunIdentity(name="small"), model=ModelSection(base="demo"), lora=LoraSection(rank=most, least_rank=least)
    )


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
        rf"server.toml: \[federation\] max_staleness is {at_work - 2}, but {at_work} clients at work make up to "
        rf"{at_work - 1} steps in between; raise it$"
    )
    with pytest.raises(ConfigError, match=said):
        federation(tmp_path, f"{keys}\nmax_staleness = {at_work - 2}")


def test_variants_without_stale_steps_have_no_bound_to_keep() -> None:
    assert FederationSection(agents=3, variant="sflv1", max_staleness=0).max_staleness == 0


@pytest.mark.parametrize(("least", "most", "rank"), [(None, 4, 4), (2, 4, 2), (2, 4, 3), (2, 4, 4)])
def test_a_rank_of_the_run_is_allowed(least: int | None, most: int, rank: int) -> None:
    run_of_ranks(least, most).check_rank(rank)


@pytest.mark.parametrize(
    ("least", "most", "rank", "has"),
    [(None, 4, 2, "rank 4 for all"), (2, 4, 1, "ranks 2 to 4"), (2, 4, 5, "ranks 2 to 4")],
)
def test_another_rank_is_refused_in_the_words_of_the_agents_file(
    least: int | None, most: int, rank: int, has: str
) -> None:
    said = rf"^\[agent\] rank is {rank}, but the run 'small' has {has}; set it accordingly, or leave it out\.$"
    with pytest.raises(JoinRefused, match=said):
        run_of_ranks(least, most).check_rank(rank)
