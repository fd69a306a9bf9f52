"""What the commands of studies have in common: columns of a data file, a bar with the time left, mistakes in words."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from splitfed.config import DataSection
from splitfed.errors import ConfigError, DataError, SplitFedError

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
    """Which columns of a file are read."""

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


@contextmanager
def stages_on_stderr() -> Iterator[Callable[[str, float], None]]:
    """Show on stderr what is being done: with the time left at a terminal, else a line when something new begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=1.0)
        yield lambda what, part: progress.update(task, description=what, completed=part)


def in_words_of_options(sentence: str) -> SplitFedError:
    """Say of a mistake in the data what mends it here, where an agent's section [data] is spoken of."""
    for there, here in _FILES.items():
        sentence = re.sub(there, here, sentence)
    of_options = sentence
    for there, here in _OPTIONS.items():
        of_options = re.sub(there, here, of_options)
    return DataError(sentence) if of_options == sentence else ConfigError(of_options)


class _Lines:
    """Says what is being done, once, as soon as something is done: till then it may turn out that nothing can be."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""

    def __call__(self, what: str, part: float) -> None:
        if part > 0 and what != self._said:
            self._said = what
            self._console.print(f"{part:4.0%}  {what}", highlight=False, markup=False)
