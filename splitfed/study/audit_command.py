"""The audit as a command."""

from pathlib import Path

from splitfed.config import ServerConfig
from splitfed.errors import ConfigError, DataError
from splitfed.study.audit import audit, check_folder, write_audit
from splitfed.study.audit_rows import Audit
from splitfed.study.command_line import Columns, in_words_of_options, stages_on_stderr
from splitfed.training.runtime import prepare_process

__all__ = ["Columns", "run_audit"]


def run_audit(
    config: ServerConfig, public: Path, private: Path, columns: Columns, *, examples: int, output: Path | None
) -> Audit:
    """Make an audit and write it.

    Args:
        config: The server's configuration.
        public: The file of public text.
        private: The file of private text.
        columns: What to read of both.
        examples: Private sequences to attack.
        output: Folder for JSON, CSV and plot; None = none are written.

    Raises:
        SplitFedError: If something cannot be used; nothing is written then.
    """
    for option, file in (("--public-data", public), ("--private-data", private)):
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; give {option} the path of one")
    if output is not None:
        check_folder(output)
    prepare_process(config.server.threads)
    try:
        with stages_on_stderr() as on_stage:
            found = audit(
                config, columns.section(public), columns.section(private), examples=examples, on_stage=on_stage
            )
    except DataError as error:
        raise in_words_of_options(str(error)) from error
    if output is not None:
        write_audit(found, output)
    return found
