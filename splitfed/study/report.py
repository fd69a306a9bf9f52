"""The report of a run: one HTML page that says what happened, what it cost and what was given away."""

from collections.abc import Mapping
from pathlib import Path

from splitfed.study.measured import BeforeAfter
from splitfed.study.overview import header, samples, tiles
from splitfed.study.page import element, page
from splitfed.study.participants import agents_section, privacy_section
from splitfed.study.progress import plots_section, rounds_section
from splitfed.study.record import read_run
from splitfed.study.settings import settings_section

__all__ = ["BeforeAfter", "write_report"]


def write_report(
    run_directory: Path,
    output: Path,
    *,
    agent_directories: Mapping[str, Path] | None = None,
    before_after: BeforeAfter | None = None,
    title: str | None = None,
) -> None:
    """Write the report of a finished or running run as one HTML file that loads nothing from anywhere.

    The same files give the same page to the byte.

    Args:
        run_directory: The server's run directory.
        output: The file to write.
        agent_directories: State directory by name, of the agents whose own metrics may be shown. What the others did
            not tell the server is marked as not shared.
        before_after: Held-out losses and generated samples, if they were measured.
        title: Heading of the page; the run's name if not given.

    Raises:
        DataError: If a directory or the run's configuration is missing, or a file is damaged.
    """
    record = read_run(run_directory, agent_directories)
    heading = title or record.config.run.name
    measured = before_after or BeforeAfter()
    content = [
        header(record, heading),
        tiles(record, measured),
        plots_section(record, measured),
        rounds_section(record, measured),
        samples(measured),
        privacy_section(record),
        agents_section(record),
        settings_section(record),
        element("footer", "Written by splitfed from the files of the run itself."),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(f"{heading} · splitfed", content), encoding="utf-8")
