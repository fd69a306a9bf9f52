"""From a TOML file to a checked configuration, or to one sentence that says what is wrong with it."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from splitfed.config.agent import AgentConfig
from splitfed.config.explain import explain
from splitfed.config.section import Section
from splitfed.config.server import ServerConfig
from splitfed.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Section)
_OTHERS: dict[type[Section], dict[str, type[Section]]] = {
    ServerConfig: {"agent": AgentConfig},
    AgentConfig: {"server": ServerConfig},
}


def load_server_config(path: Path | str) -> ServerConfig:
    """Read a server's configuration; relative paths in it start at the file's own folder.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a value that is not allowed.
    """
    return _load(Path(path), ServerConfig)


def load_agent_config(path: Path | str) -> AgentConfig:
    """Read an agent's configuration; relative paths in it start at the file's own folder.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a value that is not allowed.
    """
    return _load(Path(path), AgentConfig)


def _load(path: Path, config_class: type[ConfigT]) -> ConfigT:
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the configuration's path with --config") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (at byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}; correct it there") from error
    try:
        return config_class.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, config_class, **_OTHERS[config_class])}") from error
