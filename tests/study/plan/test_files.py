"""A choice as configuration: what is written is what server and agents accept, and says what was chosen."""

from dataclasses import replace
from pathlib import Path

import pytest

from splitfed.config import ServerConfig, load_agent_config, load_server_config
from splitfed.errors import ConfigError, OutputError
from splitfed.study.cost import SplitPoint
from splitfed.study.plan import agent_config, server_config, write_files
from splitfed.study.plan.files import agent_name
from tests.study.plan.test_choice import PLAN

RUN = ServerConfig.model_validate(
    {"run": {"directory": "run"}, "model": {"base": "demo"}, "training": {"local_steps": 7}, "lora": {"alpha": 4.0}}
)
PHONE = replace(PLAN, split_point=SplitPoint(0, 1), rank=4)
LAPTOP = replace(PLAN, split_point=SplitPoint(2, 1), rank=16)


def written(folder: Path, chosen: dict[str, object], run: ServerConfig = RUN) -> list[Path]:
    server = server_config(run, chosen, agents=len(chosen))  # type: ignore[arg-type]
    files = {"server.toml": (server, "Expected: little.")}
    for name, plan in chosen.items():
        agent = agent_config(name, plan, server, address="127.0.0.1:50151", data="data.jsonl")  # type: ignore[arg-type]
        files[f"agent-{name}.toml"] = (agent, "")  # type: ignore[assignment]
    return write_files(folder, files)


def test_one_device_s_plan_is_the_run_s(tmp_path: Path) -> None:
    server_file, agent_file = written(tmp_path / "new", {"phone": PHONE})
    server, agent = load_server_config(server_file), load_agent_config(agent_file)
    assert (server.model.bottom_blocks, server.model.top_blocks, server.lora.rank) == (0, 1, 4)
    assert server.model.least_bottom_blocks is server.lora.least_rank is None
    assert (server.lora.alpha, server.training.local_steps) == (2.0, 7)  # alpha ÷ rank is as it was
    assert {server.codecs.smashed, server.codecs.smashed_gradient} == {"int8"}
    assert (server.privacy.noise_multiplier, agent.privacy.least_noise_multiplier) == (0.002, 0.002)
    assert (agent.agent.bottom_blocks, agent.agent.rank) == (None, None)
    assert server_file.read_text().startswith("# Expected: little.\n\n[run]\n")


def test_a_fleet_s_run_allows_what_each_device_takes_for_itself(tmp_path: Path) -> None:
    server_file, phone_file, laptop_file = written(tmp_path, {"phone": PHONE, "laptop": LAPTOP})
    server = load_server_config(server_file)
    assert (server.model.bottom_blocks, server.model.least_bottom_blocks) == (2, 0)
    assert (server.model.top_blocks, server.model.least_top_blocks) == (1, None)
    assert (server.lora.rank, server.lora.least_rank, server.federation.agents) == (16, 4, 2)
    phone, laptop = (load_agent_config(file).agent for file in (phone_file, laptop_file))
    assert (phone.bottom_blocks, phone.top_blocks, phone.rank) == (0, None, 4)
    assert (laptop.bottom_blocks, laptop.rank) == (None, None)
    run = server.shared()
    run.check_rank(phone.rank or 0)


def test_a_plan_without_noise_is_one_that_the_owner_agrees_to_in_writing(tmp_path: Path) -> None:
    _, agent_file = written(tmp_path, {"phone": replace(PHONE, noise_multiplier=0.0)})
    assert load_agent_config(agent_file).privacy.noise_multiplier == 0.0


def test_the_run_s_own_epsilon_gives_way_to_the_noise_that_keeps_it() -> None:
    run = ServerConfig.model_validate(
        {**RUN.model_dump(exclude_unset=True), "privacy": {"epsilon": 8.0, "delta": 1e-6}}
    )
    found = server_config(run, {"phone": PHONE}, agents=1).privacy
    assert (found.epsilon, found.noise_multiplier, found.delta) == (None, 0.002, 1e-6)


def test_what_exists_is_left_alone_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / "agent-phone.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"agent-phone\.toml: exists already; give --output another folder"):
        written(tmp_path, {"phone": PHONE})
    assert [file.name for file in tmp_path.iterdir()] == ["agent-phone.toml"]


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written to .*; give --output another folder"):
        written(tmp_path / "file" / "new", {"phone": PHONE})


def test_settings_of_the_run_that_contradict_the_plan_are_named() -> None:
    run = ServerConfig.model_validate(
        {
            **RUN.model_dump(exclude_unset=True),
            "privacy": {"smashed": "token"},
            "model": {"base": "demo", "bottom_blocks": 0},
        }
    )
    with pytest.raises(ConfigError, match=r"the plan and the run's settings: .*smashed"):
        server_config(run, {"laptop": LAPTOP}, agents=1)


@pytest.mark.parametrize(
    ("device", "name"),
    [("Pixel 8 (Anna's)", "pixel-8-anna-s"), ("phone", "phone"), ("ΦΩΝΗ", "device"), ("x" * 200, "x" * 64)],
)
def test_an_agent_is_called_after_its_device(device: str, name: str) -> None:
    assert agent_name(device) == name
