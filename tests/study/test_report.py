"""The report of a run, read back as the page that a person opens."""

import html.parser
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from splitfed.errors import DataError
from splitfed.study import BeforeAfter, write_report

CONFIG = """
[run]
name = "clinics"
directory = "/srv/secret-place/run"
[model]
base = "/srv/secret-place/little-llama"
[training]
rounds = 3
[federation]
agents = 2
[tls]
certificate = "/srv/secret-place/cert.pem"
key = "/srv/secret-place/key.pem"
authority = "/srv/secret-place/ca.pem"
"""
TOTAL = "none: the adapter update is not protected"
VOID_ELEMENTS = {"meta", "path", "use", "rect", "br"}


class Page(html.parser.HTMLParser):
    """A page as its visible text by section heading, its table cells, and what it would load."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.references: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset"}]
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_ELEMENTS:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *columns: str) -> list[dict[str, str]]:
        """The first table that has these columns, as one mapping a row."""
        head, *rows = next(table for table in self.tables if table and set(columns) <= set(table[0]))
        return [dict(zip(head, row, strict=True)) for row in rows]


def server_line(number: int, **agents: Mapping[str, Any]) -> dict[str, Any]:
    return {"round": number, "rounds": 3, "seconds": 12.5, "agents": agents, "adapter": f"adapters/round-{number:04d}"}


def share(weight: int = 100, **known: Any) -> dict[str, Any]:
    hidden = {"training_loss": None, "held_out_loss": None}
    return {"weight": weight, **hidden, "tokens": 1000, "bytes_up": 300_000, "bytes_down": 280_000, **known}


def agent_line(number: int, *, smashed: float | None = 41.5, **known: Any) -> dict[str, Any]:
    return {
        "round": number,
        "training_loss": 3.5,
        "held_out_loss": 3.75,
        "epsilon": {"smashed": smashed, "output_gradient": 2_500_000.0},
        "total": TOTAL,
        "delta": 1e-5,
        "unit": "sequence",
        "relation": "replace-one",
        "tokens": 1000,
        "bytes_up": 300_000,
        "bytes_down": 280_000,
        "seconds": 9.0,
        **known,
    }


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]], *, ending: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + ending, encoding="utf-8")
    return folder


def write_run(folder: Path, lines: Sequence[Mapping[str, Any]], *, ending: str = "") -> Path:
    run = write_lines(folder / "run", lines, ending=ending)
    (run / "run.toml").write_text(CONFIG, encoding="utf-8")
    return run


def report(run: Path, **options: Any) -> tuple[str, Page]:
    output = run.parent / "pages" / "report.html"
    write_report(run, output, **options)
    markup = output.read_text(encoding="utf-8")
    return markup, Page(markup)


def test_a_round_shows_means_by_weight_and_the_largest_epsilon_with_its_terms(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(300), b=share(100, tokens=3000))])
    agents = {
        "a": write_lines(tmp_path / "a", [agent_line(1, training_loss=3.0)]),
        "b": write_lines(tmp_path / "b", [agent_line(1, training_loss=5.0, smashed=99.25, tokens=3000)]),
    }
    markup, page = report(run, agent_directories=agents)
    (row,) = page.table("Round", "ε smashed data", "B/token ↑")[:1]
    assert row["Training loss"] == "3.500"  # (300 × 3.0 + 100 × 5.0) / 400
    assert row["Held-out loss"] == "3.750"
    assert row["ε smashed data"] == "99.2"
    assert row["ε output gradient"] == "2.50 × 106"
    assert row["B/token ↑"] == "150"  # 600,000 bytes over 4,000 tokens
    assert row["B/token ↓"] == "140"
    assert row["Seconds"] == "12.5"
    assert "the largest of 2 of 2 agents: δ = 1e-5, unit sequence, relation replace-one" in page.text
    assert "Training loss is taken with the agents’ noise on." in page.text
    assert f"Total: {TOTAL}." in page.text
    assert "10<sup>6</sup>" in markup


def test_what_the_agents_keep_to_themselves_is_shown_as_not_shared(tmp_path: Path) -> None:
    _, page = report(write_run(tmp_path, [server_line(1, a=share()), server_line(2, a=share())]))
    for row in page.table("Round", "ε smashed data", "B/token ↑"):
        assert row["Training loss"] == row["Held-out loss"] == "not shared"
        assert row["ε smashed data"] == row["ε output gradient"] == "not shared"
        assert row["B/token ↑"] == "300"
    assert "No agent shared its losses." in page.text
    assert "No agent shared its epsilons." in page.text
    assert "noise on" not in page.text
    assert "Total:" not in page.text
    assert "nothing is guaranteed" not in page.text


def test_an_agent_without_noise_is_shown_as_nothing_guaranteed_whatever_the_others_spent(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(), b=share())])
    agents = {
        "a": write_lines(tmp_path / "a", [agent_line(1, smashed=None)]),
        "b": write_lines(tmp_path / "b", [agent_line(1, smashed=12.0)]),
    }
    _, page = report(run, agent_directories=agents)
    assert page.table("Round", "ε smashed data", "B/token ↑")[0]["ε smashed data"] == "nothing is guaranteed"
    by_agent = {row["Agent"]: row for row in page.table("Agent", "ε smashed data", "Total")}
    assert by_agent["a"]["ε smashed data"] == "nothing is guaranteed"
    assert by_agent["b"]["ε smashed data"] == "12"
    assert by_agent["b"]["Total"] == TOTAL


def test_a_mean_covers_only_the_agents_that_share(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(7, training_loss=2.0), b=share(9))])
    _, page = report(run)
    assert page.table("Round", "ε smashed data", "B/token ↑")[0]["Training loss"] == "2.000"
    by_agent = {row["Agent"]: row for row in page.table("Agent", "Weight")}
    assert (by_agent["a"]["Weight"], by_agent["a"]["Training loss"]) == ("7", "2.000")
    assert (by_agent["b"]["Weight"], by_agent["b"]["Training loss"]) == ("9", "not shared")


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(training_loss=2.0, held_out_loss=3.0))])
    markup, page = report(run, before_after=BeforeAfter(4.0, 3.0, "A", "b", "c"))
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"@import|<script|<link|<img|<iframe", markup)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", markup))
    assert markup.count("<svg") == markup.count('role="img"') == 2


def test_the_plots_take_their_colours_from_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(number, a=share(training_loss=2.0)) for number in (1, 2)])
    markup, _ = report(run)
    for plot in re.findall(r"<svg.*?</svg>", markup, flags=re.DOTALL):
        assert "var(--ink)" in plot
        assert "var(--first)" in plot
        assert not re.search(r"(?:fill|stroke): #(?:0[1-5]){3}", plot)
    for name in re.findall(r"var\((--[a-z-]+)\)", markup):
        assert f"{name}:" in markup


def test_the_same_files_give_the_same_page_to_the_byte(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(training_loss=2.0))])
    first, _ = report(run)
    second, _ = report(run)
    assert first == second


def test_generated_text_names_and_titles_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script> & \"q\""
    run = write_run(tmp_path, [server_line(1, **{hostile: share()})])
    agents = {hostile: write_lines(tmp_path / "a", [agent_line(1, total=hostile, unit=hostile, relation=hostile)])}
    measured = BeforeAfter(prompt=hostile, sample_before=hostile, sample_after=hostile)
    markup, page = report(run, agent_directories=agents, before_after=measured, title=hostile)
    assert "<script" not in markup
    assert page.text.count(hostile) >= 9


def test_losses_and_samples_before_and_after_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share())])
    measured = BeforeAfter(4.1, 3.4, prompt="The assert", sample_before=" nothing", sample_after=" statement")
    _, page = report(run, before_after=measured)
    assert "Held-out loss, before → after" in page.text
    assert "4.100 → 3.400" in page.text
    assert "perplexity 60.3 → 30.0" in page.text  # e^4.1 and e^3.4
    assert "The assert nothing" in page.text
    assert "The assert statement" in page.text


def test_a_running_run_shows_how_far_it_is(tmp_path: Path) -> None:
    _, page = report(write_run(tmp_path, [server_line(1, a=share()), server_line(2, a=share())]))
    assert "Not finished" in page.text
    assert "2 of 3" in page.text


def test_a_finished_run_is_called_finished(tmp_path: Path) -> None:
    _, page = report(write_run(tmp_path, [server_line(number, a=share()) for number in (1, 2, 3)]))
    assert "Not finished" not in page.text
    assert "3 of 3" in page.text


def test_a_run_without_a_finished_round_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path, [])
    (run / "metrics.jsonl").unlink()
    _, page = report(run)
    assert "No round has ended yet." in page.text


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    _, page = report(write_run(tmp_path, [server_line(1, a=share())], ending='{"round": 2, "age'))
    assert [row["Round"] for row in page.table("Round", "ε smashed data", "B/token ↑")] == ["1"]


def test_a_round_that_ran_again_counts_once_with_its_last_line(tmp_path: Path) -> None:
    lines = [server_line(1, a=share()), server_line(2, a=share(5)), server_line(2, a=share(6))]
    _, page = report(write_run(tmp_path, lines))
    assert [row["Round"] for row in page.table("Round", "ε smashed data", "B/token ↑")] == ["1", "2"]
    assert page.table("Agent", "Weight")[0]["Weight"] == "6"


def test_the_configuration_is_shown_with_its_defaults_and_without_the_servers_paths(tmp_path: Path) -> None:
    markup, page = report(write_run(tmp_path, [server_line(1, a=share())]))
    settings = {row[0]: row[1] for table in page.tables for row in table if len(row) == 2}
    assert settings["base"] == "little-llama"
    assert settings["learning_rate"] == "0.001"
    assert settings["targets"] == "all linear layers of the blocks"
    assert settings["trunk_output"] == "int8"
    assert "mutual TLS" in page.text
    assert "secret-place" not in markup
    assert str(tmp_path) not in markup


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{not json}\n", r"metrics\.jsonl: line 2 is damaged"),
        ('{"round": "two"}\n', r"metrics\.jsonl: line 2 is damaged \(round: "),
        ('{"round": 2, "agents": {"a": {"tokens": -5}}}\n', r"line 2 is damaged \(agents\.a\.tokens: "),
        ('{"round": 2, "agents": {"a": {"training_loss": NaN}}}\n', r"line 2 is damaged \(agents\.a\.training_loss: "),
        ("\n", r"metrics\.jsonl: line 2 is damaged"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str, message: str) -> None:
    run = write_run(tmp_path, [server_line(1, a=share())], ending=damage)
    with pytest.raises(DataError, match=message) as caught:
        report(run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pages").exists()


def test_a_folder_that_is_no_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/run\.toml: no such file; give the run directory of a server"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run", "is not valid TOML"),
        ("[run]\nname = 3\n", r"run\.toml: [a-z.]+ is not what a server's configuration has"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    run = write_run(tmp_path, [])
    (run / "run.toml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        report(run)
    assert "\n" not in str(caught.value)


def test_a_missing_agent_folder_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share())])
    with pytest.raises(DataError, match="no such folder; give the state directory of agent a"):
        report(run, agent_directories={"a": tmp_path / "gone"})


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [])
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: is not UTF-8 text"):
        report(run)


def test_held_out_losses_measured_from_outside_take_the_place_of_the_agents_own(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(number, a=share(held_out_loss=9.0)) for number in (1, 2)])
    _, page = report(run, before_after=BeforeAfter(held_out_loss_by_round={1: 3.25}))
    rows = page.table("Round", "ε smashed data", "B/token ↑")
    assert [row["Held-out loss"] for row in rows] == ["3.250", "not shared"]
    assert "Held-out loss measured on each round’s exported adapter." in page.text


def test_an_epsilon_without_its_unit_or_relation_says_that_they_were_not_shared(tmp_path: Path) -> None:
    run = write_run(tmp_path, [server_line(1, a=share(), b=share())])
    agents = {
        "a": write_lines(tmp_path / "a", [agent_line(1)]),
        "b": write_lines(tmp_path / "b", [agent_line(1, unit=None, relation=None)]),
    }
    _, page = report(run, agent_directories=agents)
    assert "δ = 1e-5, unit not shared, relation not shared; δ = 1e-5, unit sequence, relation replace-one" in page.text
