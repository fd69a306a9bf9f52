"""Configuration files: what is read, and the sentence for what cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from splitfed.config import (
    AgentConfig,
    RunConfig,
    ServerConfig,
    is_loopback,
    load_agent_config,
    load_server_config,
    parse_address,
    refuse_plain_text,
    to_toml,
)
from splitfed.errors import ConfigError

SERVER = '[run]\ndirectory = "runs/a"\n[model]\nbase = "demo"\n'
AGENT = '[agent]\nname = "a"\nstate_directory = "state"\n[data]\npath = "rows.csv"\n'


@pytest.fixture
def server(tmp_path: Path) -> Callable[[str], ServerConfig]:
    def load(text: str) -> ServerConfig:
        (tmp_path / "server.toml").write_text(text)
        return load_server_config(tmp_path / "server.toml")

    return load


@pytest.fixture
def agent(tmp_path: Path) -> Callable[[str], AgentConfig]:
    def load(text: str) -> AgentConfig:
        (tmp_path / "agent.toml").write_text(text)
        return load_agent_config(tmp_path / "agent.toml")

    return load


def sentence(load: Callable[[str], Any], text: str) -> str:
    """Load a file that is wrong and give what is said about it, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    said = str(caught.value)
    assert "\n" not in said
    assert ".toml: " in said
    return said.partition(".toml: ")[2]


def test_a_minimal_server_file_has_the_documented_defaults(
    server: Callable[[str], ServerConfig], tmp_path: Path
) -> None:
    config = server(SERVER)
    assert config.run.directory == tmp_path / "runs" / "a"
    assert config.run_id == "run"
    assert config.server.address == "127.0.0.1:50151"
    assert config.codecs.smashed == config.codecs.smashed_gradient == "int8"
    assert config.codecs.trunk_output == config.codecs.output_gradient == "int8"
    assert config.codecs.adapter == "none"
    assert config.lora.targets is None
    assert config.tls is None


def test_noise_is_on_unless_it_is_set_to_0(agent: Callable[[str], AgentConfig]) -> None:
    assert agent(AGENT).privacy.is_on is True
    assert agent(AGENT + "[privacy]\nnoise_multiplier = 0\n").privacy.is_on is False


def test_the_owner_s_word_outranks_the_run_s_and_what_is_left_out_is_the_run_s(
    server: Callable[[str], ServerConfig], agent: Callable[[str], AgentConfig]
) -> None:
    run = server(SERVER + "[privacy]\nnoise_multiplier = 0.5\nclipping_norm_smashed = 3.0\n").shared().privacy
    said = agent(AGENT + "[privacy]\nclipping_norm_smashed = 2.0\ndelta = 1e-5\n").privacy.over(run)
    assert (said.noise_multiplier, said.clipping_norm_smashed) == (0.5, 2.0)
    said = agent(AGENT + "[privacy]\nepsilon = 8.0\n").privacy.over(run)
    assert (said.noise_multiplier, said.epsilon, said.clipping_norm_smashed) == (None, 8.0, 3.0)
    said = agent(AGENT + "[privacy]\nnoise_multiplier = 0\n").privacy.over(said)
    assert (said.noise_multiplier, said.epsilon, said.is_on) == (0, None, False)


def test_delta_and_relation_are_the_owner_s_whatever_the_run_says(
    server: Callable[[str], ServerConfig], agent: Callable[[str], AgentConfig]
) -> None:
    """Else a run could make a budget mean nothing."""
    run = server(SERVER + '[privacy]\ndelta = 0.99\nrelation = "zero-out"\n').shared().privacy
    said = agent(AGENT + "[privacy]\nepsilon_budget = 3\n").privacy.over(run)
    assert (said.delta, said.relation) == (1e-5, "replace-one")
    said = agent(AGENT + '[privacy]\ndelta = 1e-6\nrelation = "zero-out"\n').privacy.over(
        server(SERVER).shared().privacy
    )
    assert (said.delta, said.relation) == (1e-6, "zero-out")


def test_what_does_not_go_together_with_the_run_is_refused(
    server: Callable[[str], ServerConfig], agent: Callable[[str], AgentConfig]
) -> None:
    run = server(SERVER).shared().privacy
    with pytest.raises(ValidationError, match="needs eta"):
        agent(AGENT).privacy.over(run.model_copy(update={"smashed": "metric"}))


