"""Settings under which nothing would be protected, or which contradict each other, are refused where they are read."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from splitfed.config import AgentConfig, ServerConfig, load_agent_config, load_server_config
from splitfed.errors import ConfigError

AGENT = """
    [agent]
    name = "a"
    state_directory = "state"
    [data]
    path = "a.txt"
    [privacy]
"""
SERVER = """
    [run]
    directory = "run"
    [model]
    base = "demo"
    [privacy]
"""

Read = Callable[[str], AgentConfig | ServerConfig]


@pytest.fixture
def agent(tmp_path: Path) -> Callable[[str], AgentConfig]:
    def read(privacy: str) -> AgentConfig:
        (tmp_path / "agent.toml").write_text(textwrap.dedent(AGENT) + privacy)
        return load_agent_config(tmp_path / "agent.toml")

    return read


@pytest.fixture
def server(tmp_path: Path) -> Callable[[str], ServerConfig]:
    def read(privacy: str) -> ServerConfig:
        (tmp_path / "server.toml").write_text(textwrap.dedent(SERVER) + privacy)
        return load_server_config(tmp_path / "server.toml")

    return read


def sentence(read: Read, privacy: str) -> str:
    """What a person is told about a section, without the file's name."""
    with pytest.raises(ConfigError) as refusal:
        read(privacy)
    said = str(refusal.value)
    assert "\n" not in said
    return said.split(".toml: ", 1)[1]


# Noise that is none


@pytest.mark.parametrize("key", ["noise_multiplier", "noise_multiplier_adapter", "least_noise_multiplier"])
@pytest.mark.parametrize("value", ["1e-300", "9e-7", "2e6", "1e29", "1e300"])
def test_noise_that_rounds_away_or_swamps_everything_is_refused(
    agent: Callable[[str], AgentConfig], key: str, value: str
) -> None:
    assert sentence(agent, f"{key} = {value}").startswith(f"privacy.{key} ")


def test_noise_at_its_bounds_and_none_at_all_are_taken(agent: Callable[[str], AgentConfig]) -> None:
    for value in ("1e-6", "1e6", "0"):
        assert agent(f"noise_multiplier = {value}").privacy.noise_multiplier == float(value)


def test_what_rounds_away_is_said_to(server: Callable[[str], ServerConfig]) -> None:
    said = "privacy.noise_multiplier is 1e-300, which would round away; give 1e-06 or more, or 0 for no noise"
    assert sentence(server, "noise_multiplier = 1e-300").startswith(said)


@pytest.mark.parametrize("value", ["1e30", "1e-30", "0"])
def test_an_eta_that_no_noise_has_is_refused(server: Callable[[str], ServerConfig], value: str) -> None:
    assert sentence(server, f'smashed = "metric"\neta = {value}').startswith("privacy.eta must be at ")


# One file, two minds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epsilon = 9\nepsilon_budget = 8", "epsilon = 9 is more than epsilon_budget = 8, so no run would reach its"),
        (
            "noise_multiplier = 0.01\nleast_noise_multiplier = 0.1",
            "noise_multiplier = 0.01 is less than least_noise_multiplier = 0.1; raise the one, or lower the other",
        ),
        ("noise_multiplier = 0\nleast_noise_multiplier = 0.1", "noise_multiplier = 0 is less than"),
        ("noise_multiplier_adapter = 0.01\nleast_noise_multiplier = 0.1", "noise_multiplier_adapter = 0.01 is less"),
        ('adapter = "none"\nepsilon_budget = 8', 'epsilon_budget is 8, but with adapter = "none" no budget can be'),
        (
            'smashed = "metric"\neta = 1\nepsilon_budget = 8',
            'epsilon_budget is 8, but with smashed = "metric" no budget can be kept; choose another protection',
        ),
        (
            'adapter = "none"\nprotected_channels = ["smashed", "adapter"]',
            'protected_channels has "adapter", which adapter = "none" leaves open; take it out, or choose another',
        ),
        ('smashed = "metric"\neta = 1\nprotected_channels = ["smashed"]', 'protected_channels has "smashed", which'),
        (
            'noise_multiplier = 0\nprotected_channels = ["output_gradient"]',
            'protected_channels has "output_gradient", which noise_multiplier = 0 leaves open',
        ),
        (
            "clipping_norm_smashed = 3\nlargest_clipping_norm_smashed = 2",
            "clipping_norm_smashed = 3 is more than largest_clipping_norm_smashed = 2; lower the one, or raise",
        ),
    ],
)
def test_an_agent_s_file_that_contradicts_itself_is_refused_before_anybody_is_joined(
    agent: Callable[[str], AgentConfig], text: str, said: str
) -> None:
    assert sentence(agent, text).startswith(f"[privacy] {said}")


@pytest.mark.parametrize(
    "text",
    [
        "epsilon = 8\nepsilon_budget = 8",
        "noise_multiplier = 0.1\nleast_noise_multiplier = 0.1",
        "noise_multiplier = 0",
        'adapter = "none"\nprotected_channels = ["smashed"]',
        "largest_clipping_norm_output_gradient = 1e-3",
    ],
)
def test_what_goes_together_is_taken(agent: Callable[[str], AgentConfig], text: str) -> None:
    agent(text)


def test_settings_of_noise_that_is_off_are_refused(server: Callable[[str], ServerConfig]) -> None:
    off = "has no meaning with noise_multiplier = 0, which turns off all noise; leave one of them out"
    assert sentence(server, 'smashed = "metric"\neta = 1\nnoise_multiplier = 0') == f"[privacy] eta {off}"
    assert sentence(server, "denoise = true\nnoise_multiplier = 0") == f"[privacy] denoise {off}"


def test_a_key_of_the_other_side_s_file_is_sent_there(
    server: Callable[[str], ServerConfig], agent: Callable[[str], AgentConfig]
) -> None:
    there = "it belongs in the agent's configuration, so move it there"
    assert sentence(server, "epsilon_budget = 8") == f"unknown key privacy.epsilon_budget; {there}"
    assert sentence(server, "[agent]\nname = 'a'") == f"unknown key agent; {there}"
    assert sentence(agent, "[training]\nrounds = 3").startswith("unknown key training; it belongs in the server's")
    assert sentence(server, "epsilon_budge = 8").startswith("unknown key privacy.epsilon_budge; did you mean ")
