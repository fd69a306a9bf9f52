"""The commands that say what privacy costs and what leaks."""

from pathlib import Path
from typing import Annotated

import typer

from splitfed.cli.columns import CompletionColumn, MessagesColumn, PromptColumn, TextColumn
from splitfed.cli.daemons import ConfigFile
from splitfed.cli.output import print_table, writing_to_stdout
from splitfed.errors import ConfigError


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
    text_column: TextColumn = "text",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    messages_column: MessagesColumn = "messages",
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
        with writing_to_stdout():
            typer.echo(found.as_json())
        return
    print_table(*found.table(), found.summary())


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
        with writing_to_stdout():
            typer.echo(report.model_dump_json())
        return
    print_table(*report.table(), report.summary())
