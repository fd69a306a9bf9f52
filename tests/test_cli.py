"""The command line: what a person at a terminal sees."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import splitfed
from splitfed import cli
from splitfed.errors import DataError, SplitFedError

HEAVY = ("torch", "transformers", "numpy", "grpc", "datasets", "matplotlib")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitfed", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, splitfed.cli\n"
        "try:\n    splitfed.cli.main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "server" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_wrong_configuration_is_explained_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, splitfed.cli\n"
        "try:\n    splitfed.cli.main(['server', '--config', 'gone.toml'])\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
    assert done.stderr == "splitfed: gone.toml: no such file; give the configuration's path with --config\n"


def test_the_version_is_printed(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"splitfed {splitfed.__version__}\n")


@pytest.mark.parametrize(
    "command", ["server", "agent", "demo", "sweep", "ledger", "audit", "evaluate", "export", "report"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"Usage: splitfed {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["server"], "--config"),
        (["nosuch"], "nosuch"),
        (["agent", "--config", "a.toml", "--nosuch"], "--nosuch"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_ends_with_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_resume_and_overwrite_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["server", "--config", "a.toml", "--resume", "--overwrite"])
    assert ended.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(DataError("rows.csv:\n  is empty; give\n another file"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_error_in_service_is_one_sentence_and_never_a_traceback(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(path: Path) -> None:
        raise error

    monkeypatch.setattr("splitfed.config.load_agent_config", raise_error)
    with pytest.raises(SystemExit) as ended:
        cli.main(["agent", "--config", "a.toml"])
    assert ended.value.code == status
    said = "splitfed: rows.csv: is empty; give another file\n" if isinstance(error, SplitFedError) else ""
    assert capsys.readouterr().err == said


@pytest.fixture
def ledger_file(tmp_path: Path) -> Path:
    """A ledger of two charges for smashed data and an unprotected adapter."""
    from splitfed.privacy import Ledger

    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for step in range(2):
            ledger.charge(
                "smashed", noise_multiplier=2.0, records=["a", "b"], sequences=2, run="run", round=1, step=step
            )
        ledger.charge("adapter", noise_multiplier=0.0, records=[], sequences=1, run="run", round=1, step=2)
    return tmp_path / "ledger.jsonl"


def test_a_ledger_is_shown_as_the_agent_states_it(ledger_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from splitfed.privacy import Ledger

    before = ledger_file.read_bytes()
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", str(ledger_file), "--json"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert ledger_file.read_bytes() == before
    with Ledger(ledger_file) as ledger:
        assert shown["epsilon"]["smashed"] == ledger.spent("smashed", 1e-5) > 0
        assert shown["epsilon"]["adapter"] is None
        assert shown["total"] == ledger.total_statement()
    assert shown["releases"] == {"smashed": 4, "output_gradient": 0, "adapter": 1, "loss": 0}
    assert (shown["delta"], shown["unit"], shown["relation"]) == (1e-5, "sequence", "replace-one")


def test_a_ledger_is_shown_to_a_person_with_delta_unit_and_relation(
    ledger_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitfed.privacy import report_ledger

    with pytest.raises(SystemExit):
        cli.main(["ledger", str(ledger_file), "--delta", "1e-6"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    report = report_ledger(ledger_file, delta=1e-6)
    assert lines[-len(report.summary()) :] == report.summary()
    assert any("at delta 1e-06, unit sequence, relation replace-one" in line for line in lines)
    assert lines[1].split()[:4] == ["run", "1", "smashed", "train"]


def test_showing_a_ledger_that_is_not_there_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", str(tmp_path / "gone.jsonl")])
    assert ended.value.code == 2
    assert "gone.jsonl: cannot be read (No such file or directory); give the ledger.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["Permission denied", "Is a directory"])
def test_a_ledger_that_cannot_be_read_is_refused_like_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    file = tmp_path / "ledger.jsonl"
    if reason == "Is a directory":
        file.mkdir()
    else:
        file.touch()

        def refuse(path: Path, *mode: str) -> None:
            raise PermissionError(errno.EACCES, reason)

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", str(file)])
    assert ended.value.code == 2
    assert f"ledger.jsonl: cannot be read ({reason}); give the ledger.jsonl of" in capsys.readouterr().err


def test_an_older_copy_of_a_ledger_is_shown_with_a_warning(
    ledger_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from splitfed.privacy import Ledger, witness_folder

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    older = ledger_file.read_bytes()
    with Ledger(ledger_file, witnesses=witness_folder()) as ledger:
        ledger.charge("loss", noise_multiplier=0.0, records=[], sequences=1, run="run", round=2, step=0)
    said = []
    for content in (ledger_file.read_bytes(), older):
        ledger_file.write_bytes(content)
        with pytest.raises(SystemExit):
            cli.main(["ledger", str(ledger_file)])
        said.append("older copy: it has 3 rows, but this device has written 4" in capsys.readouterr().out)
    assert said == [False, True]


def test_a_last_line_that_is_unfinished_is_told(ledger_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger_file.write_bytes(ledger_file.read_bytes()[:-20])
    with pytest.raises(SystemExit):
        cli.main(["ledger", str(ledger_file)])
    assert "the last line is unfinished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["ledger", str(ledger_file), "--json"])
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_cannot_be_written_is_told_in_one_sentence(ledger_file: Path, options: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "splitfed", "ledger", str(ledger_file), *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("splitfed: The output cannot be written (No space left on device); send it")


def test_a_delta_outside_its_range_is_refused(ledger_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", str(ledger_file), "--delta", "1"])
    assert ended.value.code == 2
    assert "--delta is 1.0" in capsys.readouterr().err


def test_a_ledger_is_stated_under_the_relation_that_is_asked_for(
    ledger_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitfed.privacy import epsilon

    with pytest.raises(SystemExit):
        cli.main(["ledger", str(ledger_file), "--relation", "zero-out", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["relation"] == "zero-out"
    assert shown["epsilon"]["smashed"] == pytest.approx(epsilon([(2.0, 4)], 1e-5), rel=1e-9)
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", str(ledger_file), "--relation", "add-one"])
    assert ended.value.code == 2
    assert "--relation is add-one; give replace-one or zero-out" in capsys.readouterr().err


@pytest.fixture
def audited(tmp_path: Path) -> list[str]:
    """The words of an audit of a small run."""
    from tests.study.audited_run import write_config, write_rows

    config = write_config(tmp_path / "server.toml", privacy="noise_multiplier = 50.0")
    public = write_rows(tmp_path / "public.jsonl", 12, seed=1)
    private = write_rows(tmp_path / "private.jsonl", 8, seed=2)
    return ["audit", "--config", str(config), "--public-data", str(public), "--private-data", str(private)]


def test_an_audit_shows_what_noise_takes_from_a_server(
    audited: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*audited, "--examples", "2", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    said = capsys.readouterr()
    stages = said.err.splitlines()  # a line each where there is no terminal
    assert len(stages) == len(set(stages)) > 3
    assert all(re.match(r" *\d+%  \w", stage) for stage in stages)
    assert "lower bound on what leaks, never a guarantee" in said.out.splitlines()[-1]
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    rates = {(row["target"], row["attack"], row["protection"]): row["rate"] for row in written["rows"]}
    for target, attack in (("tokens", "nearest neighbour"), ("labels", "gradient matching")):
        assert rates[target, attack, "noise off"] > 0.9
        assert rates[target, attack, "as configured"] < 0.6
        assert attack in said.out
    assert {target for target, _, _ in rates} == {"tokens", "labels", "mask", "membership"}
    on = next(row for row in written["rows"] if row["protection"] == "as configured")
    assert 0 < on["epsilon_per_release"] < 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["audit.csv", "audit.json", "audit.png"]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"--public-data": "gone.csv"}, 2, "gone.csv: no such file; give --public-data the path of one"),
        ({"--private-data": "gone.csv"}, 2, "gone.csv: no such file; give --private-data the path of one"),
        ({"--config": "gone.toml"}, 2, "gone.toml: no such file"),
        ({"--config": "agent.toml"}, 2, "agent.toml: unknown key agent"),
        ({"--examples": "1"}, 2, "--examples is 1; give 2 or more"),
        ({"--public-data": "few.jsonl"}, 1, "few.jsonl: has 3 sequences, but an audit needs 8 or more there"),
        ({"--private-data": "other.csv"}, 2, "it has mr, ref: name the right ones with --prompt-column"),
        ({"--private-data": "rows.dat"}, 2, "rows.dat: its extension says no format; give it the name of a"),
        ({"--output": "server.toml"}, 2, "server.toml: cannot be written to"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_one_sentence_and_nothing_is_written(
    audited: list[str],
    tmp_path: Path,
    change: dict[str, str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.study.audited_run import write_rows

    write_rows(tmp_path / "few.jsonl", 3, seed=3)
    (tmp_path / "other.csv").write_text("mr,ref\na,b\n")
    (tmp_path / "rows.dat").write_text("a")
    (tmp_path / "agent.toml").write_text('[agent]\nname = "a"\nstate_directory = "s"\n[data]\npath = "d.csv"\n')
    before = sorted(tmp_path.iterdir())
    options = dict(zip(audited[1::2], audited[2::2], strict=True))
    options |= {name: value if name == "--examples" else str(tmp_path / value) for name, value in change.items()}
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", *(word for pair in options.items() for word in pair)])
    assert ended.value.code == status
    err = capsys.readouterr().err
    assert said in err
    assert (err.count("\n"), err.startswith("splitfed: ")) == (1, True)
    assert sorted(tmp_path.iterdir()) == before
