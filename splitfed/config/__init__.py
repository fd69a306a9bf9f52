"""The run file: what a server and an agent are told, checked before anything heavy is imported."""

from splitfed.config.address import is_loopback, parse_address, refuse_plain_text
from splitfed.config.agent import AgentConfig, AgentSection, DataSection
from splitfed.config.aggregation import AggregationSection, LoraRule
from splitfed.config.federation import FederationSection
from splitfed.config.generation import GenerationSection
from splitfed.config.load import load_agent_config, load_server_config
from splitfed.config.privacy import (
    DEFAULT_NOISE_MULTIPLIER,
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    AgentPrivacySection,
    ChannelName,
    PrivacySection,
    refuse_unsound,
)
from splitfed.config.run import (
    CodecName,
    CodecSection,
    LoraSection,
    ModelSection,
    RunConfig,
    RunIdentity,
    TrainingSection,
)
from splitfed.config.section import Section, TlsSection
from splitfed.config.server import RunSection, ServerConfig, ServerSection
from splitfed.config.write import to_toml

__all__ = [
    "DEFAULT_NOISE_MULTIPLIER",
    "LARGEST_NOISE_MULTIPLIER",
    "LEAST_NOISE_MULTIPLIER",
    "AgentConfig",
    "AgentPrivacySection",
    "AgentSection",
    "AggregationSection",
    "ChannelName",
    "CodecName",
    "CodecSection",
    "DataSection",
    "FederationSection",
    "GenerationSection",
    "LoraRule",
    "LoraSection",
    "ModelSection",
    "PrivacySection",
    "RunConfig",
    "RunIdentity",
    "RunSection",
    "Section",
    "ServerConfig",
    "ServerSection",
    "TlsSection",
    "TrainingSection",
    "is_loopback",
    "load_agent_config",
    "load_server_config",
    "parse_address",
    "refuse_plain_text",
    "refuse_unsound",
    "to_toml",
]
