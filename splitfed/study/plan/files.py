"""From a choice to the configuration files that server and agents are started with."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from splitfed.config import AgentConfig, ServerConfig, load_agent_config, load_server_config, to_toml
from splitfed.config.explain import explain
from splitfed.config.run import DIRECTIONS
from splitfed.errors import ConfigError, OutputError
from splitfed.study.plan.plans import Plan


def server_config(
    config: ServerConfig, chosen: Mapping[str, Plan], *, agents: int, address: str | None = None
) -> ServerConfig:
    """Put a choice into a server's configuration.

    Args:
        config: What the run is besides.
        chosen: A plan for each device.
        agents: Agents of the run.
        address: Where the server listens; None: as the configuration says.

    Raises:
        ConfigError: If the choice does not go together with it.
    """
    plans = list(chosen.values())
    most_bottom, most_top, most_rank = (max(each) for each in zip(*map(_own, plans), strict=True))
    least_bottom, least_top, least_rank = (min(each) for each in zip(*map(_own, plans), strict=True))
    sections = {name: section.model_dump(exclude_unset=True) for name, section in config if section is not None}
    codecs = {**sections.get("codecs", {}), **dict.fromkeys(DIRECTIONS, plans[0].codec)}
    model = {**sections["model"], "bottom_blocks": most_bottom, "top_blocks": most_top}
    lora = {**sections.get("lora", {}), "rank": most_rank, "alpha": config.lora.alpha / config.lora.rank * most_rank}
    for section, name, least, most in (
        (model, "least_bottom_blocks", least_bottom, most_bottom),
        (model, "least_top_blocks", least_top, most_top),
        (lora, "least_rank", least_rank, most_rank),
    ):
        section.pop(name, None)
        if least < most:
            section[name] = least
    privacy = {**sections.get("privacy", {}), "noise_multiplier": plans[0].noise_multiplier}
    privacy.pop("epsilon", None)
    federation = {**sections.get("federation", {}), "agents": agents}
    if address is not None:
        sections["server"] = {**sections.get("server", {}), "address": address}
    changed = {"model": model, "lora": lora, "codecs": codecs, "privacy": privacy, "federation": federation}
    try:
        return ServerConfig.model_validate({**sections, **changed})
    except ValidationError as error:
        raise ConfigError(f"the plan and the run's settings: {explain(error, ServerConfig)}") from error


def agent_config(name: str, plan: Plan, server: ServerConfig, *, address: str, data: str) -> AgentConfig:
    """Make the configuration of a device's agent.

    Args:
        name: Name of the agent.
        plan: Its plan.
        server: What its run is.
        address: Where it reaches the server.
        data: Its data.

    Raises:
        ConfigError: If a name or an address is not allowed.
    """
    agent: dict[str, Any] = {"name": name, "server": address, "state_directory": f"state-{name}"}
    run = server.model.bottom_blocks, server.model.top_blocks, server.lora.rank
    for key, own, of_run in zip(("bottom_blocks", "top_blocks", "rank"), _own(plan), run, strict=True):
        if own != of_run:
            agent[key] = own
    noise = plan.noise_multiplier
    privacy = {"least_noise_multiplier": noise} if noise else {"noise_multiplier": 0.0}
    sections: dict[str, Any] = {"agent": agent, "data": {"path": data}, "privacy": privacy}
    if server.tls is not None:  # a certificate of its own, of the same authority
        sections["tls"] = {"certificate": f"{name}.pem", "key": f"{name}.key", "authority": server.tls.authority.name}
    try:
        return AgentConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(f"the agent {name!r}: {explain(error, AgentConfig)}") from error


def agent_name(device: str) -> str:
    """Make an agent's name of a device's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", device).strip("-._")[:64].lower() or "device"


def write_files(folder: Path, files: Mapping[str, tuple[ServerConfig | AgentConfig, str]]) -> list[Path]:
    """Write configuration files, all or none, and read each back as a daemon does.

    Args:
        folder: Where to; made if it is not there.
        files: By name: the configuration, and what a comment above it says.

    Returns:
        The files.

    Raises:
        ConfigError: If one of them exists already, or could not be read by a daemon.
        OutputError: If the folder cannot be written to.
    """
    for name in files:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name}: exists already; give --output another folder, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".plan-") as drafts:
            for name, (config, comment) in files.items():
                lines = "".join(f"# {line}\n" for line in comment.splitlines())
                draft = Path(drafts) / name
                draft.write_text(f"{lines}\n{to_toml(config, with_defaults=False)}", encoding="utf-8")
                (load_server_config if isinstance(config, ServerConfig) else load_agent_config)(draft)
            return [(Path(drafts) / name).rename(folder / name) for name in files]
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror}); give --output another folder."
        ) from error


def _own(plan: Plan) -> tuple[int, int, int]:
    return plan.split_point.bottom_blocks, plan.split_point.top_blocks, plan.rank
