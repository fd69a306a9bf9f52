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


def plan(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help='Folder, hub id, or "demo"; left out = that of --config.'),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="PROFILE", help="Profile, or device class; several = a fleet."),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine as a device.")] = False,
    server: Annotated[
        str, typer.Option("--server", metavar="PROFILE", help="Profile or class of the server's machine.")
    ] = "server",
    link: Annotated[
        str | None,
        typer.Option(
            "--link", metavar="LINK", help="Bandwidth and round trip, such as 20mbit,40ms; left out = profile."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Most memory of an agent, such as 4GB.")
    ] = None,
    max_step: Annotated[
        str | None, typer.Option("--max-step", metavar="TIME", help="Longest local step, such as 5s.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="SIZE", help="Most bytes of a step, both ways, such as 2MB.")
    ] = None,
    max_loss_cost: Annotated[
        float | None, typer.Option("--max-loss-cost", metavar="NATS", help="Most loss above the best without noise.")
    ] = None,
    max_leakage: Annotated[
        float | None, typer.Option("--max-leakage", metavar="SHARE", help="Most that attacks recover, such as 0.2.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", metavar="EPSILON", help="Most that the run may cost a record.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A server's configuration, for all else of the run.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; left out = the run's.")
    ] = None,
    ranks: Annotated[str, typer.Option("--ranks", metavar="LIST", help="Ranks to choose among.")] = "4,8,16",
    codecs: Annotated[str, typer.Option("--codecs", metavar="LIST", help="Codecs to choose among.")] = "none,bf16,int8",
    noise: Annotated[
        str | None,
        typer.Option("--noise", metavar="LIST", help="Noise multipliers to choose among; left out = the run's."),
    ] = None,
    most_blocks: Annotated[int, typer.Option("--most-blocks", metavar="N", help="Most blocks at each end.")] = 4,
    agents: Annotated[
        int | None, typer.Option("--agents", metavar="N", help="Agents of a round; left out = the run's.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", help="Rows of a device, for epsilon.")] = 1000,
    prefer: Annotated[
        str, typer.Option("--prefer", metavar="AIM", help="What counts most: loss, leakage, step, bytes or memory.")
    ] = "loss",
    sweeps: Annotated[
        list[Path] | None, typer.Option("--sweep", metavar="FILE", help="A sweep of yours, for what loss costs.")
    ] = None,
    audits: Annotated[
        list[Path] | None, typer.Option("--audit", metavar="FOLDER", help="An audit of yours, for what leaks.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Write the configuration of server and agents there."),
    ] = None,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="The agents' data, for --output.")] = "data.jsonl",
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="Where agents reach the server, for --output.")
    ] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Plans to show for each device.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose where to cut, for a device, a link, and what must be kept."""
    given = dict(locals())
    from splitfed.config.plan import PlanOptions

    options = PlanOptions.read(given)
    from splitfed.study.plan import command

    made = command.plan_at_terminal(options)
    if as_json:
        with writing_to_stdout():
            typer.echo(made.as_json())
        return
    print_table(*made.table(), made.sentences())
