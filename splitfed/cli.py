"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is instant."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from splitfed import __version__
from splitfed.errors import ConfigError, OutputError, SplitFedError

app = typer.Typer(
    name="splitfed",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_WIDTH_OF_A_FILE = 160

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, a TOML file.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plain text to and from other machines.")]


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


@app.command()
def server(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the directory holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that the directory holds.")] = False,
    insecure: Insecure = False,
) -> None:
    """Serve one run: wait for agents, train, average."""
    from splitfed.config import load_server_config

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give the one that you mean")
    settings = load_server_config(config)
    _log_to_stderr()
    from splitfed.server.main import run_server

    raise typer.Exit(run_server(settings, resume=resume, overwrite=overwrite, insecure=insecure))


@app.command()
def agent(config: ConfigFile, insecure: Insecure = False) -> None:
    """Take part in a run with this device's text."""
    from splitfed.config import load_agent_config

    settings = load_agent_config(config)
    _log_to_stderr()
    from splitfed.agent.main import run_agent

    raise typer.Exit(run_agent(settings, insecure=insecure))


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--directory", metavar="FOLDER", help="Where the report and the adapter go.")
    ] = Path("demo"),
) -> None:
    """Run one server and three agents on this machine."""
    from splitfed.demo import run_demo

    raise typer.Exit(run_demo(directory))


@app.command()
def audit(
    config: ConfigFile,
    public_data: Annotated[
        Path, typer.Option("--public-data", metavar="FILE", help="Text like the private one that everybody has.")
    ],
    private_data: Annotated[
        Path, typer.Option("--private-data", metavar="FILE", help="Text to attack; what leaks of it is counted.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Write audit.json, audit.csv and audit.png there.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", help="Private sequences to attack.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    text_column: Annotated[str, typer.Option("--text-column", help="Column of plain text.")] = "text",
    prompt_column: Annotated[str, typer.Option("--prompt-column", help="Column of prompts.")] = "prompt",
    completion_column: Annotated[
        str, typer.Option("--completion-column", help="Column of completions.")
    ] = "completion",
    messages_column: Annotated[str, typer.Option("--messages-column", help="Column of conversations.")] = "messages",
) -> None:
    """Attack a run's split point, and count what a server recovers."""
    from splitfed.config import load_server_config

    if examples < 2:
        raise ConfigError(f"--examples is {examples}; give 2 or more")
    settings = load_server_config(config)
    from splitfed.study.audit_command import Columns, run_audit

    columns = Columns(text_column, prompt_column, completion_column, messages_column)
    found = run_audit(settings, public_data, private_data, columns, examples=examples, output=output)
    if as_json:
        with _writing_to_stdout():
            typer.echo(found.as_json())
        return
    _print_table(*found.table(), found.summary())


@app.command()
def ledger(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", readable=False, help="ledger.jsonl of an agent's state directory.")
    ],
    delta: Annotated[float, typer.Option("--delta", help="The delta to state epsilon at.")] = 1e-5,
    relation: Annotated[
        str, typer.Option("--relation", help="Against what change: replace-one or zero-out.")
    ] = "replace-one",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what an agent's releases have cost."""
    if not 0 < delta < 1:
        raise ConfigError(f"--delta is {delta}; give a number between 0 and 1")
    if relation not in ("replace-one", "zero-out"):
        raise ConfigError(f"--relation is {relation}; give replace-one or zero-out")
    from splitfed.privacy import report_ledger, witness_folder

    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give the ledger.jsonl of an agent's state directory, as a "
            "user who may read it"
        ) from error
    report = report_ledger(file, delta=delta, relation=relation, witnesses=witness_folder())
    if as_json:
        with _writing_to_stdout():
            typer.echo(report.model_dump_json())
        return
    _print_table(*report.table(), report.summary())


def _print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], sentences: Iterable[str]) -> None:
    """Print a table with what there is to say of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, overflow="fold")  # a figure that does not fit is never cut
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    with _writing_to_stdout():
        console.print(table)
        for sentence in sentences:
            console.print(sentence, soft_wrap=True)


@contextmanager
def _writing_to_stdout() -> Iterator[None]:
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


def _log_to_stderr() -> None:
    """Show what splitfed does, and of other packages only what is wrong."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", handlers=[_PresentStderr()]
    )
    logging.getLogger("splitfed").setLevel(logging.INFO)
