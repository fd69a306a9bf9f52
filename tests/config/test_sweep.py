"""A sweep's file: what it may say, and how each mistake is explained."""

from pathlib import Path

import pytest

from splitfed.config.sweep import SweepConfig, load_sweep_config
from splitfed.errors import ConfigError

HEAD = '[model]\nbase = "demo"\n[data]\npath = "rows.jsonl"\nheld_out_fraction = 0.5\n[output]\ncsv = "sweep.csv"\n'


def load(folder: Path, grid: str = "seed = [0]", *, more: str = "", head: str = HEAD) -> SweepConfig:
    """Read a sweep's file with this grid."""
    file = folder / "sweep.toml"
    file.write_text(f"{head}{more}\n[grid]\n{grid}\n")
    return load_sweep_config(file)


def test_paths_start_at_the_files_own_folder(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.data.path, config.output.csv) == (str(tmp_path / "rows.jsonl"), tmp_path / "sweep.csv")


def test_a_dotted_axis_may_be_quoted_or_not(tmp_path: Path) -> None:
    quoted = load(tmp_path, '"training.learning_rate" = [1e-3, 2]')
    assert quoted.grid == load(tmp_path, "training.learning_rate = [1e-3, 2]").grid
    assert quoted.grid == {"training.learning_rate": [1e-3, 2.0]}


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("learning_rate = [1]", "grid has the unknown axis learning_rate; did you mean training.learning_rate?"),
        ("training.learnin_rate = [1]", "the unknown axis training.learnin_rate; did you mean training.learning_rate?"),
        ("seeds = [1]", "has the unknown axis seeds; did you mean seed?"),
        ("codecs = ['int8']", "has the unknown axis codecs; did you mean codec?"),
        ("qqqqq = [1]", "the unknown axis qqqqq; there are split_point, noise_multiplier, codec, variant, seed, and"),
        ("federation.quorum = [1]", "has the unknown axis federation.quorum; "),
        ("seed = 1", "has no list of values for seed; write seed = [...]"),
        ("seed = []", "has no list of values for seed; write seed = [...]"),
        ("seed = [0, 1, 0]", "has 0 twice in seed; leave it there once"),
        ("noise_multiplier = [0, 0.0]", "has 0.0 twice in noise_multiplier; leave it there once"),
        ("seed = [-1]", "has -1 in seed: input should be greater than or equal to 0; correct it"),
        ("lora.rank = [4, 'x']", "has x in lora.rank: input should be a valid integer; correct it"),
        ("noise_multiplier = [1e-9]", "has 1e-09 in noise_multiplier: is 1e-09, which would round away"),
        ("split_point = [[0, 1, 2]]", "has 0+1+2 in split_point: list should have at most 2 items"),
        ("variant = ['sflv3']", "has sflv3 in variant: input should be 'sflv1', 'sflv2'"),
        ("codec = ['int4']", "has int4 in codec: input should be 'none', 'bf16'"),
        ("codec = ['none']\ncodecs.smashed = ['int8']", "sets codecs.smashed in two axes, codec and codecs.smashed"),
        (f"seed = {list(range(400))}\nlora.rank = {list(range(1, 400))}", "has 159600 runs, more than 100000; divide"),
    ],
)
def test_a_mistake_in_the_grid_is_explained_in_one_sentence(tmp_path: Path, grid: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, grid)
    assert said in str(raised.value)
    assert str(raised.value).startswith(f"{tmp_path / 'sweep.toml'}: grid ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[lora]\nrnak = 4", "unknown key lora.rnak; did you mean lora.rank?"),
        ("[lor]\nrank = 4", "unknown key lor; did you mean lora?"),
        ("[training]\nrounds = 0", "training.rounds must be at least 1, but is the integer 0"),
        ("[federation]\nagents = 3\nquorum = 2", "federation.quorum has no place in a sweep: in one process nobo"),
        ("[lora]\nleast_rank = 2", "lora.least_rank has no place in a sweep: agents of a sweep are alike; leave it"),
        ("[privacy]\nsample_rate = 0.1", "privacy.sample_rate has no place in a sweep: a sample that is drawn in"),
        ("[privacy]\ndenoise = true", "privacy.denoise has no place in a sweep"),
        ('[codecs]\nadapter = "int8"', "codecs.adapter has no place in a sweep"),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere_is_explained_as_in_other_files(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, more=more)
    assert f"sweep.toml: {said}" in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("held_out_fraction = 0.5\n", "there is nothing to measure on; set data.held_out_path, or data.held_out_"),
        ('[output]\ncsv = "sweep.csv"\n', "the section [output] is missing; add it with csv"),
        ('base = "demo"\n', "model.base is missing; add it"),
    ],
)
def test_what_a_sweep_cannot_do_without_is_asked_for(tmp_path: Path, missing: str, said: str) -> None:
    assert missing in HEAD
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, head=HEAD.replace(missing, ""))
    assert said in str(raised.value)


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; give the path of a sweep's TOML file"):
        load_sweep_config(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match=r"sweep\.toml: is not valid TOML"):
        load(tmp_path, "seed = ")
