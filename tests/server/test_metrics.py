"""What Prometheus reads from a running server."""

import socket
import urllib.request
from pathlib import Path

import pytest

from splitfed.errors import AddressInUse
from tests.service.conftest import server_config, write_texts
from tests.service.local import agent_config, serving, start_agent, wait_until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_figures_of_a_running_server(tmp_path: Path) -> None:
    port = free_port()
    config = server_config(tmp_path, server={"metrics_port": port}, federation={"agents": 2})
    data = write_texts(tmp_path / "a.jsonl", "a", 4)

    def figures() -> dict[str, float]:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    with serving(config) as server:
        first = start_agent(agent_config(tmp_path, "a", server.address, data))
        wait_until(lambda: figures()["splitfed_agents_joined"] == 1)
        assert figures()["splitfed_round"] == 0
        assert figures()["splitfed_rounds"] == config.training.rounds
        assert figures()["splitfed_agents_selected"] == 0
        assert figures()['splitfed_agents_out_of_step_total{what="late"}'] == 0
        second = start_agent(agent_config(tmp_path, "b", server.address, data))
        wait_until(lambda: figures().get('splitfed_wire_bytes_total{agent="b",direction="up"}', 0) > 1000)
        first.result(60)
        second.result(60)


def test_a_metrics_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        config = server_config(tmp_path, server={"metrics_port": port})
        with pytest.raises(AddressInUse, match=f":{port}"), serving(config) as server:
            server.ended.result(30)
