"""Which commands there are, in the order of the help."""

from splitfed.cli.application import app
from splitfed.cli.daemons import agent, demo, server
from splitfed.cli.privacy import audit, ledger
from splitfed.cli.results import evaluate, export, generate, report
from splitfed.cli.study import plan, profile, sweep

for command in (server, agent, demo, evaluate, generate, export, report, plan, profile, sweep, audit, ledger):
    app.command()(command)

__all__ = ["app"]
