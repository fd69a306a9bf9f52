"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is instant."""

from splitfed.cli.application import main
from splitfed.cli.commands import app

__all__ = ["app", "main"]
