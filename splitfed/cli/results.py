"""The commands that use what a run has come to."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from splitfed.cli.daemons import Insecure
from splitfed.cli.output import log_to_stderr, writing_to_stdout
from splitfed.errors import ConfigError


def generate(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The agent's configuration: the trunk is its server's."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FOLDER", help="In place of --config: a run directory, no daemons.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Text to go on from.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", metavar="FILE", help="Prompts, a row each: JSON lines, CSV, Parquet.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Most tokens of prompt and text together; left out = those of training."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Draw tokens, more evenly above 1; 0 = the most likely.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw among the likeliest tokens of so much probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the draws.")] = None,
    insecure: Insecure = False,
) -> None:
    """Generate text with a run's last whole round."""
    from splitfed.config import load_agent_config

    if (config is None) == (run is None):
        raise ConfigError("give either --config FILE, an agent's configuration, or --run FOLDER, a run directory")
    if not prompt and not file:
        raise ConfigError("there is nothing to generate from; give --prompt TEXT or --file FILE")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"--max-tokens is {max_tokens}; give 2 or more, prompt included")
    if temperature is not None and temperature != 0 and not 1e-3 <= temperature <= 1e3:
        raise ConfigError(f"--temperature is {temperature:g}; give 0 for the most likely token, or 0.001 to 1000")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p is {top_p:g}; give a probability above 0, at most 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}; give 0 or more")
    settings = None if config is None else load_agent_config(config)
    log_to_stderr()
    from splitfed.training.prompts import Wanted

    wanted = Wanted(prompt or (), [str(each) for each in file or ()], max_tokens, temperature, top_p, seed)
    if run is not None:
        from splitfed.study.generate_run import generate_from_run

        generate_from_run(run, wanted, write=_write)
    if settings is not None:
        from splitfed.agent.generate import run_generate

        run_generate(settings, wanted, write=_write, insecure=insecure)


def _write(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what this terminal cannot show stops nothing
    with writing_to_stdout():
        sys.stdout.write(text)
