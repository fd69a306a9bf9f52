"""The commands that plan: what a device can do, where to cut, and what a grid of runs comes to."""

from pathlib import Path
from typing import Annotated

import typer

from splitfed.cli.output import print_table, writing_to_stdout
from splitfed.errors import ConfigError, OutputError


def profile(
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the profile there; left out = print it.")
    ] = None,
    link_to: Annotated[
        str | None, typer.Option("--link-to", metavar="HOST:PORT", help="Measure the link to this server, too.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="An agent's configuration, for its certificates and threads."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="CPU threads for arithmetic; left out = as a daemon.")
    ] = None,
) -> None:
    """Measure this device into a profile, which plans are made with."""
    from splitfed.config import load_agent_config, parse_address, to_toml

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads is {threads}; give 1 or more")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"--output is {output}; give a file in a folder that exists")
    if link_to is not None:
        try:
            parse_address(link_to)
        except ValueError as error:
            raise ConfigError(f"--link-to {error}") from error
    settings = None if config is None else load_agent_config(config)
    from rich.console import Console

    from splitfed.study.profile import measure_device
    from splitfed.study.profile_link import measure_link

    with Console(stderr=True).status("measuring") as status:
        link = None
        if link_to is not None:
            status.update(f"measuring the link to {link_to}")
            tls = None if settings is None else settings.tls
            link = measure_link(link_to, tls, client="profile" if settings is None else settings.agent.name)
        if threads is None and settings is not None:
            threads = settings.agent.threads
        found = measure_device(threads=threads, link=link, on_progress=lambda what: status.update(f"measuring {what}"))
    text = to_toml(found)
    if output is None:
        with writing_to_stdout():
            typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); give another file.") from error


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", readable=False, help="The sweep, a TOML file.")],
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", help="Processes that make runs, each with one thread.")
    ] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make runs again that failed.")] = False,
) -> None:
    """Make a grid of runs in this process, a row of a CSV file for each."""
    from splitfed.config.sweep import load_sweep_config

    if processes < 1:
        raise ConfigError(f"--processes is {processes}; give 1 or more")
    config = load_sweep_config(file)
    from splitfed.study.sweep import summary
    from splitfed.study.sweep.command import sweep_at_terminal

    rows = sweep_at_terminal(config, processes=processes, retry_failed=retry_failed)
    print_table(*summary(rows))
