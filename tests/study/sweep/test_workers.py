"""Runs in other processes: one that dies loses its run and says so."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from splitfed.config.sweep import load_sweep_config
from splitfed.config.sweep_cells import cells
from splitfed.study.sweep.bench import Job
from splitfed.study.sweep.workers import outcomes
from tests.study.sweep.small_sweep import write_sweep


@pytest.fixture
def job(tmp_path: Path, base: Path) -> Job:
    """A small run, of data that have changed since."""
    (cell,) = cells(load_sweep_config(write_sweep(tmp_path, "seed = [0]", base=base)))
    assert cell.config is not None
    return Job("name", cell.config, base, "a hash of other rows")


def test_a_run_whose_process_is_killed_says_so(job: Job) -> None:
    def kill() -> None:
        (child,) = multiprocessing.active_children()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()

    ((of, figures),) = outcomes([job], processes=2, on_ready=kill)
    said = "The process of this run was ended by SIGKILL; give the sweep fewer processes if memory was short."
    assert (of, figures) == (job, {"error": said})
    assert multiprocessing.active_children() == []


def test_data_that_change_under_a_sweep_are_noticed(job: Job) -> None:
    ((_, figures),) = outcomes([job], processes=1)
    assert str(figures["error"]).endswith("rows.jsonl: has changed while the sweep ran; start the sweep again")
