"""Sweeps from start to end: what rows say, and that each run has exactly one, whatever happens."""

import csv
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed import cli
from splitfed.config.sweep import load_sweep_config
from splitfed.config.sweep_cells import cells
from splitfed.errors import ConfigError
from splitfed.models import adapter_state, partition
from splitfed.privacy import epsilon
from splitfed.study.sweep import SweepProgress, read_sweep, run_sweep
from splitfed.study.sweep.data import deal, load_sweep_data
from splitfed.study.whole_model import open_whole_model
from splitfed.training.baselines import adapter_burden, central_lora
from splitfed.training.client_step import causal_lm_loss, count_label_tokens
from splitfed.training.data import collate
from splitfed.training.simulate import Simulation, simulate
from splitfed.training.tokenizer import open_tokenizer
from tests.study.sweep.small_sweep import write_rows, write_sweep

GRID = "noise_multiplier = [0, 0.01]\nseed = [0, 1]"
MOST_TRIES = 30


def without_time(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by their name, without the one column that differs from time to time."""
    assert len({row["cell"] for row in rows}) == len(rows)
    return {row["cell"]: {name: value for name, value in row.items() if name != "seconds"} for row in rows}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, dict[str, Any]]:
    """The rows of GRID, made in this process and in one go."""
    rows = run_sweep(write_sweep(tmp_path_factory.mktemp("undisturbed"), GRID, base=base, rounds=1))
    assert all(row["error"] is None for row in rows)
    return without_time(rows)


def held_out_loss(run: Simulation, base: Path, folder: Path, examples: Any) -> float:
    """Measure token by token, with stock transformers and PEFT."""
    from peft import PeftModel

    run.export(folder, base=base)
    return loss_of(PeftModel.from_pretrained(open_whole_model(base), folder).eval(), examples)


def loss_of(model: torch.nn.Module, examples: Any) -> float:
    """The mean loss per token."""
    total, tokens = 0.0, 0
    for example in examples:
        batch = collate([example], pad_token_id=0)
        with torch.no_grad():
            total += causal_lm_loss(model(batch.input_ids_BT).logits, batch.labels_BT, 1.0).item()
        tokens += count_label_tokens(batch.labels_BT)
    return total / tokens


def test_a_row_says_what_the_same_run_by_hand_comes_to(tmp_path: Path, base: Path) -> None:
    file = write_sweep(tmp_path, "variant = ['sflv2', 'central']\nnoise_multiplier = [0]\nseed = [3]", base=base)
    split, central = run_sweep(file)
    config = cells(load_sweep_config(file))[0].config
    assert config is not None
    data = load_sweep_data(config.data, open_tokenizer(base), max_tokens=8)
    shards = deal(data, config.data, agents=2, seed=3)
    parts = partition(open_whole_model(base), bottom_blocks=1, top_blocks=1)
    tokenizer = open_tokenizer(base)
    run = simulate(
        parts,
        tokenizer,
        shards,
        training=config.training,
        lora=config.lora,
        federation=config.federation,
        seed=3,
    )
    assert split["held_out_loss"] == pytest.approx(held_out_loss(run, base, tmp_path / "a", data.held_out), abs=1e-6)
    base_model = open_whole_model(base).eval()
    assert split["base_loss"] == central["base_loss"] == pytest.approx(loss_of(base_model, data.held_out), abs=1e-6)
    assert split["perplexity"] == math.exp(split["held_out_loss"])
    traffic = list(run.traffic.values())
    assert split["activation_up_bytes"] == sum(each.sent_bytes for each in traffic) / 4  # 2 agents, 2 rounds
    assert split["activation_down_bytes"] == sum(each.received_bytes for each in traffic) / 4
    burden = adapter_burden({**adapter_state(parts.bottom), **adapter_state(parts.top)})
    assert split["trainable_parameters"] == burden.trainable_parameters > 0
    assert (split["adapter_up_bytes"], split["adapter_down_bytes"]) == (burden.sent_bytes, burden.received_bytes)
    assert (split["steps"], split["samples"], split["data_up_bytes"]) == (4, 2 * 4 * 2, 0)
    assert (split["epsilon"], split["delta"], split["relation"]) == (None, None, None)
    joint = config.training.model_copy(update={"batch_size": 4})
    whole = central_lora(open_whole_model(base), tokenizer, shards, training=joint, lora=config.lora, seed=3)
    expected = held_out_loss(whole, base, tmp_path / "b", data.held_out)
    assert central["held_out_loss"] == pytest.approx(expected, abs=1e-6)
    tokens = sum(len(example.input_ids) for shard in shards.values() for example in shard)
    assert (central["activation_up_bytes"], central["data_up_bytes"]) == (0, 4 * tokens / 2)
    assert (central["samples"], central["noise_multiplier"]) == (split["samples"], None)


def test_epsilon_is_that_of_the_record_that_is_worst_off(tmp_path: Path, base: Path) -> None:
    grid = "split_point = [[0, 0]]\nnoise_multiplier = [0.5]\ntraining.local_steps = [1]\ntraining.batch_size = [1]"
    (once,) = run_sweep(write_sweep(tmp_path, grid, base=base, rounds=1))
    assert once["epsilon"] == pytest.approx(epsilon([(0.5, 2)], 1e-5), rel=1e-9)  # smashed data, output gradient
    assert (once["delta"], once["relation"]) == (1e-5, "replace-one")


def test_what_nothing_is_guaranteed_of_has_an_infinite_epsilon(tmp_path: Path, base: Path) -> None:
    grid = "noise_multiplier = [0.5]\nprivacy.adapter = ['none']"
    (row,) = run_sweep(write_sweep(tmp_path, grid, base=base, rounds=1))
    assert row["epsilon"] == math.inf == read_sweep(tmp_path / "sweep.csv")[0]["epsilon"]


def test_rows_are_read_back_as_they_were_made(tmp_path: Path, base: Path) -> None:
    seen: list[dict[str, Any]] = []
    progress: list[SweepProgress] = []
    file = write_sweep(tmp_path, GRID, base=base, rounds=1)
    rows = run_sweep(file, on_row=seen.append, on_progress=progress.append)
    assert rows == seen == read_sweep(tmp_path / "sweep.csv")
    assert [(each.done, each.total) for each in progress] == [(done, 4) for done in range(5)]
    assert progress[0].left_s is None
    assert all(each.left_s is not None and each.left_s > 0 for each in progress[1:-1])
    assert progress[-1].left_s == 0
    assert run_sweep(file, on_row=lambda row: pytest.fail("there is nothing left to do")) == rows


def test_the_order_of_a_grid_changes_no_bit_and_a_larger_grid_goes_on(
    tmp_path: Path, base: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    first = without_time(run_sweep(write_sweep(tmp_path, "noise_multiplier = [0.01]\nseed = [1]", base=base, rounds=1)))
    assert len(first) == 1
    assert all(undisturbed[cell] == row for cell, row in first.items())
    made: list[dict[str, Any]] = []
    rows = run_sweep(write_sweep(tmp_path, GRID, base=base, rounds=1), on_row=made.append)
    assert (without_time(rows), len(made)) == (undisturbed, 3)


def in_a_fork(target: Any, *arguments: Any) -> Any:
    """Start a process that shares what this one has imported."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_sweep_that_is_killed_again_and_again_ends_with_one_row_a_run(
    tmp_path: Path, base: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    file, draw = write_sweep(tmp_path, GRID, base=base, rounds=1), random.Random(0)
    process = in_a_fork(_kill_itself_at_the_first_row, file)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 1 <= len(read_sweep(tmp_path / "sweep.csv")) < len(undisturbed)
    for _ in range(MOST_TRIES):
        process = in_a_fork(run_sweep, file)
        process.join(draw.uniform(0.02, 0.5))
        if process.exitcode == 0:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert without_time(run_sweep(file)) == undisturbed
    assert without_time(read_sweep(tmp_path / "sweep.csv")) == undisturbed


def _kill_itself_at_the_first_row(file: Path) -> None:
    run_sweep(file, on_row=lambda row: os.kill(os.getpid(), signal.SIGKILL))


def _kill_a_worker_at_the_first_row(file: Path, folder: Path) -> None:
    def kill(row: dict[str, Any]) -> None:
        if not (folder / "killed").exists():
            (folder / "killed").touch()
            for worker in multiprocessing.active_children()[:1]:
                os.kill(worker.pid or 0, signal.SIGKILL)

    run_sweep(file, processes=2, on_row=kill)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_several_processes_give_the_same_bits_whichever_of_them_are_killed(
    tmp_path: Path, base: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    grid = GRID.replace("seed = [0, 1]", f"seed = {list(range(60))}")
    file, table = write_sweep(tmp_path, grid, base=base, rounds=1), tmp_path / "sweep.csv"
    process = in_a_fork(_kill_a_worker_at_the_first_row, file, tmp_path)
    end_s = time.monotonic() + 200
    while process.is_alive() and time.monotonic() < end_s:
        if table.exists() and len(read_sweep(table)) >= 6:
            os.kill(process.pid, signal.SIGKILL)
        process.join(0.02)
    assert process.exitcode == -signal.SIGKILL
    there = without_time(read_sweep(table))
    assert 6 <= len(there) < 120
    lost = [row for row in there.values() if row["error"] is not None]
    assert len(lost) <= 1  # a process may be killed between two runs
    assert all("was ended by SIGKILL" in row["error"] for row in lost)
    rows = without_time(run_sweep(write_sweep(tmp_path, GRID, base=base, rounds=1), retry_failed=True))
    assert rows == undisturbed
    assert without_time(read_sweep(table)).keys() >= there.keys() - {row["cell"] for row in lost}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ctrl_c_ends_with_status_130_and_keeps_what_is_there(tmp_path: Path, base: Path) -> None:
    file, table = write_sweep(tmp_path, f"noise_multiplier = [0]\nseed = {list(range(500))}", base=base), tmp_path
    process = in_a_fork(cli.main, ["sweep", str(file)])
    end_s = time.monotonic() + 100
    while process.is_alive() and time.monotonic() < end_s:
        if (table / "sweep.csv").exists() and read_sweep(table / "sweep.csv"):
            os.kill(process.pid, signal.SIGINT)
            process.join(60)
        process.join(0.02)
    assert process.exitcode == 130
    assert 1 <= len(without_time(read_sweep(table / "sweep.csv"))) < 500


def test_a_run_that_fails_has_a_row_that_says_why_and_stops_no_other(tmp_path: Path, base: Path) -> None:
    grid = "training.learning_rate = [1e30, 0.01]\nprivacy.smashed = ['sequence', 'token']\nnoise_multiplier = [0]"
    file = write_sweep(tmp_path, grid, base=base)
    rows = run_sweep(file)
    assert [row["error"] is None for row in rows] == [False, False, True, False]
    assert rows[0]["error"].startswith(("The loss", "The smashed data", "The gradient"))
    assert 'smashed = "token" needs bottom_blocks = 0, not 1' in rows[1]["error"]
    assert (rows[0]["held_out_loss"], rows[1]["held_out_loss"]) == (None, None)
    made: list[dict[str, Any]] = []
    assert run_sweep(file, on_row=made.append) == rows
    assert made == []
    again = run_sweep(file, retry_failed=True, on_row=made.append)
    assert without_time(again) == without_time(rows) == without_time(read_sweep(tmp_path / "sweep.csv"))
    assert {row["cell"] for row in made} == {row["cell"] for row in rows if row["error"] is not None}


def test_rows_of_another_configuration_are_never_mixed_in(tmp_path: Path, base: Path) -> None:
    grid = "noise_multiplier = [0]\nseed = [0]"
    run_sweep(write_sweep(tmp_path, grid, base=base))
    before = (tmp_path / "sweep.csv").read_bytes()
    other = write_sweep(tmp_path, grid, base=base, rounds=3)
    with pytest.raises(ConfigError, match=r"sweep\.csv: line 2 is of another sweep: its settings outside of the grid"):
        run_sweep(other)
    file = write_sweep(tmp_path, grid, base=base)
    write_rows(tmp_path / "rows.jsonl", seed=1)
    with pytest.raises(ConfigError, match="is of another sweep"):
        run_sweep(file)
    more = write_sweep(tmp_path, f"{grid}\nlora.rank = [2]", base=base)
    with pytest.raises(ConfigError, match="has the axes noise_multiplier, seed, but this grid has noise_mul"):
        run_sweep(more)
    assert (tmp_path / "sweep.csv").read_bytes() == before


def test_the_same_rows_elsewhere_are_the_same_sweep(tmp_path: Path, base: Path) -> None:
    grid = "noise_multiplier = [0]\nseed = [0]"
    (row,) = run_sweep(write_sweep(tmp_path, grid, base=base))
    (tmp_path / "moved").mkdir()
    file = write_sweep(tmp_path / "moved", grid, base=base)
    (tmp_path / "sweep.csv").rename(tmp_path / "moved" / "sweep.csv")
    assert run_sweep(file, on_row=lambda row: pytest.fail("it is there")) == [row]


def test_a_grid_of_which_nothing_is_possible_is_refused(tmp_path: Path, base: Path) -> None:
    file = write_sweep(tmp_path, "privacy.smashed = ['token']", base=base)
    with pytest.raises(ConfigError, match=r'No run of the grid is possible; the first says: smashed = "token" needs'):
        run_sweep(file)
    assert not (tmp_path / "sweep.csv").exists()


def test_no_process_at_all_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="processes is 0; give 1 or more"):
        run_sweep(write_sweep(tmp_path, "seed = [0]", base=base), processes=0)


def test_a_sweep_at_a_terminal_says_how_far_it_is_and_ends_with_a_table(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path, "noise_multiplier = [0]\nsplit_point = [[1, 1], [9, 9]]\nseed = [0, 1]", base=base)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(file)])
    said = capsys.readouterr()
    assert ended.value.code == 0
    lines = said.err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert "split_point=1+1 seed=0: held-out loss " in lines[0]
    assert "left" in lines[0]
    assert "split_point=9+9 seed=0: failed: " in lines[1]
    assert " ± " in said.out
    assert (
        "Failed: 2 of 4 runs; the column error says why, and --retry-failed makes them again. The first: bottom"
        in said.out
    )
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(file)])
    assert capsys.readouterr().err == "4/4 runs are there already\n"
    with (tmp_path / "sweep.csv").open(newline="") as lines_of_csv:
        assert len(list(csv.DictReader(lines_of_csv))) == 4


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["gone.toml"], 2, "gone.toml: no such file; give the path of a sweep's TOML file"),
        (["sweep.toml", "--processes", "0"], 2, "--processes is 0; give 1 or more"),
        (["no_data.toml"], 1, "gone.jsonl: no such file; correct the path in [data]"),
        (["no_column.toml"], 1, "has no column 'colour'; it has text, kind: name one of these in data.label_column"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, base: Path, arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_sweep(tmp_path, "seed = [0]", base=base).read_text()
    (tmp_path / "no_data.toml").write_text(text.replace("rows.jsonl", "gone.jsonl"))
    (tmp_path / "no_column.toml").write_text(text.replace("[output]", 'label_column = "colour"\n[output]'))
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(tmp_path / arguments[0]), *arguments[1:]])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (status, 1)
    assert said in err
    assert not (tmp_path / "sweep.csv").exists()
