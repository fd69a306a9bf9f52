"""Studies of finished runs: reports and plots."""

from splitfed.study.measured import BeforeAfter
from splitfed.study.record import RunRecord, read_run
from splitfed.study.report import write_report

__all__ = ["BeforeAfter", "RunRecord", "read_run", "write_report"]