@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ("[training]\nrouns = 3", "unknown key training.rouns; did you mean training.rounds?"),
        ("[trainig]\nrounds = 3", "unknown key trainig; did you mean training?"),
        ("[tls]\ncertficate = 'a'", "unknown key tls.certficate; did you mean tls.certificate?"),
        ("[codecs]\nzzz = 3", "unknown key codecs.zzz; [codecs] has smashed, trunk_output, output_gradient, "),
        ("[zzz]\n", "unknown key zzz; the file has run, model, lora, training, federation, codecs, aggregation, "),
        ("[training]\nrounds = '3'", "training.rounds must be an integer, but is the string '3'"),
        ("[training]\nrounds = 3.5", "training.rounds must be an integer, but is the number 3.5"),
        ("[training]\nrounds = true", "training.rounds must be an integer, but is the boolean true"),
        ("[training]\nrounds = 0", "training.rounds must be at least 1, but is the integer 0"),
        ("[training]\nrounds = [1]", "training.rounds must be an integer, but is the list [1]"),
        ("[training]\nlearning_rate = 0", "training.learning_rate must be above 0.0, but is the integer 0"),
        ("[training]\nlearning_rate = nan", "training.learning_rate must be a finite number, but is the number nan"),
        ("[training]\nlearning_rate = 'fast'", "training.learning_rate must be a number, but is the string 'fast'"),
        ("[training]\nmax_in_flight = 65", "training.max_in_flight must be at most 64, but is the integer 65"),
        ("[lora]\nrank = 0", "lora.rank must be at least 1, but is the integer 0"),
        ("[lora]\nleast_rank = 0", "lora.least_rank must be at least 1, but is the integer 0"),
        ("[lora]\nalpha = 0", "lora.alpha must be above 0.0, but is the integer 0"),
        ("[lora]\ndropout = 1", "lora.dropout must be below 1.0, but is the integer 1"),
        ("[lora]\ntargets = 'q_proj'", "lora.targets must be a list, but is the string 'q_proj'"),
        ("[lora]\ntargets = ['q_proj', 3]", "lora.targets[1] must be a string, but is the integer 3"),
        ("[lora]\ntargets = []", "lora.targets must be a list that is not empty, but is the list []"),
        ("[federation]\nquorum = 2", "federation.quorum is 2, more than agents = 1: no round would ever be over"),
        (
            "[federation]\nagents = 4\ncohort = 2\nquorum = 3",
            "federation.quorum is 3, more than cohort = 2: no round would ever be over; lower it",
        ),
        (
            "[federation]\nagents = 3\npopulation = 2",
            "federation.population is 2, fewer than agents = 3; raise it, or leave it out",
        ),
        (
            "[federation]\nagents = 3\ncohort = 4",
            "federation.cohort is 4, more than may ever take part (3); lower it, or raise population",
        ),
        (
            "[federation]\nagents = 3\nover_selection = 1",
            "federation.over_selection is 1, but without a cohort everyone is asked; set cohort, or leave it out",
        ),
        (
            "[federation]\nagents = 3\ncohort = 2\nover_selection = 2",
            "federation.over_selection is 2, which with cohort = 2 asks more than may ever take part (3); lower it",
        ),
        ("[federation]\nstraggler_margin = 0.5", "federation.straggler_margin must be at least 1.0, but is the number"),
        ("[federation]\nlate_updates = 'keep'", "federation.late_updates must be 'drop' or 'merge', but is the string"),
        ("[codecs]\nsmashed = 'int4'", "codecs.smashed must be 'none', 'bf16', 'fp16' or 'int8', but is the"),
        ("[server]\naddress = 'localhost'", "server.address is 'localhost'; write host:port, such as 127.0.0.1:50151"),
        ("[tls]\nkey = 'a'\nauthority = 'b'", "tls.certificate is missing; add it: This daemon's certificate"),
        (
            "[training]\nbatch_size = 8\nmicro_batch_size = 3",
            "training.micro_batch_size is 3, which does not divide batch_size = 8; choose a divisor",
        ),
        (
            '[training]\nwarmup_steps = 5\nschedule = "constant"',
            'training.schedule is "constant", which has no warm-up, with warmup_steps = 5; set it to '
            '"constant_with_warmup", or leave warmup_steps out',
        ),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_of_a_server_is_named(
    server: Callable[[str], ServerConfig], addition: str, said: str
) -> None:
    assert sentence(server, SERVER + addition + "\n").startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nbase = 'demo'", "the section [run] is missing; add it with directory"),
        ("[run]\n[model]\nbase = 'demo'", "run.directory is missing; add it: Folder for the checkpoints"),
        ("[run]\ndirectory = 3\n[model]\nbase = 'demo'", "run.directory must be a path, written as a"),
        ("run = 3\n[model]\nbase = 'demo'", "run must be a table, but is the integer 3"),
        ("[run]\ndirectory = 'a'\nname = 'a b'\n[model]\nbase = 'demo'", "run.name must be 1 to 64 letters, digits"),
        ("[run]\ndirectory = 'a'\nname = '..'\n[model]\nbase = 'demo'", "run.name must be 1 to 64 letters, digits"),
        ("[run]\ndirectory = 'a'\n[model]\nbas = 'demo'", "unknown key model.bas; did you mean model.base?"),
        ("[run]\ndirectory = 'a'\n[model]\nbase = './gone'", "model.base is './gone', neither a folder"),
        ("[run\n", "is not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 5)"),
    ],
)  # fmt: skip
def test_a_wrong_server_file_is_explained(server: Callable[[str], ServerConfig], text: str, said: str) -> None:
    assert sentence(server, text).startswith(said)


