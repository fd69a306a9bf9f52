"""A run that is over, and a server that goes on serving it to its members."""

import contextlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfed.agent.server_calls import ServerCalls
from splitfed.agent.state import AgentState
from splitfed.config import AgentConfig, ServerConfig
from splitfed.models import canonical_config, resolve_base
from splitfed.privacy import read_ledger
from tests.service.conftest import server_config, write_texts
from tests.service.local import LocalServer, agent_config, run_agent_here, serving


@dataclass
class Served:
    """A server that generates with a run that is over."""

    folder: Path
    config: ServerConfig
    server: LocalServer

    def agent(self, name: str = "a", **own: Any) -> AgentConfig:
        address = own.pop("address", self.server.address)
        return agent_config(self.folder, name, address, self.folder / "a.jsonl", **own)

    def member(self, name: str, **own: Any) -> AgentConfig:
        """Let a further agent join, which never trains."""
        config = self.agent(name, **own)
        state = AgentState(config.agent.state_directory)
        with closing(ServerCalls(self.server.address, None, None, client=name, agent_id=state.agent_id)) as calls:
            calls.join("small", canonical_config(resolve_base("demo")), {}, weight=1)
        state.close()
        return config

    def ledger(self, name: str) -> list[Any]:
        return read_ledger(self.folder / name / "ledger.jsonl").rows


@contextlib.contextmanager
def serving_a_finished_run(folder: Path) -> Iterator[Served]:
    """Let the agent "a" train two rounds, and serve what has come of it."""
    write_texts(folder / "a.jsonl", "a", 12)
    config = server_config(
        folder,
        federation={"agents": 1, "population": 12},
        training={"rounds": 2, "learning_rate": 0.03},
        generation={"enabled": True},
    )
    with serving(config) as server:
        run_agent_here(agent_config(folder, "a", server.address, folder / "a.jsonl"))
    with serving(config, resume=True) as server:
        yield Served(folder, config, server)
