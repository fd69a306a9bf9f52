"""What a report says beside losses and figures: who was out of step, where the time went, what leaks, how far it is."""

import fcntl
import json

import pytest

from splitfed import cli
from splitfed.errors import DataError, OutputError
from splitfed.study.report import write_report
from tests.study.test_report import agent_line, report, server_line, share, write_lines, write_run

ROW = {"target": "tokens", "attack": "probe", "low": 0.42, "high": 0.61, "chance": 0.1, "unit": ""}
AUDIT = {
    "run": "clinics",
    "bottom_blocks": 1,
    "top_blocks": 2,
    "private_sequences": 9,
    "delta": 1e-5,
    "relation": "replace-one",
    "statement": "A lower bound.",
    "rows": [
        ROW | {"rate": 0.5, "protection": "noise off"},
        ROW | {"rate": 0.125, "protection": "as configured", "unit": "sequence", "guarantee_per_release": "41.5"},
    ],
}


def test_who_was_late_left_out_refused_replaced_or_gone_is_named_with_the_round(tmp_path):
    odd = {
        "selected": ["a", "b"],
        "late": ["b"],
        "merged": {"d": 1},
        "replaced": {"e": "a"},
        "refused": {"f": "its update is not finite"},
        "left_out": ["g"],
        "left": ["h"],
        "silent": ["i"],
        "taken_out": ["j"],
        "dropped": ["k"],
        "begun_again": 2,
        "staleness": {"mean": 1.5, "oldest": 4},
    }
    run = write_run(tmp_path, [server_line(1, a=share()), server_line(2, a=share()) | odd])
    _, page = report(run)
    said = {row["Agent"]: row["What"] for row in page.table("Round", "Agent", "What")}
    assert {row["Round"] for row in page.table("Round", "Agent", "What")} == {"2"}
    assert said["a"] == "asked in place of e"
    assert said["b"] == "late: the round was closed without it"
    assert said["d"] == "its late update of round 1 is in"
    assert said["e"] == "replaced by a"
    assert said["f"] == "refused: its update is not finite"
    assert (said["g"], said["h"], said["i"]) == ("left out by the rule", "left", "fell silent")
    assert (said["j"], said["k"]) == ("had no place in the joint steps", "its late update was dropped")
    assert said["all"] == "steps were 1.5 others old on average, 4 at most"
    asked = {row["Agent"]: (row["Rounds"], row["Asked"]) for row in page.table("Agent", "Asked")}
    assert asked["a"] == ("2 of 2", "1")
    assert asked["b"] == ("0 of 2", "1")


def test_an_ordinary_run_has_no_such_list(tmp_path):
    _, page = report(write_run(tmp_path, [server_line(1, a=share())]))
    assert "Out of the ordinary" not in page.text
    assert not any("Asked" in table[0] for table in page.tables)


def test_the_time_of_an_agent_is_split_by_what_both_sides_measured(tmp_path):
    run = write_run(tmp_path, [server_line(number, a=share(server_seconds=2.5)) for number in (1, 2)])
    lines = [agent_line(number, seconds=10.0, waiting_seconds=4.0) for number in (1, 2)]
    markup, page = report(run, agent_directories={"a": write_lines(tmp_path / "a", lines)})
    (row,) = page.table("Agent’s work", "Link", "Server")
    assert row["Seconds"] == "20.0"
    assert (row["Agent’s work"], row["Link"], row["Server"]) == ("12.0 (60 %)", "3.0 (15 %)", "5.0 (25 %)")
    assert markup.count("<svg") == 3


def test_a_server_that_works_while_the_agent_does_takes_no_more_than_the_waiting(tmp_path):
    run = write_run(tmp_path, [server_line(1, a=share(server_seconds=9.0))])
    lines = [agent_line(1, seconds=10.0, waiting_seconds=4.0)]
    _, page = report(run, agent_directories={"a": write_lines(tmp_path / "a", lines)})
    (row,) = page.table("Agent’s work", "Link", "Server")
    assert (row["Agent’s work"], row["Link"], row["Server"]) == ("6.0 (60 %)", "0.0 (0 %)", "4.0 (40 %)")