@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ("[privacy]\nnoise_multiplier = -1", "privacy.noise_multiplier must be at least 0.0, but is the integer -1"),
        ("[privacy]\ndelta = 1", "privacy.delta must be below 1.0, but is the integer 1"),
        (
            "[privacy]\nnoise_multiplier = 0\nepsilon_budget = 3",
            "[privacy] epsilon_budget is 3, but without noise no budget can be kept; set noise_multiplier above 0",
        ),
        (
            "[privacy]\nnoise_multiplier = 1.0\nepsilon = 3",
            "[privacy] epsilon = 3 and noise_multiplier = 1 exclude each other; leave one of them out",
        ),
        ("[privacy]\nnoise_multiplier = nan", "privacy.noise_multiplier must be a finite number, but is the "),
        ("[privacy]\nepsilon = 3\ndenoise = true", "[privacy] denoise needs noise_multiplier in place of epsilon"),
        ("[privacy]\neta = 1.0", '[privacy] eta and smashed = "metric" belong together; give both or neither'),
        ('[privacy]\nsmashed = "metric"', '[privacy] smashed = "metric" needs eta'),
        ('[privacy]\nsample_rate = 0.1\nadapter = "none"', '[privacy] sample_rate needs adapter = "dp-sgd"'),
        ("[privacy]\nprotected_channels = ['loss']", "privacy.protected_channels[0] must be 'smashed'"),
        (
            "held_out_path = 'b.csv'\nheld_out_fraction = 0.1",
            "data.held_out_fraction is 0.1 although held_out_path is set; keep one of the two",
        ),
        ("held_out_fraction = 1.0", "data.held_out_fraction must be below 1.0, but is the number 1.0"),
        ("max_rows = 0", "data.max_rows must be at least 1, but is the integer 0"),
        ("format = 'xml'", "data.format must be 'auto', 'jsonl', 'csv', 'parquet', 'text' or 'hub', but is the string"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_of_an_agent_is_named(
    agent: Callable[[str], AgentConfig], addition: str, said: str
) -> None:
    assert sentence(agent, AGENT + addition + "\n").startswith(said)


@pytest.mark.parametrize("name", ["bottom_blocks", "top_blocks"])
def test_an_agent_cannot_choose_more_blocks_than_its_owner_allows(
    agent: Callable[[str], AgentConfig], name: str
) -> None:
    text = AGENT.replace("[data]", f"{name} = 2\n[data]")
    assert sentence(agent, f"{text}[privacy]\nmost_{name} = 1\n") == (
        f"[privacy] most_{name} is 1, but agent.{name} = 2 asks for more; raise the one, or lower the other"
    )
    assert getattr(agent(f"{text}[privacy]\nmost_{name} = 2\n").privacy, f"most_{name}") == 2


def test_an_agent_cannot_choose_a_rank_of_zero(agent: Callable[[str], AgentConfig]) -> None:
    text = AGENT.replace("[data]", "rank = 0\n[data]")
    assert sentence(agent, text).startswith("agent.rank must be at least 1, but is the integer 0")


def test_an_agent_cannot_be_told_to_connect_to_port_0(agent: Callable[[str], AgentConfig]) -> None:
    text = AGENT.replace("[data]", 'server = "127.0.0.1:0"\n[data]')
    assert sentence(agent, text).startswith("agent.server is '127.0.0.1:0', but a server cannot be reached at port 0")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; give the configuration's path with --config"):
        load_server_config(tmp_path / "gone.toml")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_agent_config(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b'[run]\nname = "caf\xe9"\n')
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(at byte 17\)"):
        load_server_config(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("path", "more", "is_file"),
    [
        ("rows.csv", "", True),
        ("rows.jsonl", "", True),
        ("./rows", "", True),
        ("a/b/c", "", True),
        ("owner/name", "", True),
        ("owner/name", "format = 'hub'", False),
        ("name", "format = 'hub'", False),
        ("rows", "format = 'csv'", True),
        ("owner/rows.csv", "format = 'hub'", False),
    ],
)  # fmt: skip
def test_data_is_a_file_beside_the_configuration_or_an_id_of_the_hub(
    agent: Callable[[str], AgentConfig], tmp_path: Path, path: str, more: str, is_file: bool
) -> None:
    config = agent(AGENT.replace("rows.csv", path) + more + "\n")
    assert config.data.path == (str((tmp_path / path).resolve()) if is_file else path)


def test_a_data_file_without_extension_is_found_where_it_exists(
    agent: Callable[[str], AgentConfig], tmp_path: Path
) -> None:
    (tmp_path / "rows").touch()
    assert agent(AGENT.replace("rows.csv", "rows")).data.path == str(tmp_path / "rows")


def test_held_out_rows_of_a_hub_data_set_can_be_a_file(agent: Callable[[str], AgentConfig], tmp_path: Path) -> None:
    config = agent(AGENT + "format = 'hub'\nheld_out_path = 'held_out.csv'\n")
    assert config.data.held_out_path == str(tmp_path / "held_out.csv")


@pytest.mark.parametrize(
    ("base", "is_folder"), [("model", True), ("gone", False), ("owner/model", False), ("demo", False)]
)
def test_a_base_is_a_folder_beside_the_configuration_or_an_id(
    server: Callable[[str], ServerConfig], tmp_path: Path, base: str, is_folder: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "demo").mkdir()
    config = server(SERVER.replace('"demo"', f'"{base}"'))
    assert config.model.base == (str(tmp_path / base) if is_folder else base)


def test_agents_are_told_the_run_and_nothing_about_the_servers_machine(
    server: Callable[[str], ServerConfig], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    config = server(SERVER.replace('"demo"', '"model"') + "[training]\nrounds = 7\n")
    told = RunConfig.model_validate_json(config.shared_json())
    assert told == config.shared()
    assert told.training == config.training
    assert told.run.name == config.run.name
    assert told.model.base == "model"
    assert str(tmp_path) not in config.shared_json()


def test_a_run_told_with_an_unknown_key_is_refused(server: Callable[[str], ServerConfig]) -> None:
    told = server(SERVER).shared_json().replace('"seed":0', '"seed":0,"sed":1')
    with pytest.raises(ValidationError, match="sed"):
        RunConfig.model_validate_json(told)


def test_a_configuration_does_not_change(server: Callable[[str], ServerConfig]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        server(SERVER).training.rounds = 5  # type: ignore[misc]


def test_a_configuration_that_is_written_is_read_back_equal_from_another_folder(
    server: Callable[[str], ServerConfig], agent: Callable[[str], AgentConfig], tmp_path: Path
) -> None:
    certificates = '[tls]\ncertificate = "a"\nkey = "b \\"\\\\ é\\u007f\\n😀"\nauthority = "c"\n'
    serving = server(SERVER + '[lora]\ntargets = ["q", "v"]\nalpha = 1e-30\n' + certificates)
    acting = agent(AGENT + "[privacy]\nnoise_multiplier = 0\n" + certificates)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "server.toml").write_text(to_toml(serving))
    (elsewhere / "agent.toml").write_text(to_toml(acting))
    assert load_server_config(elsewhere / "server.toml") == serving
    assert load_agent_config(elsewhere / "agent.toml") == acting


@pytest.mark.parametrize("config_class", [ServerConfig, AgentConfig])
def test_every_key_is_described(config_class: type[BaseModel]) -> None:
    for name, section in config_class.model_fields.items():
        section_class = next(
            kind
            for kind in (section.annotation, *getattr(section.annotation, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
        undescribed = [key for key, field in section_class.model_fields.items() if not field.description]
        assert undescribed == [], name


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:50151", "127.0.0.1", 50151),
        ("[::1]:1", "::1", 1),
        ("clinic-7.example.org:443", "clinic-7.example.org", 443),
        ("0.0.0.0:0", "0.0.0.0", 0),
    ],
)  # fmt: skip
def test_an_address_is_host_and_port(address: str, host: str, port: int) -> None:
    assert parse_address(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":1", "::1:50", "[::1]", "[host]:1", "host:65536", "http://host:1", "a b:1", "-a:1"],
)  # fmt: skip
def test_another_form_of_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is "):
        parse_address(address)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("LocalHost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
    ],
)  # fmt: skip
def test_only_addresses_of_this_machine_are_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_plain_text_beyond_this_machine_is_refused_unless_asked_for() -> None:
    refused = {"server.address": "127.0.0.1:1", "server.fed_address": "0.0.0.0:1"}
    with pytest.raises(ConfigError, match=r"server\.fed_address is '0\.0\.0\.0:1'.*or pass --insecure"):
        refuse_plain_text(refused, has_tls=False, insecure=False)
    refuse_plain_text(refused, has_tls=True, insecure=False)
    refuse_plain_text(refused, has_tls=False, insecure=True)
    refuse_plain_text({"server.address": "[::1]:1", "server.fed_address": None}, has_tls=False, insecure=False)
