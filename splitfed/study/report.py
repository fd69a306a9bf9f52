"""The report of a run: one HTML page that says what happened, what it cost and what was given away."""

from collections.abc import Mapping
from pathlib import Path

from splitfed.errors import OutputError
from splitfed.study.leakage import leakage_section, read_leakage
from splitfed.study.measured import BeforeAfter
from splitfed.study.overview import header, samples, tiles
from splitfed.study.page import element, page
from splitfed.study.participants import agents_section, privacy_section
from splitfed.study.progress import plots_section, rounds_section
from splitfed.study.record import read_run
from splitfed.study.settings import settings_section
from splitfed.study.timing import time_section

__all__ = ["BeforeAfter", "write_report"]


def write_report(
    run_directory: Path,
    output: Path,
    *,
    agent_directories: Mapping[str, Path] | None = None,
    before_after: BeforeAfter | None = None,
    audit_folder: Path | None = None,
    title: str | None = None,
) -> None:
    """Write the report of a finished or running run as one HTML file that loads nothing from anywhere.

    The same files give the same page to the byte, as long as a server is at work on the run, or none is.

    Args:
        run_directory: The server's run directory.
        output: The file to write.
        agent_directories: State directory by name, of the agents whose own metrics may be shown. What the others did
            not tell the server is marked as not shared.
        before_after: Held-out losses and generated samples, if they were measured.
        audit_folder: What `splitfed audit` has written of this run, if it was audited.
        title: Heading of the page; the run's name if not given.

    Raises:
        DataError: If a directory or the run's configuration is missing, or a file is damaged.
        OutputError: If the page cannot be written.
    """
    record = read_run(run_directory, agent_directories)
    leakage = None if audit_folder is None else read_leakage(audit_folder)
    heading = title or record.config.run.name
    measured = before_after or BeforeAfter()
    content = [
        header(record, heading),
        tiles(record, measured),
        plots_section(record, measured),
        rounds_section(record, measured),
        samples(measured),
        privacy_section(record),
        leakage_section(leakage),
        agents_section(record),
        time_section(record),
        settings_section(record),
        element("footer", "Written by splitfed from the files of the run itself."),
    ]
    draft = output.with_name(f".{output.name}.draft")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(page(f"{heading} · splitfed", content), encoding="utf-8")
        draft.replace(output)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"{output}: cannot be written ({error.strerror}); give another file.") from error
