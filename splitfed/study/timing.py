"""The part of a report about time: how much of each agent's was its own work, the server's, and the way between."""

from splitfed.study import wording
from splitfed.study.page import Html, element, table
from splitfed.study.plots import FIRST, MUTED, SECOND, Series, stacked_plot
from splitfed.study.record import AgentRound, RunRecord
from splitfed.study.summary import TimeSplit, time_split


def time_section(record: RunRecord) -> Html:
    """Split the time of each agent whose own figures are there; says why where nothing can be split."""
    if not record.rounds:
        return Html("")
    heading = element("h2", "Where the time went")
    splits = {name: _of_agent(name, record) for name in record.agent_names}
    known = {name: split for name, split in splits.items() if split is not None}
    if not known:
        return element("section", heading, element("p", _why_not(record), kind="note"))
    rows = [
        [
            name,
            wording.seconds(split.agent_s + split.link_s + split.server_s),
            *(wording.share(part, split.whole_s) for part in (split.agent_s, split.link_s, split.server_s)),
        ]
        for name, split in known.items()
    ]
    series = [
        Series("agent", FIRST, [split.agent_s for split in known.values()]),
        Series("link", MUTED, [split.link_s for split in known.values()]),
        Series("server", SECOND, [split.server_s for split in known.values()]),
    ]
    plot = stacked_plot(list(known), series, label="seconds", description="Seconds of each agent, by where they went")
    return element(
        "section",
        heading,
        element(
            "p",
            "Agent: it did not wait. Server: it waited, and the server had a request of it in hand, other agents that "
            "this waited for included. Link: the rest of its waiting. Where both sides worked at once, with several "
            "micro-batches in flight, the server’s part is counted first, so that the link’s is the least it can be.",
            kind="note",
        ),
        element("div", element("figure", Html(plot)), table(_HEAD, rows), kind="pair"),
    )


_HEAD = ["Agent", "Seconds", "Agent’s work", "Link", "Server"]


def _of_agent(name: str, record: RunRecord) -> TimeSplit | None:
    """Add up the rounds of an agent in which everything was measured."""
    own = [agent for one in record.rounds if (agent := one.agents.get(name, AgentRound())).seconds is not None]
    splits = [split for agent in own if (split := time_split(agent)) is not None]
    if not splits:
        return None
    return TimeSplit(
        sum(split.agent_s for split in splits),
        sum(split.link_s for split in splits),
        sum(split.server_s for split in splits),
    )


def _why_not(record: RunRecord) -> str:
    everyone = [agent for one in record.rounds for agent in one.agents.values()]
    if all(agent.seconds is None for agent in everyone):
        return "No agent shared its own figures, which the time can be split by."
    return "This run was made before agents and server measured how long they wait; its time cannot be split."
