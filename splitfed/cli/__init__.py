"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is instant."""

from splitfed.cli.application import app, main
from splitfed.cli.daemons import agent, demo, server
from splitfed.cli.privacy import audit, ledger
from splitfed.cli.results import generate

for command in (server, agent, demo, generate, audit, ledger):  # in the order of the help
    app.command()(command)

__all__ = ["app", "main"]
