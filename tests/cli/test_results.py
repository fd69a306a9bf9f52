from pathlib import Path

import pytest

from splitfed import cli

AGENT = (
    '[agent]\nname = "a"\nserver = "127.0.0.1:1"\nstate_directory = "state"\nretry_for_s = 0\n[data]\npath = "a.csv"\n'
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "agent.toml"
    file.write_text(AGENT)
    return file


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is nothing to generate from; give --prompt TEXT or --file FILE"),
        (["--prompt", "x", "--max-tokens", "1"], "--max-tokens is 1; give 2 or more"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature is -1; give 0 for the most likely token"),
        (["--prompt", "x", "--temperature", "1e-9"], "--temperature is 1e-09; give 0 for the most likely token"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "x", "--top-p", "0"], "--top-p is 0; give a probability above 0"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--prompt", "x", "--seed", "-3"], "--seed is -3; give 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_of_generate_is_one_sentence(
    config: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--config", str(config), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"splitfed: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--config", "a.toml", "--run", "run"]], ids=["neither", "both"])
def test_generate_takes_a_server_or_a_run_directory(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--prompt", "x", *options])
    assert ended.value.code == 2
    assert "give either --config FILE, an agent's configuration, or --run FOLDER" in capsys.readouterr().err


def test_generate_needs_certificates_or_a_word_beyond_this_machine(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(AGENT.replace("127.0.0.1:1", "192.0.2.1:1"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--config", str(config), "--prompt", "x"])
    assert ended.value.code == 2
    assert "agent.server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--round", "1"], "--base, --round and --no-adapter are for --run"),
        (["--no-adapter"], "--base, --round and --no-adapter are for --run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_takes_the_model_from_the_server_or_from_the_run(
    config: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--config", str(config), "--prompt", "x", *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either RUN_DIR, a run directory, or --config FILE"),
        (["run", "--config", "CONFIG"], "give either RUN_DIR, a run directory, or --config FILE"),
        (["run"], "there is nothing to measure on; give --data FILE"),
        (["--config", "CONFIG"], "there is nothing to measure on; give --data FILE, or set held_out_path in [data]"),
        (["--config", "CONFIG", "--data", "gone.csv"], "gone.csv: no such file; give --data the path of one"),
        (["--config", "CONFIG", "--round", "1"], "--base and --round are for a run directory"),
        (["--config", "CONFIG", "--base", "demo"], "--base and --round are for a run directory"),
        (["--config", "CONFIG", "--prompt-column", "mr"], "with --config, the columns are those of its [data]"),
        (["--config", "CONFIG", "--data", "CONFIG", "--limit", "0"], "--limit is 0; give 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_of_evaluate_is_one_sentence(
    config: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *(str(config) if word == "CONFIG" else word for word in options)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"splitfed: {said}")
    assert error.count("\n") == 1


def test_evaluate_needs_certificates_or_a_word_beyond_this_machine(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(AGENT.replace("127.0.0.1:1", "192.0.2.1:1"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--config", str(config), "--data", str(config)])
    assert ended.value.code == 2
    assert "agent.server" in capsys.readouterr().err
