"""The report in a browser: it fits a phone and a screen, complains of nothing, and asks nobody for anything."""

import json

import pytest

from splitfed.study import BeforeAfter, write_report
from tests.study.browser import CHROMIUM, browser
from tests.study.test_report import agent_line, server_line, share, write_lines, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

LONG = "an-agent-with-a-name-that-is-as-long-as-a-name-may-well-become"
ATTACK = {"target": "tokens", "attack": "nearest neighbour", "low": 0.5, "high": 0.9, "chance": 0.1}


def write_full_report(folder):
    """A report with every section, long names and long words."""
    timed = {"server_seconds": 3.0}
    odd = {"late": [LONG], "refused": {"b": "The update is " + "9" * 90 + " times too long."}, "selected": ["b", LONG]}
    lines = [server_line(number, **{LONG: share(**timed), "b": share(**timed)}) | odd for number in (1, 2, 3)]
    run = write_run(folder, lines)
    told = [agent_line(number, waiting_seconds=5.0) for number in (1, 2, 3)]
    agents = {LONG: write_lines(folder / "a", told), "b": write_lines(folder / "b", told)}
    audit = {"run": "clinics", "bottom_blocks": 1, "top_blocks": 1, "private_sequences": 4, "delta": 1e-5}
    audit |= {"relation": "replace-one", "statement": "A lower bound."}
    audit["rows"] = [ATTACK | {"rate": 0.7, "protection": name} for name in ("noise off", "as configured")]
    (folder / "audit.json").write_text(json.dumps(audit))
    page = folder / "report.html"
    measured = BeforeAfter(4.0, 3.0, "A prompt", "x" * 300, "after " * 50)
    write_report(run, page, agent_directories=agents, audit_folder=folder, before_after=measured, title="t" * 120)
    return page


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page = write_full_report(folder)
    with browser(folder / "profile") as opened:
        return {width: opened.look(page.as_uri(), width, opens_details=True) for width in (360, 1280)}


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_makes_the_page_wider_than_its_window(looks, width):
    look = looks[width]
    assert look.window == width
    assert look.outside == []
    assert look.page <= width


def test_tables_that_are_too_wide_for_a_phone_scroll_in_their_own_box(looks):
    assert looks[360].boxes > looks[1280].boxes


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_complains_of_nothing_and_asks_nobody_for_anything(looks, width):
    assert looks[width].complaints == []
    assert looks[width].requests == []


def test_a_page_that_is_too_wide_complains_and_loads_something_is_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><main><p style="width:2000px">wide</p>'
        '<img src="gone.png"></main><script>console.error("no")</script>'
    )
    with browser(tmp_path / "profile") as opened:
        look = opened.look(page.as_uri(), 1280)
    assert look.page > 1280
    assert len(look.outside) == 1
    assert len(look.requests) == 1
    assert look.complaints
