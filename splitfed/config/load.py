"""The configuration files of the daemons."""

from pathlib import Path

from splitfed.config.agent import AgentConfig
from splitfed.config.server import ServerConfig
from splitfed.config.toml_file import read_toml

_IF_MISSING = "give the configuration's path with --config"


def load_server_config(path: Path | str) -> ServerConfig:
    """Read a server's configuration; relative paths in it start at the file's own folder.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a value that is not allowed.
    """
    return read_toml(path, ServerConfig, if_missing=_IF_MISSING, agent=AgentConfig)


def load_agent_config(path: Path | str) -> AgentConfig:
    """Read an agent's configuration; relative paths in it start at the file's own folder.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a value that is not allowed.
    """
    return read_toml(path, AgentConfig, if_missing=_IF_MISSING, server=ServerConfig)
