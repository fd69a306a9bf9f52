"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is instant."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from splitfed import __version__
from splitfed.errors import ConfigError, SplitFedError

app = typer.Typer(
    name="splitfed",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, a TOML file.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plain text to and from other machines.")]


def main(arguments: list[str] | None = None) -> None:
    """Run a command, then end the process with its exit status.

    What a user can meet becomes one sentence on stderr: status 2 for a mistake in the configuration or on the command
    line, 1 for anything else. Ctrl-C ends with status 130 and no words.

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
def ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="ledger.jsonl of an agent's state directory.")],
    delta: Annotated[float, typer.Option("--delta", help="The delta to state epsilon at.")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what an agent's releases have cost."""
    if not 0 < delta < 1:
        raise ConfigError(f"--delta is {delta}; give a number between 0 and 1")
    from splitfed.privacy.ledger_file import read_ledger
    from splitfed.privacy.spending import CHANNELS, Spending, total_statement

    contents = read_ledger(file)
    spending, releases = Spending(), dict.fromkeys(CHANNELS, 0)
    for row in contents.rows:
        spending.add(row)
        releases[row.channel] += row.sequences
    epsilon = {channel: spending.epsilon(channel, delta) for channel in CHANNELS}
    total = total_statement(spending.unprotected())
    unit, relation = "sequence", "replace-one"
    if contents.header is not None:
        unit, relation = contents.header.unit, contents.header.relation
    if as_json:
        statement = {"releases": releases, "epsilon": epsilon, "total": total}
        typer.echo(json.dumps({**statement, "delta": delta, "unit": unit, "relation": relation}))
        return
    for channel in CHANNELS:
        cost = "nothing is guaranteed" if epsilon[channel] is None else f"epsilon {epsilon[channel]:.4g}"
        typer.echo(f"{channel.replace('_', ' '):<16} {releases[channel]:>10} releases   {cost}")
    typer.echo(f"at delta {delta:g}, for one {unit} under {relation}; total: {total}")


def _log_to_stderr() -> None:
    """Show what splitfed does, and of other packages only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("splitfed").setLevel(logging.INFO)
