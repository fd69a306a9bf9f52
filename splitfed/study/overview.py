"""The top of a report: what run it is, its figures at a glance, and what the model wrote before and after."""

from collections.abc import Collection

from splitfed.study import wording
from splitfed.study.measured import BeforeAfter
from splitfed.study.page import Html, element
from splitfed.study.record import RunRecord
from splitfed.study.summary import bytes_per_token, mean_loss, total_bytes, total_statements


def header(record: RunRecord, heading: str) -> Html:
    """Name the run, say how far it came and which part of which model stayed on the devices."""
    model = record.config.shared().model
    cut = f"devices hold {_blocks(model.bottom_blocks)} at the bottom and {_blocks(model.top_blocks)} at the top"
    return element(
        "header",
        element("p", "splitfed · report of a run", kind="eyebrow"),
        element("h1", heading),
        element("p", f"{_state(record)} · base model {model.base} · {cut}", kind="note"),
    )


def _state(record: RunRecord) -> str:
    """Say how far the run is."""
    if record.is_finished:
        return "Finished"
    done, planned = record.rounds[-1].number if record.rounds else 0, record.config.training.rounds
    if record.is_running:
        return f"Running: in round {done + 1} of {planned}"
    return f"Not finished: stopped after round {done} of {planned}"


def tiles(record: RunRecord, measured: BeforeAfter) -> Html:
    """Give the figures that a reader looks for first."""
    times = [one.seconds for one in record.rounds if one.seconds is not None]
    progress = f"{len(record.rounds)} of {record.config.training.rounds}"
    found = [_tile("Rounds", progress, f"{sum(times):,.0f} seconds" if times else "")]
    if record.rounds:
        found = [
            _loss_tile(record, measured),
            *found,
            _agents_tile(record),
            _traffic_tile(record),
            _privacy_tile(total_statements(record)),
        ]
    return element("dl", *found, kind="tiles")


def samples(measured: BeforeAfter) -> Html:
    """Show what the model wrote before and after, side by side; nothing if neither was generated."""
    if measured.sample_before is None and measured.sample_after is None:
        return Html("")
    pair = [
        element(
            "div", element("h3", name), element("pre", element("b", measured.prompt), sample.rstrip()), kind="sample"
        )
        for name, sample in (("Before", measured.sample_before), ("After", measured.sample_after))
        if sample is not None
    ]
    return element(
        "section",
        element("h2", "What the model writes"),
        element("p", "The prompt is in bold; the rest is the model’s.", kind="note"),
        element("div", *pair, kind="pair"),
    )


def _loss_tile(record: RunRecord, measured: BeforeAfter) -> Html:
    name, before, after = "before → after", measured.held_out_loss_before, measured.held_out_loss_after
    if before is None and after is None:
        losses = [loss for one in record.rounds if (loss := mean_loss(one, "held_out_loss")) is not None]
        if losses:
            name, before, after = "first → last round", losses[0], losses[-1]
    if before is None or after is None:
        return _tile("Held-out loss", wording.loss(before if after is None else after), "")
    change = Html(f"{wording.loss(before)} → {wording.loss(after)}")
    detail = f"perplexity {wording.perplexity(before)} → {wording.perplexity(after)}"
    return _tile(f"Held-out loss, {name}", change, detail)


def _traffic_tile(record: RunRecord) -> Html:
    everyone = [agent for one in record.rounds for agent in one.agents.values()]
    up, down = bytes_per_token(everyone, "up"), bytes_per_token(everyone, "down")
    if up is None and down is None:
        return _tile("Bytes per token", wording.NOT_SHARED, "")
    whole = wording.size(total_bytes(everyone, "up")), wording.size(total_bytes(everyone, "down"))
    rates = Html(f"↑ {wording.count(up)} &nbsp;↓ {wording.count(down)}")
    return _tile("Bytes per token", rates, Html(f"{whole[0]} up, {whole[1]} down"))


def _agents_tile(record: RunRecord) -> Html:
    counted = {name for one in record.rounds for name in one.agents}
    in_last = len(record.rounds[-1].agents)
    detail = "took part" if in_last == len(counted) else f"took part, {in_last} of them in the last round"
    return _tile(
        "Agents", f"{len(counted)} of {record.config.federation.population or record.config.federation.agents}", detail
    )


def _privacy_tile(statements: Collection[str]) -> Html:
    name = "Privacy in total"
    if len(statements) != 1:
        detail = "The agents differ; see what was given away." if statements else ""
        return _tile(name, "see below" if statements else wording.NOT_SHARED, detail, kind="wide")
    value, _, reason = next(iter(statements)).partition(": ")
    return _tile(name, value, reason, kind="wide warning" if value == "none" else "wide")


def _tile(name: str, value: str, detail: str, *, kind: str = "") -> Html:
    below = [element("dd", detail, kind="detail")] if detail else []
    return element("div", element("dt", name), element("dd", value, kind="value"), *below, kind=kind)


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
