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
    rows = [_summary_row(name, record) for name in record.agent_names]
    head = ["Agent", "Rounds", "Weight", "Training loss", "Held-out loss", "Tokens", "B/token ↑", "B/token ↓"]
    return element(
        "section",
        heading,
        element("p", "Losses of the agent’s last round; tokens and traffic over all of its rounds.", kind="note"),
        table(head, rows),
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
    head = ["Agent", *(f"ε {CHANNELS.get(name, name)}" for name in names), "δ", "Unit", "Relation", "Total"]
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
        *(wording.epsilon(epsilon(agent, name)) for name in names),
        wording.delta(agent.delta),
        *(wording.NOT_SHARED if value is None else value for value in (agent.unit, agent.relation, agent.total)),
    ]


def _summary_row(name: str, record: RunRecord) -> list[str]:
    own = [agent for _, agent in _rounds(name, record)]
    last = own[-1] if own else AgentRound()
    tokens = [agent.tokens for agent in own if agent.tokens is not None]
    return [
        name,
        str(len(own)),
        wording.count(last.weight),
        wording.loss(last.training_loss),
        wording.loss(last.held_out_loss),
        wording.count(sum(tokens) if tokens else None),
        wording.count(bytes_per_token(own, "up")),
        wording.count(bytes_per_token(own, "down")),
    ]


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
