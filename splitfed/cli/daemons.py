"""The commands that run daemons."""

from pathlib import Path
from typing import Annotated

import typer

from splitfed.cli.output import log_to_stderr
from splitfed.errors import ConfigError

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, a TOML file.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plain text to and from other machines.")]


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
    log_to_stderr()
    from splitfed.server.main import run_server

    raise typer.Exit(run_server(settings, resume=resume, overwrite=overwrite, insecure=insecure))


def agent(config: ConfigFile, insecure: Insecure = False) -> None:
    """Take part in a run with this device's text."""
    from splitfed.config import load_agent_config

    settings = load_agent_config(config)
    log_to_stderr()
    from splitfed.agent.main import run_agent

    raise typer.Exit(run_agent(settings, insecure=insecure))


def demo(
    directory: Annotated[
        Path, typer.Option("--directory", metavar="FOLDER", help="Where the report and the adapter go.")
    ] = Path("demo"),
) -> None:
    """Run one server and three agents on this machine."""
    from splitfed.demo import run_demo

    raise typer.Exit(run_demo(directory))
