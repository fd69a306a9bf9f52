"""Fine-tune a language model split between devices that hold the text and a server that holds the compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from splitfed.assets import base_model_folder
    from splitfed.config import (
        AgentConfig,
        AggregationSection,
        CodecSection,
        FederationSection,
        LoraSection,
        ServerConfig,
        TrainingSection,
        load_agent_config,
        load_server_config,
    )
    from splitfed.errors import SplitFedError
    from splitfed.models.partition import partition
    from splitfed.training.simulate import simulate

_HOMES = {
    "AgentConfig": "splitfed.config",
    "AggregationSection": "splitfed.config",
    "CodecSection": "splitfed.config",
    "FederationSection": "splitfed.config",
    "LoraSection": "splitfed.config",
    "ServerConfig": "splitfed.config",
    "SplitFedError": "splitfed.errors",
    "TrainingSection": "splitfed.config",
    "base_model_folder": "splitfed.assets",
    "load_agent_config": "splitfed.config",
    "load_server_config": "splitfed.config",
    "partition": "splitfed.models.partition",
    "simulate": "splitfed.training.simulate",
}

__all__ = [
    "AgentConfig",
    "AggregationSection",
    "CodecSection",
    "FederationSection",
    "LoraSection",
    "ServerConfig",
    "SplitFedError",
    "TrainingSection",
    "__version__",
    "base_model_folder",
    "load_agent_config",
    "load_server_config",
    "partition",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'splitfed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
