"""A server and agents in this process, each in a thread: real gRPC on loopback, without the cost of new processes."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rich.console import Console

from splitfed.agent.loop import Agent
from splitfed.agent.progress import Progress
from splitfed.agent.state import AgentState
from splitfed.config import AgentConfig, AgentPrivacySection, AgentSection, DataSection, ServerConfig
from splitfed.server.daemon import Daemon
from splitfed.server.main import open_daemon

START_S = 60.0
END_S = 120.0


class LocalServer:
    """A server daemon in a thread.

    Attributes:
        daemon: The daemon.
        address: Where it listens.
        ended: Done when it has stopped serving.
    """

    def __init__(self, config: ServerConfig, *, resume: bool = False) -> None:
        daemon = open_daemon(config, resume=resume)
        assert daemon is not None
        self.daemon: Daemon = daemon
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        file = config.run.directory / "address"
        file.unlink(missing_ok=True)
        self.ended: Future[None] = in_thread("server", self._serve)
        waited = threading.Event()
        for _ in range(int(START_S / 0.01)):
            if file.exists() or self.ended.done():
                break
            waited.wait(0.01)
        if self.ended.done():
            self.ended.result()
        self.address = file.read_text().strip()

    def stop(self) -> None:
        """Ask it to stop, and wait until it has."""
        with contextlib.suppress(RuntimeError):  # of a loop that has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self.ended.result(END_S)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self.daemon.serve(self._stop))
        finally:
            self._loop.close()


@contextlib.contextmanager
def serving(config: ServerConfig, *, resume: bool = False) -> Iterator[LocalServer]:
    """Serve a run for as long as the block lasts."""
    server = LocalServer(config, resume=resume)
    try:
        yield server
    finally:
        server.stop()


def agent_config(
    folder: Path,
    name: str,
    address: str,
    data: Path,
    *,
    privacy: AgentPrivacySection | None = None,
    base: str | None = None,
    **agent: Any,
) -> AgentConfig:
    """Configure an agent whose state is in a folder of its name; noise is off unless a policy is given."""
    return AgentConfig(
        agent=AgentSection(name=name, server=address, state_directory=folder / name, base=base, **agent),
        data=DataSection(path=str(data)),
        privacy=privacy or AgentPrivacySection(noise_multiplier=0.0),
    )


def run_agent_here(config: AgentConfig) -> None:
    """Run an agent to its end in this thread."""
    state = AgentState(config.agent.state_directory)
    try:
        agent = Agent(config, state, Progress(Console(quiet=True)))
        try:
            agent.run()
        finally:
            agent.close()
    finally:
        state.close()


def start_agent(config: AgentConfig) -> Future[None]:
    """Run an agent in a thread; the future is done when it has ended."""
    return in_thread(config.agent.name, lambda: run_agent_here(config))


def in_thread(name: str, work: Callable[[], None]) -> Future[None]:
    """Work in a thread that keeps no process alive; the future is done when the work is."""
    ended: Future[None] = Future()

    def live() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the future
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=live, name=name, daemon=True).start()
    return ended


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    """Look again and again until something is so."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not is_so():
        assert time.monotonic() < deadline_s, "it never came to that"
        pause.wait(0.005)
