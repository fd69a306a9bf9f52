"""What stands in services/ and docs/operations.md is true of the code."""

import configparser
import re
import shlex
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from splitfed import cli
from splitfed.config import AgentConfig, ServerConfig, load_agent_config, load_server_config

DAEMONS = ["server", "agent"]
CONFIG_CLASSES: dict[str, type[BaseModel]] = {"server": ServerConfig, "agent": AgentConfig}
LOADERS: dict[str, Callable[[Path], BaseModel]] = {"server": load_server_config, "agent": load_agent_config}


def dockerfile(root: Path, daemon: str) -> list[tuple[str, str]]:
    """Give the instructions of a Dockerfile and their arguments."""
    text = (root / "services" / daemon / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def unit(root: Path, daemon: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((root / "services" / daemon / f"splitfed-{daemon}.service").read_text())
    return parser


def key_rows(config_class: type[BaseModel]) -> list[str]:
    """Give the documentation's row for each key: name, default, meaning."""
    rows = []
    for name, field in config_class.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
        for key, value in section.model_fields.items():
            default = "" if value.is_required() else repr(value.get_default(call_default_factory=True))
            default = "required" if value.is_required() else f"`{default}`".replace("'", '"')
            default = {"`None`": "", "`True`": "`true`", "`False`": "`false`"}.get(default, default)
            meaning = " ".join((value.description or "").split())
            rows.append(f"| `{name}.{key}` | {default} | {meaning}{allowed_values(value.annotation, meaning)} |")
    return rows


def allowed_values(annotation: object, meaning: str) -> str:
    """Give the sentence that lists what a key may be set to, unless its meaning names every value already."""
    if typing.get_origin(annotation) is typing.Literal:
        values = [f'"{value}"' for value in typing.get_args(annotation)]
        if all(value in meaning for value in values):
            return ""
        return f" One of {', '.join(values[:-1])} and {values[-1]}."
    said = next((found for kind in typing.get_args(annotation) if (found := allowed_values(kind, meaning))), "")
    return said.replace(" One of", " Any of") if typing.get_origin(annotation) is list else said


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_example_is_read_by_the_real_loader(root: Path, daemon: str) -> None:
    LOADERS[daemon](root / "services" / daemon / f"{daemon}.toml")


def test_the_examples_are_for_two_machines_with_noise_on(root: Path) -> None:
    server = load_server_config(root / "services" / "server" / "server.toml")
    agent = load_agent_config(root / "services" / "agent" / "agent.toml")
    assert server.tls is not None
    assert agent.tls is not None
    assert server.server.address.rpartition(":")[2] == agent.agent.server.rpartition(":")[2]
    assert agent.agent.base == server.model.base
    assert agent.privacy.over(server.privacy).is_on
    assert server.privacy.adapter != "none"


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_container_runs_as_another_user_than_root(root: Path, daemon: str) -> None:
    instructions = dockerfile(root, daemon)
    users = [argument for instruction, argument in instructions if instruction == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert [instruction for instruction, _ in instructions].index("USER") < len(instructions) - 1


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_container_copies_what_the_build_needs_and_what_exists(root: Path, daemon: str) -> None:
    copied = [name for kind, words in dockerfile(root, daemon) if kind == "COPY" for name in words.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "splitfed"} == set(copied)
    ignore = (root / "services" / daemon / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (root / name).exists()
        assert f"!{name}" in ignore


@pytest.mark.parametrize("daemon", DAEMONS)
def test_container_and_unit_call_the_command_as_it_is(
    root: Path, daemon: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([daemon, "--help"])
    help_text = capsys.readouterr().out
    instructions = dict(dockerfile(root, daemon))
    words = re.findall(r'"([^"]+)"', instructions["ENTRYPOINT"] + instructions["CMD"])
    started = shlex.split(unit(root, daemon)["Service"]["ExecStart"])
    for command in (words, [Path(started[0]).name, *started[1:]]):
        assert command[:2] == ["splitfed", daemon]
        assert command[command.index("--config") + 1] == f"/etc/splitfed/{daemon}.toml"
        assert all(word in help_text for word in command if word.startswith("--"))


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_unit_does_not_restart_on_a_wrong_configuration_or_run_as_root(root: Path, daemon: str) -> None:
    service = unit(root, daemon)["Service"]
    assert service["RestartPreventExitStatus"] == "2 3"
    assert service["Restart"] == "on-failure"
    assert service["User"] not in ("root", "0")
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_example_writes_only_where_the_unit_lets_it(root: Path, daemon: str) -> None:
    state = Path("/var/lib") / unit(root, daemon)["Service"]["StateDirectory"].split()[0]
    config = LOADERS[daemon](root / "services" / daemon / f"{daemon}.toml")
    written = config.run.directory if isinstance(config, ServerConfig) else config.agent.state_directory  # type: ignore[attr-defined]
    assert written.is_relative_to(state)


@pytest.mark.parametrize("daemon", DAEMONS)
def test_every_key_stands_in_the_manual_with_its_default_and_meaning(root: Path, daemon: str) -> None:
    manual = (root / "docs" / "operations.md").read_text().splitlines()
    assert [row for row in key_rows(CONFIG_CLASSES[daemon]) if row not in manual] == []


@pytest.mark.parametrize(
    ("key", "default", "allowed"),
    [
        ("agent.personal", "`[]`", 'Any of "bottom" and "top".'),
        ("training.schedule", '`"linear"`', 'One of "constant", "constant_with_warmup", "linear" and "cosine".'),
        ("codecs.adapter", '`"none"`', 'One of "none", "bf16", "fp16" and "int8".'),
        ("aggregation.server_optimiser", "", 'One of "fedavgm", "fedadam" and "fedyogi".'),
        ("aggregation.lora", "", 'One of "factors", "ffa", "flora", "flexlora" and "alternating".'),
        ("privacy.protected_channels", "", 'Any of "smashed", "output_gradient" and "adapter".'),
        ("model.dtype", '`"float32"`', 'One of "float32", "bfloat16" and "float16".'),
    ],
)
def test_the_manual_says_what_a_key_may_be_set_to(root: Path, key: str, default: str, allowed: str) -> None:
    manual = (root / "docs" / "operations.md").read_text()
    assert "Pydantic" not in manual
    (row,) = [row for row in manual.splitlines() if row.startswith(f"| `{key}` | {default} | ")]
    assert row.endswith(f" {allowed} |")


def test_no_key_stands_in_the_manual_that_does_not_exist(root: Path) -> None:
    manual = (root / "docs" / "operations.md").read_text()
    stated = set(re.findall(r"^\| `([a-z]+\.[a-z_0-9]+)` \|[^|]*\|[^|]*\|$", manual, re.MULTILINE))
    existing = {row.split("`")[1] for config_class in CONFIG_CLASSES.values() for row in key_rows(config_class)}
    assert stated == existing


@pytest.mark.parametrize("path", ["docs/operations.md", "services/server/README.md", "services/agent/README.md"])
def test_links_between_the_manuals_lead_somewhere(root: Path, path: str) -> None:
    text = (root / path).read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert targets
    for target in targets:
        assert ((root / path).parent / target).exists(), target
