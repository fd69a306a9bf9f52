"""The part of a report about the agents: who took part, and what each gave away."""

from splitfed.study import wording
from splitfed.study.page import Html, element, table
from splitfed.study.record import AgentRound, RunRecord
from splitfed.study.summary import CHANNELS, bytes_per_token, channels, epsilon


def agents_section(record: RunRecord) -> Html:
    """List who took part, each with its own rounds below."""
    heading = element("h2", "Who took part")
    if not record.agent_names:
        return element("section", heading, element("p", "Nobody has finished a round yet.", kind="note"))
    is_asked = any(one.selected is not None for one in record.rounds)
    rows = [_summary_row(name, record, is_asked=is_asked) for name in record.agent_names]
    head = ["Agent", "Rounds", *(["Asked"] if is_asked else []), "Weight", "Training loss", "Held-out loss", "Tokens"]
    return element(
        "section",
        heading,
        element("p", "Losses of the agent’s last round; tokens and traffic over all of its rounds.", kind="note"),
        table([*head, "B/token ↑", "B/token ↓"], rows),
        _out_of_the_ordinary(record),
        *(_rounds_of(name, record) for name in record.agent_names),
    )


def privacy_section(record: RunRecord) -> Html:
    """Give each agent's epsilons by channel with their delta, unit and relation, and the agent's total statement."""
    if not record.rounds:
        return Html("")
    heading = element("h2", "What was given away")
    if all(agent.epsilon is None for one in record.rounds for agent in one.agents.values()):
        return element("section", heading, element("p", "No agent shared what its ledger says.", kind="note"))
    names = channels(record.rounds)
    head = ["Agent", "Total", *(f"ε {CHANNELS.get(name, name)}" for name in names), "δ", "Unit", "Relation"]
    rows = []
    for agent_name in record.agent_names:
        own = _rounds(agent_name, record)
        rows.append([agent_name, *_privacy_cells(own[-1][1] if own else AgentRound(), names)])
    return element(
        "section",
        heading,
        element(
            "p",
            "An ε by channel is what was charged to it so far, and no guarantee by itself: adapters carry what they "
            "learned into the other channels. What holds is the total. A large ε promises little.",
            kind="note",
        ),
        table(head, rows),
    )


def _privacy_cells(agent: AgentRound, names: list[str]) -> list[str]:
    return [
        wording.NOT_SHARED if agent.total is None else wording.total(agent.total),
        *(wording.epsilon(epsilon(agent, name)) for name in names),
        wording.delta(agent.delta),
        *(wording.NOT_SHARED if value is None else value for value in (agent.unit, agent.relation)),
    ]


def _summary_row(name: str, record: RunRecord, *, is_asked: bool) -> list[str]:
    own = [agent for _, agent in _rounds(name, record)]
    last = own[-1] if own else AgentRound()
    tokens = [agent.tokens for agent in own if agent.tokens is not None]
    return [
        name,
        f"{len(own)} of {len(record.rounds)}",
        *([str(sum(name in (one.selected or ()) for one in record.rounds))] if is_asked else []),
        wording.count(last.weight),
        wording.loss(last.training_loss),
        wording.loss(last.held_out_loss),
        wording.count(sum(tokens) if tokens else None),
        wording.count(bytes_per_token(own, "up")),
        wording.count(bytes_per_token(own, "down")),
    ]


def _out_of_the_ordinary(record: RunRecord) -> Html:
    """List who was late, left out, refused, replaced, or gone, and when; nothing if nobody was."""
    rows = []
    for one in record.rounds:
        rows += [[str(one.number), name, "; ".join(words)] for name, words in one.happened.items()]
        if one.begun_again:
            times = "once" if one.begun_again == 1 else f"{one.begun_again} times"
            rows.append([str(one.number), "all", f"its joint steps began again {times}"])
        if one.staleness is not None and one.staleness.oldest:
            stale = f"steps were {one.staleness.mean:g} others old on average, {one.staleness.oldest} at most"
            rows.append([str(one.number), "all", stale])
    if not rows:
        return Html("")
    return Html(element("h3", "Out of the ordinary") + table(["Round", "Agent", "What"], rows, kind="told"))


def _rounds_of(name: str, record: RunRecord) -> Html:
    own = _rounds(name, record)
    if not own:
        return Html("")
    names = channels(record.rounds)
    head = ["Round", "Training loss", "Held-out loss", *(f"ε {CHANNELS.get(channel, channel)}" for channel in names)]
    rows = [
        [
            str(number),
            wording.loss(agent.training_loss),
            wording.loss(agent.held_out_loss),
            *(wording.epsilon(epsilon(agent, channel)) for channel in names),
            wording.count(agent.tokens),
            wording.size(agent.bytes_up),
            wording.size(agent.bytes_down),
            wording.seconds(agent.seconds),
        ]
        for number, agent in own
    ]
    return element(
        "details", element("summary", f"{name}, round by round"), table([*head, "Tokens", "↑", "↓", "Seconds"], rows)
    )


def _rounds(name: str, record: RunRecord) -> list[tuple[int, AgentRound]]:
    return [(one.number, one.agents[name]) for one in record.rounds if name in one.agents]
