"""Settings that do not go together are refused as the file is read, in one sentence that begins with its key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitfed.config import LoraSection, ServerConfig, load_server_config
from splitfed.errors import ConfigError

BASE = '[run]\ndirectory = "run"\n[model]\nbase = "demo"\n'
STEP = 'variant = "parallel"\nmerge_ends = "step"\n'
LATE = '[federation]\nagents = 3\nstraggler_margin = 3.0\nlate_updates = "merge"\n'
SAME = 'with federation.merge_ends = "step" all bring the same bottom and top; leave '


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], ServerConfig]:
    def load(sections: str) -> ServerConfig:
        file = tmp_path / "server.toml"
        file.write_text(BASE + sections + "\n[privacy]\nnoise_multiplier = 0\n" * ("[privacy]" not in sections))
        return load_server_config(file)

    return load


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            '[aggregation]\nrule = "multi-krum"\nbyzantine = 1',
            "federation.quorum is 1, but aggregation.byzantine = 1 needs 5 updates in every round; raise quorum and "
            "agents",
        ),
        (
            '[federation]\nagents = 9\nquorum = 2\n[aggregation]\nrule = "median"',
            'federation.quorum is 2, but aggregation.rule = "median" needs 3 updates in every round; raise quorum',
        ),
        (
            '[federation]\nagents = 9\ncohort = 2\n[aggregation]\nrule = "median"',
            'federation.quorum is 1, but aggregation.rule = "median" needs 3 updates in every round; raise quorum and '
            "cohort",
        ),
        (
            '[federation]\nagents = 9\nquorum = 9\n[aggregation]\nrule = "trimmed-mean"\ntrim = 0.1',
            "federation.quorum is 9, but aggregation.trim = 0.1 needs 10 updates in every round; raise quorum and "
            "agents",
        ),
        (
            '[lora]\nleast_rank = 2\n[aggregation]\nrule = "median"',
            '[aggregation] rule = "median" works factor by factor, and lora = "flexlora", which agents of unlike ranks '
            "need, averages their products; leave rule out, or give every agent the same rank",
        ),
        (
            '[lora]\nleast_rank = 2\n[aggregation]\nlora = "ffa"',
            '[aggregation] lora = "ffa" averages factor by factor, and agents of unlike ranks have factors of unlike '
            'shapes; choose "flexlora" or "flora", or give every agent the same rank',
        ),
        (
            f'[federation]\nagents = 3\nquorum = 3\n{STEP}[aggregation]\nrule = "median"',
            f'aggregation.rule = "median" works on what agents bring to the end of a round, and {SAME}rule out, or set '
            'merge_ends = "round"',
        ),
        (f"[federation]\n{STEP}[aggregation]\nnorm_bound = 2.5", "aggregation.norm_bound = 2.5 works on what agents "),
        (f"[federation]\n{STEP}[aggregation]\nrefuse_norm = 2", "aggregation.refuse_norm = 2 works on what agents "),
        (
            f'[federation]\n{STEP}[aggregation]\nserver_optimiser = "fedadam"',
            'aggregation.server_optimiser = "fedadam" works on what agents ',
        ),
        (f'[federation]\n{STEP}[aggregation]\nlora = "flora"', 'aggregation.lora = "flora" works on what agents '),
        (f'[federation]\n{STEP}[aggregation]\nlora = "flexlora"', 'aggregation.lora = "flexlora" works on what agents'),
        (
            '[federation]\nvariant = "sflv2"\nagents = 3\nstraggler_margin = 3.0\nlate_updates = "merge"',
            'federation.late_updates = "merge" needs variant = "sflv1", not "sflv2"',
        ),
        (
            f'{LATE}[aggregation]\nlora = "alternating"',
            'federation.late_updates = "merge" does not go with aggregation.lo',
        ),
        (f"[lora]\nleast_rank = 2\n[federation]\n{STEP}", 'federation.merge_ends = "step" needs agents that hold the '),
        (
            f'[federation]\n{STEP}[privacy]\nadapter = "update"',
            'federation.merge_ends = "step" sends a gradient at every step',
        ),
    ],
)
def test_a_contradiction_between_sections_is_said_without_a_section_in_front(
    load: Callable[[str], ServerConfig], sections: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(sections)
    message = str(caught.value)
    assert message.partition(".toml: ")[2].startswith(said)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("sections", "quorum"),
    [
        ('[federation]\nagents = 3\nquorum = 3\n[aggregation]\nrule = "median"', 3),
        ('[federation]\nagents = 10\nquorum = 10\n[aggregation]\nrule = "trimmed-mean"\ntrim = 0.1', 10),
        ('[federation]\nagents = 5\nquorum = 4\n[aggregation]\nrule = "trimmed-mean"\ntrim = 0.29', 4),
        ('[federation]\nagents = 5\nquorum = 5\n[aggregation]\nrule = "multi-krum"\nbyzantine = 1', 5),
    ],
)
def test_the_least_quorum_of_a_rule_is_taken(load: Callable[[str], ServerConfig], sections: str, quorum: int) -> None:
    config = load(sections)
    assert config.federation.quorum == config.aggregation.least_updates == quorum


@pytest.mark.parametrize("lora", ["factors", "ffa", "alternating"])
def test_merging_at_every_step_leaves_the_choice_of_the_trained_factors(
    load: Callable[[str], ServerConfig], lora: str
) -> None:
    config = load(f'[federation]\n{STEP}[aggregation]\nlora = "{lora}"')
    assert config.shared().rule.lora == lora


def test_equal_ranks_are_alike(load: Callable[[str], ServerConfig]) -> None:
    alike = "[lora]\nrank = 8\nleast_rank = 8\n[federation]\n"
    config = load(f'{alike}agents = 3\nquorum = 3\n[aggregation]\nrule = "median"')
    assert config.shared().rule.lora == "factors"
    assert config.lora == LoraSection(rank=8)
    assert load("[lora]\nrank = 8\nleast_rank = 7").shared().rule.lora == "flexlora"
    assert load(alike + STEP).federation.merge_ends == "step"
