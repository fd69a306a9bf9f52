from pathlib import Path

import pytest

from splitfed.config import load_server_config
from splitfed.errors import ConfigError

SERVER = '[run]\ndirectory = "run"\n[model]\nbase = "demo"\n'


def test_nothing_is_generated_unless_the_operator_says_so(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(SERVER)
    assert not load_server_config(file).generation.enabled


def test_generation_is_no_part_of_what_makes_a_run(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(SERVER)
    before = load_server_config(file).shared_json()
    file.write_text(f"{SERVER}[generation]\nenabled = true\nmax_tokens = 9\n")
    assert load_server_config(file).shared_json() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_tokens = 1", "generation.max_tokens must be at least 2"),
        ("max_streams = 0", "generation.max_streams must be at least 1"),
        ("max_streams = 5000", "generation.max_streams must be at most 1024"),
        ("idle_timeout_s = 0", "generation.idle_timeout_s must be above 0"),
        ("max_stream = 3", "did you mean generation.max_streams?"),
        ("enabled = 1", "generation.enabled must be true or false"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f"{SERVER}[generation]\n{line}\n")
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load_server_config(file)
