"""Sweeps: a grid of runs in process, a row for each in a CSV file."""

from splitfed.study.sweep.run import SweepProgress, run_sweep
from splitfed.study.sweep.summary import summary
from splitfed.study.sweep.table import FIGURES, Row, read_sweep

__all__ = ["FIGURES", "Row", "SweepProgress", "read_sweep", "run_sweep", "summary"]
