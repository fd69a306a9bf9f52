"""From a grid to runs: which there are, and what each is configured to."""

from pathlib import Path

import pytest

from splitfed.config.sweep import load_sweep_config
from splitfed.config.sweep_cells import Cell, cells

HEAD = '[model]\nbase = "demo"\n[data]\npath = "rows.jsonl"\nheld_out_fraction = 0.5\n[output]\ncsv = "sweep.csv"\n'


def grid_of(folder: Path, grid: str, more: str = "") -> list[Cell]:
    """Give the runs of a grid."""
    file = folder / "sweep.toml"
    file.write_text(f"{HEAD}{more}\n[grid]\n{grid}\n")
    return cells(load_sweep_config(file))


def test_every_point_is_a_run_and_a_whole_seed_comes_before_the_next(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, "seed = [0, 1]\nsplit_point = [[0, 0], [1, 2]]")
    assert [dict(run.point) for run in runs] == [
        {"seed": seed, "split_point": cut} for seed in (0, 1) for cut in ([0, 0], [1, 2])
    ]
    last = runs[-1].config
    assert last is not None
    assert (last.seed, last.model.bottom_blocks, last.model.top_blocks) == (1, 1, 2)


def test_a_codec_goes_to_all_four_directions_and_a_dotted_key_where_it_says(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, "codec = ['bf16']\nlora.rank = [3]\naggregation.lora = ['flora']\ndata.deal = ['iid']")
    assert run.config is not None
    codecs = run.config.codecs
    assert {codecs.smashed, codecs.trunk_output, codecs.output_gradient, codecs.smashed_gradient} == {"bf16"}
    assert (codecs.adapter, run.config.lora.rank, run.config.aggregation.lora) == ("none", 3, "flora")


def test_a_baseline_is_one_run_whatever_else_the_grid_holds_for_a_split(tmp_path: Path) -> None:
    of_a_split = "split_point = [[0, 0], [1, 1]]\nnoise_multiplier = [0, 0.1]\ncodec = ['none', 'int8']\n"
    of_all = "federation.agents = [2, 3]\nlora.rank = [4, 8]\nseed = [0, 1]"
    runs = grid_of(tmp_path, f"variant = ['sflv1', 'central', 'fedlora']\n{of_a_split}{of_all}")
    baselines = [run for run in runs if run.point["variant"] != "sflv1"]
    assert (len(runs) - len(baselines), len(baselines)) == (8 * 8, 2 * 8)
    for run in baselines:
        assert run.config is not None
        assert (run.config.method, run.point["variant"]) in {("central", "central"), ("fedlora", "fedlora")}
        assert list(run.point) == ["variant", "federation.agents", "lora.rank", "seed"]
        assert run.config.federation.agents == run.point["federation.agents"]
        assert not run.config.privacy.is_on
        assert run.config.codecs.smashed == "none"


def test_how_rows_are_dealt_means_something_for_fedlora_and_nothing_for_central(tmp_path: Path) -> None:
    grid = "variant = ['central', 'fedlora']\ndata.alpha = [0.1, 9]"
    deal = '[data]\ndeal = "dirichlet"\nalpha = 1.0\nlabel_column = "topic"\n'
    file = tmp_path / "sweep.toml"
    file.write_text(HEAD.replace("[data]\n", deal) + f"[grid]\n{grid}\n")
    runs = cells(load_sweep_config(file))
    assert [dict(run.point) for run in runs] == [
        {"variant": "central"},
        {"variant": "fedlora", "data.alpha": 0.1},
        {"variant": "fedlora", "data.alpha": 9.0},
    ]
    assert runs[0].config is not None
    assert runs[0].config.data.deal == "iid"


def test_settings_that_do_not_go_together_are_a_run_with_a_sentence(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, "variant = ['sflv1', 'parallel']\nfederation.merge_ends = ['round', 'step']")
    assert [run.config is None for run in runs] == [False, True, False, False]
    assert runs[1].refusal.startswith('federation.merge_ends is "step", which needs variant = "parallel"')
    assert runs[1].work == 0 < runs[0].work


@pytest.mark.parametrize(
    ("grid", "more", "said"),
    [
        ("privacy.smashed = ['token']", "", 'smashed = "token" needs bottom_blocks = 0, not 1'),
        (
            "aggregation.rule = ['median']",
            "[federation]\nagents = 2",
            'a round has 2 updates, but aggregation.rule = "',
        ),
        ("data.deal = ['dirichlet']", "", 'data.alpha and data.deal = "dirichlet" belong together; give both'),
        ("data.deal = ['labels']\ndata.labels_per_agent = [1]", "", 'data.deal = "labels" needs data.label_column'),
        ("privacy.epsilon = [8]", "[privacy]\nnoise_multiplier = 1", "[privacy] epsilon = 8 and noise_multiplier = 1"),
    ],
)
def test_a_contradiction_names_its_keys(tmp_path: Path, grid: str, more: str, said: str) -> None:
    (run,) = grid_of(tmp_path, grid, more)
    assert run.config is None
    assert said in run.refusal


def test_a_rule_that_needs_many_updates_needs_no_quorum_in_a_sweep(tmp_path: Path) -> None:
    (run,) = grid_of(tmp_path, "aggregation.rule = ['median']", "[federation]\nagents = 3")
    assert run.config is not None
