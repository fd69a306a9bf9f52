"""The files that the notebook on fleets ends in, given to a server and to an agent for each device."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from daemons import Daemons
from planned_runs import free_ports

from splitfed.config import load_server_config

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_plan_a_fleet.ipynb"
NEEDED = "setup", "devices", "plans", "files"
"""Cells that the files come from; the others plot."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Make the files as the notebook does."""
    matplotlib.use("Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    with matplotlib.rc_context():
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["id"] in NEEDED:
                exec("".join(cell["source"]), names)
    written: list[Path] = names["written"]
    return written


def test_the_files_of_the_notebook_on_fleets_make_a_run(
    planned: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server, *agents = planned
    assert [file.name for file in agents] == ["agent-phone.toml", "agent-jetson.toml", "agent-laptop.toml"]
    config, (port,) = load_server_config(server), free_ports(1)
    server.write_text(f'{server.read_text()}\n[server]\naddress = "127.0.0.1:{port}"\n')
    for file in agents:
        file.write_text(file.read_text().replace(config.server.address, f"127.0.0.1:{port}"))
    with Daemons(tmp_path) as daemons:
        daemons.start("server", server, "server")
        daemons.wait_for(config.run.directory / "address")
        for file in agents:
            daemons.start(file.stem, file, "agent")
        daemons.wait()
    for name in ("phone", "jetson", "laptop"):
        lines = (server.parent / f"state-{name}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2]
