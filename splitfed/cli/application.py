"""The command itself: what every one of its commands has in common."""

import sys
from typing import Annotated

import typer

from splitfed import __version__
from splitfed.errors import SplitFedError

app = typer.Typer(
    name="splitfed",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command, then end the process with its exit status.

    What a user can meet becomes one sentence on stderr: status 2 for a mistake in the configuration or on the command
    line, 3 for what a second start would meet again, 1 for anything else. Ctrl-C ends with status 130 and no words.

    Args:
        arguments: The words after ``splitfed``; left out = those that the process was started with.
    """
    try:
        app(arguments, prog_name="splitfed")
    except SplitFedError as error:
        typer.echo(f"splitfed: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"splitfed {__version__}")
        raise typer.Exit


@app.callback()
def _splitfed(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Fine-tune a language model split between devices that hold the text and a server that holds the compute."""
