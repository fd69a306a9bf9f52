"""Fine-tune a language model split between devices that hold the text and a server that holds the compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from splitfed.config import AgentConfig, ServerConfig, load_agent_config, load_server_config
    from splitfed.errors import SplitFedError
    from splitfed.models.partition import partition

_HOMES = {
    "AgentConfig": "splitfed.config",
    "ServerConfig": "splitfed.config",
    "SplitFedError": "splitfed.errors",
    "load_agent_config": "splitfed.config",
    "load_server_config": "splitfed.config",
    "partition": "splitfed.models.partition",
}

__all__ = [
    "AgentConfig",
    "ServerConfig",
    "SplitFedError",
    "__version__",
    "load_agent_config",
    "load_server_config",
    "partition",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'splitfed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
