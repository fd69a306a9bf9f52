"""What commands print, and where it goes."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from splitfed.errors import OutputError

_WIDTH_OF_A_FILE = 160


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], sentences: Iterable[str]) -> None:
    """Print a table with what there is to say of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, overflow="fold")  # a figure that does not fit is never cut
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    with writing_to_stdout():
        console.print(table)
        for sentence in sentences:
            console.print(sentence, soft_wrap=True)


@contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Write all of it, or say in a sentence that it cannot be written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads has seen enough
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again as it ends
        reason = error.strerror
        raise OutputError(f"The output cannot be written ({reason}); send it to where there is room.") from error


class _PresentStderr(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at the moment, so that lines go above a progress bar and not into it."""

    @property
    def stream(self) -> TextIO:
        """Where lines go."""
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Take no other stream."""


def log_to_stderr() -> None:
    """Show what splitfed does, and of other packages only what is wrong."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", handlers=[_PresentStderr()]
    )
    logging.getLogger("splitfed").setLevel(logging.INFO)