def test_time_that_cannot_be_split_is_said_to_be_so(tmp_path):
    run = write_run(tmp_path, [server_line(1, a=share())])
    _, page = report(run)
    assert "No agent shared its own figures, which the time can be split by." in page.text
    _, page = report(run, agent_directories={"a": write_lines(tmp_path / "a", [agent_line(1)])})
    assert "This run was made before agents and server measured how long they wait" in page.text


def test_what_an_audit_recovered_is_shown_beside_its_guarantee(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(AUDIT))
    _, page = report(write_run(tmp_path, [server_line(1, a=share())]), audit_folder=tmp_path)
    (row,) = page.table("Recovered, and how", "Chance")
    assert row["Recovered, and how"] == "tokens: probe"
    assert (row["Noise off"], row["As configured"]) == ("50.0 % (42–61)", "12.5 % (42–61)")
    assert (row["Chance"], row["ε a release"], row["Unit"]) == ("10.0 %", "41.5", "sequence")
    assert "9 private sequences attacked" in page.text
    assert "A lower bound." in page.text


def test_a_run_that_was_not_audited_says_so(tmp_path):
    _, page = report(write_run(tmp_path, [server_line(1, a=share())]))
    assert "Not audited" in page.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; give the folder that splitfed audit --output has written to"),
        ("{", r"is damaged \(JSON: "),
        (json.dumps(AUDIT | {"rows": [ROW | {"rate": 7, "protection": "noise off"}]}), r"is damaged \(rows\.0\.rate: "),
    ],
)
def test_a_missing_or_damaged_audit_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "audit.json").write_text(content)
    with pytest.raises(DataError, match=said):
        report(write_run(tmp_path, []), audit_folder=tmp_path)


def test_a_run_that_a_server_is_at_work_on_says_which_round_it_is_in(tmp_path):
    run = write_run(tmp_path, [server_line(1, a=share())])
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, page = report(run)
        assert "Running: in round 2 of 3" in page.text
    _, page = report(run)
    assert "Not finished: stopped after round 1 of 3" in page.text


def test_totals_that_differ_are_told_with_who_says_them(tmp_path):
    run = write_run(tmp_path, [server_line(1, a=share(), b=share(), c=share())])
    statement = "epsilon 9 at delta 1e-05, unit sequence, relation replace-one"
    agents = {name: write_lines(tmp_path / name, [agent_line(1, total=statement)]) for name in "ac"}
    agents["b"] = write_lines(tmp_path / "b", [agent_line(1)])
    _, page = report(run, agent_directories=agents)
    assert f"a, c: {statement}." in page.text
    assert {row["Agent"]: row["Total"] for row in page.table("Agent", "Total")}["a"] == "ε 9"


def test_the_command_writes_the_page_into_the_run_directory_or_elsewhere(tmp_path, capsys):
    run = write_run(tmp_path, [server_line(1, a=share())])
    agent = write_lines(tmp_path / "a", [agent_line(1)])
    for words, page in (([], run / "report.html"), (["--output", str(tmp_path / "p.html")], tmp_path / "p.html")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(run), "--agent", f"a={agent}", "--title", "A title", *words])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"{page}\n"
        assert "A title" in page.read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--agent", "clinic"], 2, "--agent is clinic; give a name and a state directory"),
        (["--agent", "clinic=gone"], 1, "gone: no such folder; give the state directory of agent clinic"),
        (["--audit", "gone"], 1, "audit.json: no such file"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_sentence(tmp_path, words, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(write_run(tmp_path, [])), *words])
    assert ended.value.code == status
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = write_run(tmp_path, [])
    (tmp_path / "page").mkdir()
    with pytest.raises(OutputError, match="page: cannot be written"):
        write_report(run, tmp_path / "page")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page", "run"]
