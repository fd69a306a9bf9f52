"""An audit's figures as a table, as CSV, as JSON and as a picture: all say the same."""

import csv
import io
import json

import pytest
from matplotlib.figure import Figure

from splitfed.privacy.leakage import AttackResult
from splitfed.study.audit_plot import draw
from splitfed.study.audit_rows import LOWER_BOUND, Audit, AuditRow, AuditTerms, strongest

TERMS = AuditTerms(
    "clinics", "little-llama", 4, 64, 1, 2, 64, 32, 500, 1e-5, "replace-one", True, "noise multiplier 0.5"
)


def row(attack, target, successes, *, on=False, **more):
    return AuditRow(AttackResult(attack, target, successes, 200, 0.25), on, **more)


@pytest.fixture
def audit():
    guarantee = {"on": True, "epsilon": 12.5, "unit": "sequence", "guarantee": "12.5"}
    rows = (
        row("nearest neighbour", "tokens", 190),
        row("row norms", "mask", 200),
        row("gradient alignment", "membership", 150, note="names 30 % of 16 members"),
        row("nearest neighbour", "tokens", 60, **guarantee),
        row("bayes", "tokens", 70, **guarantee),
        row("row likelihoods", "mask", 120, **guarantee),
        row("gradient alignment", "membership", 101, note="names 6 % of 16 members", **guarantee),
    )
    return Audit(TERMS, rows, ("Labels are left out: no reason.",), 12.34)


def test_a_table_has_both_protections_of_an_attack_on_one_line(audit):
    headings, lines = audit.table()
    table = [dict(zip(headings, line, strict=True)) for line in lines]
    assert [line["recovers"] for line in table] == ["tokens", "tokens", "loss mask", "membership"]
    first = table[0]
    assert (first["noise off"], first["as configured"]) == ("95.0 % (91–98)", "30.0 % (24–37)")
    assert (first["chance"], first["ε per release"], first["for one"]) == ("25.0 %", "12.5", "sequence")
    assert table[1]["noise off"] == "–"
    assert table[2]["noise off"].startswith("100.0 %")
    assert table[2]["as configured"].startswith("60.0 %")


def test_a_summary_says_what_the_figures_are_worth(audit):
    said = audit.summary()
    assert said[-1] == LOWER_BOUND
    assert "Labels are left out: no reason." in said
    assert "little-llama, 1 block in the bottom, 2 in the top" in said[0]
    assert any("delta 1e-05, relation replace-one" in sentence for sentence in said)
    assert "As configured: noise multiplier 0.5." in said
    assert "Membership, noise off: names 30 % of 16 members." in said


def test_an_audit_without_noise_claims_no_epsilon(audit):
    terms = AuditTerms(**{**TERMS.__dict__, "is_protected": False, "configured": ""})
    bare = Audit(terms, audit.rows[:3], (), 1.0)
    headings, lines = bare.table()
    assert headings == ["recovers", "attack", "chance", "noise off"]
    assert all(len(line) == 4 for line in lines)
    assert "The run's configuration has no noise, so nothing is guaranteed." in bare.summary()


def test_json_and_csv_hold_the_same_rows(audit):
    content = json.loads(audit.as_json())
    table = list(csv.DictReader(io.StringIO(audit.as_csv())))
    assert content["statement"] == LOWER_BOUND
    assert len(content["rows"]) == len(table) == 7
    for one, other in zip(content["rows"], table, strict=True):
        assert (one["attack"], one["protection"]) == (other["attack"], other["protection"])
        assert one["rate"] == float(other["rate"])
        assert other["epsilon_per_release"] == ("" if one["epsilon_per_release"] is None else "12.5")
        assert (other["run"], other["bottom_blocks"], other["delta"]) == ("clinics", "1", "1e-05")
    assert content["rows"][0]["reads"] == "smashed data"
    assert content["rows"][3]["unit"] == "sequence"


def test_the_strongest_attack_is_found_under_each_protection(audit):
    assert strongest(audit.rows, "tokens", is_protected=True).result.attack == "bayes"
    assert strongest(audit.rows, "tokens", is_protected=False).result.attack == "nearest neighbour"
    assert strongest(audit.rows, "labels", is_protected=True) is None


def test_the_plot_says_which_noise_is_configured(audit, monkeypatch):
    titles, save = [], Figure.savefig

    def watched(figure, *arguments, **named):
        titles.append(figure.axes[0].get_title(loc="left"))
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", watched)
    draw(audit)
    cut = "clinics: 1 block in the bottom, 2 in the top, 32 sequences"
    assert titles == [f"{cut}\nas configured: noise multiplier 0.5"]


def test_the_plot_is_a_png_that_grows_with_the_attacks(audit):
    def height(picture):
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        return int.from_bytes(picture[20:24], "big")

    whole = draw(audit)
    assert height(whole) > height(draw(Audit(TERMS, audit.rows[:1], (), 1.0))) + 100
