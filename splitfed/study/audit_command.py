"""The audit as a command: a bar with the time left, and mistakes in the words of the command line."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from splitfed.config import DataSection, ServerConfig
from splitfed.errors import ConfigError, DataError, SplitFedError
from splitfed.study.audit import audit, check_folder, write_audit
from splitfed.study.audit_rows import Audit
from splitfed.training.runtime import prepare_process

_OPTIONS: Final = {
    r"in \[data\], such as prompt_column and completion_column": "with --prompt-column and --completion-column",
    r"set data\.format to .*$": "give it the name of a .jsonl, .csv, .parquet or .txt file",
    r"look at the columns named in \[data\]": "look at the columns that are named",
}
"""What the command line mends."""
_FILES: Final = {r"correct the file or data\.format": "correct the file"}
"""What it does not."""


@dataclass(frozen=True)
class Columns:
    """Which columns of both files are read."""

    text: str
    prompt: str
    completion: str
    messages: str

    def section(self, file: Path) -> DataSection:
        """Describe a file as an agent's configuration would."""
        return DataSection(
            path=str(file),
            text_column=self.text,
            prompt_column=self.prompt,
            completion_column=self.completion,
            messages_column=self.messages,
        )


def run_audit(
    config: ServerConfig, public: Path, private: Path, columns: Columns, *, examples: int, output: Path | None
) -> Audit:
    """Make an audit and write it.

    Args:
        config: The server's configuration.
        public: The file of public text.
        private: The file of private text.
        columns: What to read of both.
        examples: Private sequences to attack.
        output: Folder for JSON, CSV and plot; None = none are written.

    Raises:
        SplitFedError: If something cannot be used; nothing is written then.
    """
    for option, file in (("--public-data", public), ("--private-data", private)):
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; give {option} the path of one")
    if output is not None:
        check_folder(output)
    prepare_process(config.server.threads)
    try:
        with _progress() as on_stage:
            found = audit(
                config, columns.section(public), columns.section(private), examples=examples, on_stage=on_stage
            )
    except DataError as error:
        raise _for_the_command_line(str(error)) from error
    if output is not None:
        write_audit(found, output)
    return found


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show on stderr what is being done: with the time left at a terminal, else a line when something new begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=1.0)
        yield lambda what, part: progress.update(task, description=what, completed=part)


class _Lines:
    """Says what is being done, once, as soon as something is done: till then it may turn out that nothing can be."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""

    def __call__(self, what: str, part: float) -> None:
        if part > 0 and what != self._said:
            self._said = what
            self._console.print(f"{part:4.0%}  {what}", highlight=False, markup=False)


def _for_the_command_line(sentence: str) -> SplitFedError:
    """Say of a mistake in the data what mends it here, where an agent's section [data] is spoken of."""
    for there, here in _FILES.items():
        sentence = re.sub(there, here, sentence)
    of_options = sentence
    for there, here in _OPTIONS.items():
        of_options = re.sub(there, here, of_options)
    return DataError(sentence) if of_options == sentence else ConfigError(of_options)
