"""`splitfed plan` at a terminal: what it prints, what it writes, and what it says of options that cannot be."""

import json
from importlib import resources
from pathlib import Path

import pytest

from splitfed import cli
from splitfed.config import load_agent_config, load_server_config
from splitfed.study.plan import device_classes, device_profile

FEW = ["--ranks", "8", "--codecs", "int8,none", "--most-blocks", "1"]
DEMO = ["--model", "demo", "--device", "phone", "--link", "20mbit,40ms", *FEW]


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Run the command, give what it printed where it is to print it."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    out = capsys.readouterr()
    assert (ended.value.code or 0) == status, out.err
    return out.err if status else out.out


def test_a_plan_is_a_table_with_the_choice_in_it_and_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *DEMO, "--max-step", "2s")
    assert text.count("→") == 2
    for part in (
        "loss cost",
        "--max-step 2 s rules out",
        "20/20 Mbit/s with 40 ms of round trip",
        "lower bounds on what leaks, never guarantees",
        "at delta 1e-05, unit sequence, relation replace-one",
    ):
        assert part in text


def test_json_has_every_figure_and_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *DEMO, "--noise", "0", "--json"))
    (chosen,) = found["chosen"].values()
    assert chosen["epsilon"] is None
    assert chosen in found["frontier"]["phone"]
    assert chosen["memory_bytes"] > 5e8
    assert "Infinity" not in json.dumps(found)


def test_what_is_written_is_read_by_both_daemons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    run.write_text('[run]\nname = "notes"\ndirectory = "runs"\n[model]\nbase = "demo"\n[training]\nlocal_steps = 3\n')
    devices = ["--device", "phone", "--device", "laptop", "--device", "laptop", "--link", "20mbit,40ms"]
    text = said(capsys, "--config", str(run), *devices, *FEW, "--output", str(tmp_path / "out"))
    names = ["agent-laptop-1.toml", "agent-laptop-2.toml", "agent-phone.toml", "server.toml"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    server = load_server_config(tmp_path / "out" / "server.toml")
    assert (server.run.name, server.run.directory, server.training.local_steps) == ("notes", tmp_path / "runs", 3)
    assert server.federation.agents == 3
    assert load_agent_config(tmp_path / "out" / "agent-laptop-2.toml").agent.name == "laptop-2"
    assert "start splitfed server" in text
    again = said(capsys, "--config", str(run), *devices, *FEW, "--output", str(tmp_path / "out"), status=2)
    assert "exists already" in again


def test_devices_whose_names_differ_in_case_alone_are_two_agents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (resources.files("splitfed.assets") / "profiles" / "phone.toml").read_text(encoding="utf-8")
    (tmp_path / "other.toml").write_text(text.replace('name = "phone"', 'name = "Phone"'))
    devices = ["--device", "phone", "--device", str(tmp_path / "other.toml"), "--link", "20mbit,40ms"]
    found = json.loads(said(capsys, "--model", "demo", *devices, *FEW, "--json"))
    assert found["chosen"].keys() == {"phone-1", "phone-2"}


def test_agents_are_told_where_the_server_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def addresses(name: str, *options: str) -> tuple[str, str]:
        said(capsys, "--device", "phone", "--link", "20mbit,40ms", *FEW, "--output", str(tmp_path / name), *options)
        server = load_server_config(tmp_path / name / "server.toml")
        agent = load_agent_config(tmp_path / name / "agent-phone.toml")
        assert (agent.tls is None) == (server.tls is None)
        return server.server.address, agent.agent.server

    assert addresses("a", "--model", "demo") == ("127.0.0.1:50151", "127.0.0.1:50151")
    assert addresses("b", "--model", "demo", "--address", "127.0.0.1:50177") == ("127.0.0.1:50177", "127.0.0.1:50177")
    outside = "server.example.org:50177"
    assert addresses("c", "--model", "demo", "--address", outside) == ("0.0.0.0:50177", outside)
    run = tmp_path / "run.toml"
    tls = '[tls]\ncertificate = "s.pem"\nkey = "s.key"\nauthority = "ca.pem"\n'
    run.write_text(f'[run]\ndirectory = "runs"\n[model]\nbase = "demo"\n[server]\naddress = "0.0.0.0:50199"\n{tls}')
    assert addresses("d", "--config", str(run), "--address", outside) == ("0.0.0.0:50199", outside)
    refused = [
        "--config",
        str(run),
        "--device",
        "phone",
        "--link",
        "20mbit,40ms",
        *FEW,
        "--output",
        str(tmp_path / "e"),
    ]
    assert "says nothing of where agents reach it; add --address" in said(capsys, *refused, status=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "demo"], "no device is given; add --device with a profile or a device class, or --measure"),
        (["--device", "phone"], "no model is given; add --model with a folder or a hub id, or --config"),
        (
            [*DEMO, "--device", "fridge"],
            "fridge: is neither a file nor one of the device classes jetson, laptop, phone",
        ),
        (["--model", "demo", "--device", "phone"], "the profile of phone has no link; add --link, such as 20mbit,40ms"),
        ([*DEMO, "--max-memory", "4"], "--max-memory is '4'; write a size with its unit, such as 4GB"),
        ([*DEMO, "--max-step", "fast"], "--max-step is 'fast'; write a time with its unit"),
        ([*DEMO, "--max-leakage", "20"], "--max-leakage is 20; give a number above 0 and at most 1"),
        ([*DEMO, "--epsilon", "-1"], "--epsilon is -1; give a number above 0"),
        ([*DEMO, "--ranks", "8,none"], "--ranks has 'none': input should be a valid integer"),
        ([*DEMO, "--codecs", "zip"], "--codecs has 'zip': input should be 'none', 'bf16', 'fp16' or 'int8'"),
        ([*DEMO, "--noise", "1e-9"], "--noise has '1e-9': is 1e-09, which would round away"),
        (
            [*DEMO, "--prefer", "luck"],
            "--prefer has 'luck': input should be 'loss', 'leakage', 'step', 'bytes' or 'memory'",
        ),
        ([*DEMO, "--dtype", "int8"], "--dtype has 'int8': input should be 'float32', 'bfloat16' or 'float16'"),
        ([*DEMO, "--examples", "0"], "--examples is 0; give 1 or more"),
        ([*DEMO, "--address", "here"], "--address is 'here'; write host:port"),
        (
            [*DEMO, "--max-memory", "10MB"],
            "--max-memory 10.0 MB rules out every plan: the least is",
        ),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_sentence_that_says_what_to_do(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, *options, status=2)
    assert sentence in " ".join(text.split())
    assert "Traceback" not in text


def test_a_model_that_is_not_there_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = said(capsys, "--model", "no/such", "--device", "phone", "--link", "1mbit,1ms", status=1)
    assert "The model 'no/such' is neither a folder nor one whose configuration the hub can give" in text


@pytest.mark.parametrize("name", device_classes())
def test_device_classes_say_where_their_figures_come_from(name: str) -> None:
    device = device_profile(name)
    assert device.device.name == name
    assert len(device.device.source) > 20
    assert device.rate("bfloat16", 1e9) > 1e9


def test_device_classes_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    assert all(f"`{name}`" in text for name in device_classes())
