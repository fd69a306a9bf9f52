"""The commands that use what a run has come to."""

import io
import sys
from pathlib import Path
from typing import Annotated, Final, Protocol

import typer

from splitfed.cli.columns import CompletionColumn, MessagesColumn, PromptColumn, TextColumn
from splitfed.cli.daemons import Insecure
from splitfed.cli.output import log_to_stderr, print_table, writing_to_stdout
from splitfed.errors import ConfigError, DataError

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The server's run directory.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="BASE", help="Where the base model is; left out = as the run says.")
]
Round = Annotated[
    int | None, typer.Option("--round", metavar="N", help="The round whose adapter is used; left out = the last.")
]

_COLUMNS: Final = ("text", "prompt", "completion", "messages")


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
    base: Base = None,
    round: Round = None,
    adapter: Annotated[
        bool, typer.Option("--adapter/--no-adapter", help="With --run: text of the base model alone, to compare.")
    ] = True,
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
    if run is None and (base is not None or round is not None or not adapter):
        raise ConfigError("--base, --round and --no-adapter are for --run; with --config, the server has the model")
    settings = None if config is None else load_agent_config(config)
    log_to_stderr()
    from splitfed.training.prompts import Wanted

    wanted = Wanted(prompt or (), [str(each) for each in file or ()], max_tokens, temperature, top_p, seed)
    if run is not None:
        from splitfed.study.generate_run import generate_from_run

        generate_from_run(run, wanted, write=_write, base=base, round=round, with_adapter=adapter)
    if settings is not None:
        from splitfed.agent.generate import run_generate

        run_generate(settings, wanted, write=_write, insecure=insecure)


def evaluate(
    run_directory: Annotated[
        Path | None, typer.Argument(metavar="[RUN_DIR]", help="The server's run directory: one process, no daemons.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="In place of it: an agent's configuration, through its server."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Text to measure on, never trained on; with --config: else held_out_path."
        ),
    ] = None,
    base: Base = None,
    round: Round = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Rows to read at most.")] = None,
    writes_texts: Annotated[
        bool, typer.Option("--generate", help="Write completions, too, and compare them with those of the file.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Most tokens of prompt and text together; left out = those of training."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    text_column: TextColumn = "text",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    messages_column: MessagesColumn = "messages",
    insecure: Insecure = False,
) -> None:
    """Measure what a run has changed: loss, perplexity, texts."""
    if (config is None) == (run_directory is None):
        raise ConfigError("give either RUN_DIR, a run directory, or --config FILE, an agent's configuration")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; give 1 or more")
    if max_tokens is not None and not writes_texts:
        raise ConfigError("--max-tokens says how long texts become; give --generate, too, or leave it out")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"--max-tokens is {max_tokens}; give 2 or more, prompt included")
    if data is not None and not data.is_file():
        raise ConfigError(f"{data}: no such file; give --data the path of one")
    columns = (text_column, prompt_column, completion_column, messages_column)
    if run_directory is not None:
        if data is None:
            raise ConfigError("there is nothing to measure on; give --data FILE")
        found = _evaluated(run_directory, data, columns, base, round, limit, writes_texts, max_tokens)
    else:
        assert config is not None
        if base is not None or round is not None:
            raise ConfigError("--base and --round are for a run directory; with --config, the server has both")
        if columns != _COLUMNS:
            raise ConfigError("with --config, the columns are those of its [data]; name them there")
        served = _evaluated_by_server(config, data, limit, writes_texts, max_tokens, insecure=insecure)
        if served is None:
            return
        found = served
    if as_json:
        with writing_to_stdout():
            typer.echo(found.as_json())
        return
    print_table(*found.table(), found.summary())


def export(
    run_directory: RunDirectory,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write: a new or an empty one.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole checkpoint: the base model with the adapter in its weights.")
    ] = False,
    base: Base = None,
    round: Round = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Numbers of a merged checkpoint: float32, bfloat16 or float16; left out = the run's."
        ),
    ] = None,
) -> None:
    """Write a run's adapter, or a merged checkpoint, for use elsewhere."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is {dtype}; give float32, bfloat16 or float16")
    from splitfed.study.command_line import stages_on_stderr
    from splitfed.study.export import export_run
    from splitfed.study.run_folder import open_run

    run = open_run(run_directory, round=round)
    with stages_on_stderr() as on_stage:
        export_run(run, output, merge=merge, base=base, dtype=dtype, on_stage=on_stage)
    with writing_to_stdout():
        typer.echo(
            f"{output}: {'merged checkpoint' if merge else 'adapter'} of round {run.round} of {run.config.run_id}"
        )


def report(
    run_directory: RunDirectory,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Left out = report.html in the run directory.")
    ] = None,
    agents: Annotated[
        list[str] | None,
        typer.Option("--agent", metavar="NAME=FOLDER", help="State directory of an agent whose figures may be shown."),
    ] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", metavar="FOLDER", help="What `splitfed audit --output` has written.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading; left out = the run's name.")] = None,
) -> None:
    """Write one page about a finished or running run."""
    folders = {}
    for agent in agents or []:
        name, separator, folder = agent.partition("=")
        if not (name and separator and folder):
            raise ConfigError(f"--agent is {agent}; give a name and a state directory, such as clinic=state/clinic")
        folders[name] = Path(folder)
    from splitfed.study.report import write_report

    page = output or run_directory / "report.html"
    write_report(run_directory, page, agent_directories=folders, audit_folder=audit, title=title)
    with writing_to_stdout():
        typer.echo(str(page))


class _Found(Protocol):
    """What an evaluation found, as it is shown."""

    def as_json(self) -> str:
        """Give everything as one JSON object."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal."""

    def summary(self) -> list[str]:
        """Give the sentences below the table."""


def _evaluated(
    directory: Path,
    data: Path,
    columns: tuple[str, str, str, str],
    base: str | None,
    round: int | None,
    limit: int | None,
    writes_texts: bool,
    max_tokens: int | None,
) -> _Found:
    from splitfed.study.command_line import Columns, in_words_of_options, stages_on_stderr
    from splitfed.study.evaluate import evaluate_run
    from splitfed.study.run_folder import open_run
    from splitfed.training.runtime import prepare_process

    run = open_run(directory, round=round)
    section = Columns(*columns).section(data).model_copy(update={"max_rows": limit})
    prepare_process(run.config.server.threads)
    try:
        with stages_on_stderr() as on_stage:
            return evaluate_run(
                run, section, base=base, writes_texts=writes_texts, max_tokens=max_tokens, on_stage=on_stage
            )
    except DataError as error:
        raise in_words_of_options(str(error)) from error


def _evaluated_by_server(
    config: Path,
    data: Path | None,
    limit: int | None,
    writes_texts: bool,
    max_tokens: int | None,
    *,
    insecure: bool,
) -> _Found | None:
    from splitfed.config import load_agent_config

    settings = load_agent_config(config)
    log_to_stderr()
    from splitfed.agent.evaluate import held_out, on_file, run_evaluate
    from splitfed.study.command_line import stages_on_stderr

    section = held_out(settings) if data is None else on_file(settings, str(data))
    if limit is not None:
        section = section.model_copy(update={"max_rows": limit})
    with stages_on_stderr() as on_stage:
        return run_evaluate(
            settings,
            section,
            writes_texts=writes_texts,
            max_tokens=max_tokens,
            on_stage=on_stage,
            insecure=insecure,
        )


def _write(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what this terminal cannot show stops nothing
    with writing_to_stdout():
        sys.stdout.write(text)
