"""An update that is refused costs its agent the round, and neither the agent nor the run."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from splitfed.agent.prepare import Prepared
from splitfed.config import ServerConfig
from splitfed.errors import ServerUnreachable
from tests.service.conftest import server_config, write_texts
from tests.service.local import LocalServer, agent_config, serving, start_agent

VARIANTS = ["sflv1", "sflv2", "parallel", "async"]


def small_run(folder: Path, variant: str, refuse_norm: float) -> ServerConfig:
    for rows, name in enumerate("ab", start=5):
        write_texts(folder / f"{name}.jsonl", name, rows)
    return server_config(
        folder,
        training={"rounds": 2, "local_steps": 2},
        federation={"agents": 2, "agent_timeout_s": 300, "variant": variant},
        aggregation={"lora": "factors", "refuse_norm": refuse_norm},
    )


def start_both(folder: Path, server: LocalServer, **agent: Any) -> list[Any]:
    configs = [agent_config(folder, name, server.address, folder / f"{name}.jsonl", **agent) for name in "ab"]
    return [start_agent(config) for config in configs]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_agent_whose_update_is_refused_takes_part_in_the_next_round(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update = Prepared.update

    def too_long(self: Prepared, start: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        own = update(self, start, round)
        is_odd = threading.current_thread().name == "a" and round == 1
        return {name: tensor + 100.0 * is_odd for name, tensor in own.items()}

    monkeypatch.setattr(Prepared, "update", too_long)
    config = small_run(tmp_path, variant, refuse_norm=100.0)
    with caplog.at_level("INFO", "splitfed"), serving(config) as server:
        for ended in start_both(tmp_path, server):
            ended.result(120)
        server.ended.result(20)
    first, second = lines(config.run.directory)
    assert first["refused"]["a"].endswith("above refuse_norm = 100.")
    assert (list(first["agents"]), list(second["agents"])) == (["b"], ["a", "b"])
    said = "round 1 goes on without this agent, which takes part in the next one: its update is refused. "
    assert said + first["refused"]["a"] in caplog.messages
    assert "not here" not in caplog.text  # its optimiser goes on from what the server has counted
    assert [line.get("refused") for line in lines(tmp_path / "a")] == [first["refused"]["a"], None]


def test_a_run_that_refuses_everyone_ends_and_goes_on_with_a_raised_norm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(tmp_path, "sflv1", refuse_norm=1e-6)
    with serving(config) as server:
        ended = start_both(tmp_path, server, retry_for_s=0)
        server.ended.result(60)
        for agent in ended:
            with pytest.raises(ServerUnreachable):
                agent.result(60)
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert error.getMessage().startswith(
        "round 1 cannot have its quorum of 1, for the updates of a, b were refused (The change has an L2 norm of "
    )
    assert "raise aggregation.refuse_norm and start the server again with --resume" in error.getMessage()
    with serving(small_run(tmp_path, "sflv1", refuse_norm=100.0), resume=True) as server:
        for agent in start_both(tmp_path, server):
            agent.result(120)
    assert [list(line["agents"]) for line in lines(config.run.directory)] == [["a", "b"]] * 2
