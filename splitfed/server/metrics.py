"""Figures of a running server for Prometheus, on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from splitfed.errors import AddressInUse
from splitfed.server.coordinator import Coordinator

_HOST = "127.0.0.1"


@contextmanager
def exposed(coordinator: Coordinator, port: int | None) -> Iterator[None]:
    """Serve figures at ``http://127.0.0.1:port/metrics`` for as long as the block lasts.

    Args:
        coordinator: Whose run.
        port: The port; none: nothing is served.

    Raises:
        AddressInUse: If the port is taken.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    rounds = coordinator.rounds
    for name, text, read in (
        ("splitfed_round", "Rounds that are over", lambda: rounds.committed),
        ("splitfed_rounds", "Rounds of the run", lambda: rounds.rounds),
        ("splitfed_agents_joined", "Agents that are here", lambda: rounds.joined),
        ("splitfed_agents_selected", "Agents that the open round has asked", lambda: len(rounds.selected)),
        ("splitfed_agents_submitted", "Agents whose update of the open round is here", lambda: len(rounds.submitted)),
    ):
        Gauge(name, text, registry=registry).set_function(read)
    registry.register(_Traffic(coordinator))
    registry.register(_Happenings(coordinator))
    try:
        server, thread = start_http_server(port, addr=_HOST, registry=registry)
    except OSError as error:
        raise AddressInUse(
            f"Metrics cannot be served on {_HOST}:{port} ({error.strerror}); change [server] metrics_port."
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Traffic(Collector):
    """Bytes since the server started, by agent and direction."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Give the present counts."""
        family = CounterMetricFamily(
            "splitfed_wire_bytes", "Bytes on the wire, framing included", labels=["agent", "direction"]
        )
        for (client, direction), count in sorted(self._coordinator.figures.wire_bytes.items()):
            family.add_metric([client, direction], count)
        yield family


class _Happenings(Collector):
    """Agents to which something out of the ordinary happened in the rounds since the server started, by what it was."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Give the present counts."""
        family = CounterMetricFamily(
            "splitfed_agents_out_of_step",
            "Agents out of step with a round, as in metrics.jsonl",
            labels=["what"],
        )
        for what in ("late", "dropped", "merged", "replaced", "taken_out", "silent", "left", "refused", "left_out"):
            family.add_metric([what], self._coordinator.figures.happened[what])
        yield family
