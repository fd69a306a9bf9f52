"""A ledger's report says what the ledger itself would."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.errors import LedgerError
from splitfed.privacy import Ledger, epsilon, format_epsilon, report_ledger

DELTA = 1e-5


@pytest.fixture
def ledger_path(tmp_path):
    """Two rounds of a run and one of another: two channels, an evaluation, an adapter that leaves unprotected."""
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for run, rounds in (("first", 2), ("second", 1)):
            for round in range(1, rounds + 1):
                for step in range(3):
                    for channel in ("smashed", "output_gradient"):
                        fields = {"noise_multiplier": 2.0, "run": run, "round": round, "step": step, "sequences": 2}
                        ledger.charge(channel, records=[f"{step}", "x"], **fields)
                fields = {"run": run, "round": round, "step": 3, "sequences": 1}
                ledger.charge("smashed", noise_multiplier=1.0, records=["h"], kind="evaluate", **fields)
                ledger.charge("adapter", noise_multiplier=0.0, records=[], **fields)
    return tmp_path / "ledger.jsonl"


def test_lines_are_gathered_by_run_round_channel_and_kind(ledger_path):
    lines = report_ledger(ledger_path, delta=DELTA).lines
    assert [(line.run, line.round, line.channel, line.kind, line.releases, line.records) for line in lines] == [
        (run, round, channel, kind, releases, records)
        for run, round in (("first", 1), ("first", 2), ("second", 1))
        for channel, kind, releases, records in (
            ("smashed", "train", 6, 4),
            ("output_gradient", "train", 6, 4),
            ("smashed", "evaluate", 1, 1),
            ("adapter", "train", 1, 0),
        )
    ]


def test_every_line_states_one_release_and_all_up_to_there(ledger_path):
    lines = report_ledger(ledger_path, delta=DELTA).lines
    assert lines[0].epsilon_per_release == epsilon([(2.0, 1)], DELTA)
    assert lines[0].epsilon == epsilon([(2.0, 6)], DELTA)
    assert lines[2].epsilon == epsilon([(2.0, 6), (1.0, 1)], DELTA)
    assert lines[4].epsilon == epsilon([(2.0, 12), (1.0, 1)], DELTA)
    assert (lines[3].epsilon_per_release, lines[3].epsilon) == (None, None)


def test_the_end_is_what_the_ledger_itself_says(ledger_path):
    report = report_ledger(ledger_path, delta=DELTA)
    with Ledger(ledger_path) as ledger:
        assert report.epsilon == {
            "smashed": ledger.spent("smashed", DELTA),
            "output_gradient": ledger.spent("output_gradient", DELTA),
            "adapter": None,
            "loss": 0.0,
        }
        assert report.total == ledger.total_statement()
        assert report == report_ledger(ledger_path, delta=DELTA)  # while it is held
    assert report.releases == {"smashed": 21, "output_gradient": 18, "adapter": 3, "loss": 0}


def test_the_table_has_a_cell_for_each_heading(ledger_path):
    headings, rows = report_ledger(ledger_path, delta=DELTA).table()
    assert len(rows) == 12
    assert all(len(row) == len(headings) for row in rows)
    assert rows[0][:8] == ("first", "1", "smashed", "train", "2", "sequence", "6", "4")
    assert rows[3][-2:] == ("none", "none")


def test_the_summary_states_delta_unit_and_relation(ledger_path):
    summary = report_ledger(ledger_path, delta=DELTA).summary()
    assert summary[0].startswith("charged to the smashed data so far: epsilon ")
    assert summary[0].endswith("at delta 1e-05, unit sequence, relation replace-one")
    assert summary[2:] == [
        "charged to the adapter update so far: no epsilon",
        "in total: none: the adapter update is not protected",
    ]


def test_the_json_form_holds_the_same(ledger_path):
    report = report_ledger(ledger_path, delta=DELTA)
    read = json.loads(report.model_dump_json())
    assert (read["delta"], read["unit"], read["relation"]) == (DELTA, "sequence", "replace-one")
    assert read["epsilon"] == dict(report.epsilon)
    assert len(read["lines"]) == 12


def test_an_empty_ledger_is_reported(tmp_path):
    Ledger(tmp_path / "ledger.jsonl").close()
    report = report_ledger(tmp_path / "ledger.jsonl")
    assert report.table()[1] == []
    assert report.summary() == ["in total: epsilon 0 at delta 1e-05, unit sequence, relation replace-one"]


def test_units_metric_privacy_and_secret_samples_are_told_apart(tmp_path):
    fields = {"run": "r", "round": 1, "step": 0, "sequences": 1}
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.charge("smashed", noise_multiplier=2.0, unit="token", units=16.0, records=["a"], coupled=False, **fields)
        ledger.charge("output_gradient", noise_multiplier=0.0, eta=1.5, unit="token", records=["a"], **fields)
        step = {"sample_rate": 0.01, "channels": {"smashed": 4.0, "adapter": 4.0}, "coupled": False}
        ledger.charge("step", noise_multiplier=8**0.5, records=[], **step, **fields)
    report = report_ledger(tmp_path / "ledger.jsonl", relation="zero-out")
    tokens, metric, step = report.lines
    assert (tokens.unit, tokens.epsilon_per_release) == ("token", pytest.approx(epsilon([(4.0, 1)], DELTA), rel=1e-9))
    assert tokens.epsilon == pytest.approx(epsilon([(1.0, 1)], DELTA), rel=1e-9)
    assert (metric.eta, metric.epsilon_per_release) == (1.5, None)
    assert (step.channels, step.sample_rate) == (["smashed", "adapter"], 0.01)
    assert 0 < step.epsilon_per_release < epsilon([(2 * 8**0.5, 1)], DELTA)
    assert report.releases == {"smashed": 2, "output_gradient": 1, "adapter": 1, "loss": 0}
    assert report.epsilon_total is None
    assert report.summary() == [
        f"charged to the smashed data so far: epsilon {format_epsilon(report.epsilon['smashed'])} at delta 1e-05, "
        "unit sequence, relation zero-out",
        "charged to the output gradient so far: 1.5 · distance of two embeddings, and no epsilon",
        f"charged to the adapter update so far: epsilon {format_epsilon(report.epsilon['adapter'])} at delta 1e-05, "
        "unit sequence, relation zero-out",
        "in total: none: the output gradient (metric privacy only: 1.5 · distance) is not protected",
    ]


def test_tokens_have_an_epsilon_of_their_own(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        fields = {"run": "r", "round": 1, "step": 0, "sequences": 1, "records": ["a"]}
        ledger.charge("smashed", noise_multiplier=2.0, unit="token", units=16.0, **fields)
    report = report_ledger(tmp_path / "ledger.jsonl")
    assert report.epsilon_per_token == {"smashed": epsilon([(2.0, 1)], DELTA)}
    assert report.epsilon["smashed"] == epsilon([(0.5, 1)], DELTA)
    assert report.summary()[1].endswith("at delta 1e-05, unit token, relation replace-one")


def test_what_is_no_ledger_is_refused(tmp_path):
    with pytest.raises(LedgerError, match=r"cannot be read \(No such file or directory\); give the ledger"):
        report_ledger(tmp_path / "ledger.jsonl")


@given(st.floats(1e-12, 1e20))
def test_an_epsilon_is_written_rounded_up_and_not_by_more_than_a_thousandth(value):
    written = float(format_epsilon(value).replace(",", ""))
    assert value <= written <= value * 1.001 * (1 + 1e-12)


def test_an_epsilon_is_written_as_people_read_it():
    values = [None, 0.0, 0.12345, 4.72839, 1486.5, 206_107_392.4, 5e19, 1e-9]
    written = ["none", "0", "0.1235", "4.729", "1,487", "206,200,000", "5.000e+19", "1.001e-9"]
    assert [format_epsilon(value) for value in values] == written
