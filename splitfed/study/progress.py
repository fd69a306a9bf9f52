"""The middle of a report: loss, privacy spent, traffic and time, round after round."""

from splitfed.study import wording
from splitfed.study.measured import BeforeAfter
from splitfed.study.page import Html, element, table
from splitfed.study.plots import FIRST, SECOND, Series, bar_plot, line_plot
from splitfed.study.record import Round, RunRecord
from splitfed.study.summary import (
    CHANNELS,
    Direction,
    LossName,
    bytes_per_token,
    channels,
    largest_epsilon,
    mean_loss,
    total_statements,
)

_MOST_TOTALS = 8


def plots_section(record: RunRecord, measured: BeforeAfter) -> Html:
    """Plot the losses and the traffic over the rounds; what nobody shared is said to be so."""
    if not record.rounds:
        return Html("")
    return element("section", element("div", _loss_figure(record, measured), _traffic_figure(record), kind="pair"))


def rounds_section(record: RunRecord, measured: BeforeAfter) -> Html:
    """Give the table of rounds, with the terms under which its epsilons hold."""
    heading = element("h2", "Rounds")
    if not record.rounds:
        return element("section", heading, element("p", "No round has ended yet.", kind="note"))
    names = channels(record.rounds)
    head = ["Round", "Training loss", "Held-out loss", *(f"ε {CHANNELS.get(name, name)}" for name in names)]
    losses = _held_out_losses(record, measured)
    rows = [_row(finished, loss, names) for finished, loss in zip(record.rounds, losses, strict=True)]
    return element(
        "section",
        heading,
        table([*head, "B/token ↑", "B/token ↓", "Seconds"], rows),
        element("p", _terms(record, measured), kind="note"),
        _total(record),
    )


def _total(record: RunRecord) -> Html:
    """Say what holds for all channels together, where all agents say the same, or few say something else."""
    said = total_statements(record)
    if not said:
        return Html("")
    if len(said) == 1:
        return element("p", f"Total: {next(iter(said))}.", kind="warning")
    told = "Total, which differs from agent to agent (all of them are under What was given away):"
    return element(
        "div",
        element("p", told),
        *(element("p", f"{', '.join(names)}: {statement}.") for statement, names in list(said.items())[:_MOST_TOTALS]),
        kind="warning",
    )


def _row(finished: Round, held_out_loss: float | None, names: list[str]) -> list[str]:
    agents = list(finished.agents.values())
    return [
        str(finished.number),
        wording.loss(mean_loss(finished, "training_loss")),
        wording.loss(held_out_loss),
        *(wording.epsilon(largest_epsilon(finished, name)) for name in names),
        wording.count(bytes_per_token(agents, "up")),
        wording.count(bytes_per_token(agents, "down")),
        wording.seconds(finished.seconds),
    ]


def _terms(record: RunRecord, measured: BeforeAfter) -> str:
    """Say what the columns mean: over which agents, and for epsilon its delta, unit and relation."""
    agents = [agent for one in record.rounds for agent in one.agents.values()]
    meanings = "; ".join(
        sorted(
            {
                f"δ = {wording.delta(agent.delta)}, unit {agent.unit or 'not shared'}, "
                f"relation {agent.relation or 'not shared'}"
                for agent in agents
                if agent.delta is not None
            }
        )
    )
    losses = "Losses in nats per token, the agents’ mean by weight."
    if measured.held_out_loss_by_round:
        losses += " Held-out loss measured on each round’s exported adapter."
    if any(value is not None for agent in agents for value in (agent.epsilon or {}).values()):
        losses += " Training loss is taken with the agents’ noise on."
    if not meanings:
        return f"{losses} No agent shared its epsilons."
    sharing = sum(agent.epsilon is not None for agent in record.rounds[-1].agents.values())
    of_whom = f"{sharing} of {len(record.rounds[-1].agents)} agents"
    return f"{losses} ε per channel, spent by the end of the round, the largest of {of_whom}: {meanings}."


def _loss_figure(record: RunRecord, measured: BeforeAfter) -> Html:
    series = []
    training = [mean_loss(one, "training_loss") for one in record.rounds]
    if any(loss is not None for loss in training):
        series.append(Series("training", FIRST, training, _of_agents(record, "training_loss")))
    held_out = _held_out_losses(record, measured)
    if any(loss is not None for loss in held_out):
        of_agents = () if measured.held_out_loss_by_round else _of_agents(record, "held_out_loss")
        series.append(Series("held-out", SECOND, held_out, of_agents))
    if not series:
        return _figure("Loss", "", "No agent shared its losses.")
    plot = line_plot(_numbers(record), series, label="nats per token", description="Loss by round")
    has_agents = any(one.per_agent for one in series)
    return _figure("Loss", plot, "Bold: all agents together. Thin: each agent." if has_agents else "")


def _held_out_losses(record: RunRecord, measured: BeforeAfter) -> list[float | None]:
    if measured.held_out_loss_by_round:
        return [measured.held_out_loss_by_round.get(one.number) for one in record.rounds]
    return [mean_loss(one, "held_out_loss") for one in record.rounds]


def _of_agents(record: RunRecord, name: LossName) -> list[list[float | None]]:
    """Each agent's loss over the rounds; nothing for a single agent, whose loss is the mean."""
    if len(record.agent_names) < 2:
        return []
    return [
        [getattr(one.agents[agent], name) if agent in one.agents else None for one in record.rounds]
        for agent in record.agent_names
    ]


def _traffic_figure(record: RunRecord) -> Html:
    series = []
    ways: tuple[tuple[Direction, str, str], ...] = (
        ("up", "agents to server", FIRST),
        ("down", "server to agents", SECOND),
    )
    for direction, name, color in ways:
        values = [bytes_per_token(one.agents.values(), direction) for one in record.rounds]
        if any(value is not None for value in values):
            series.append(Series(name, color, values))
    if not series:
        return _figure("Traffic", "", "The traffic was not shared.")
    plot = bar_plot(_numbers(record), series, label="bytes per token", description="Bytes per token by round")
    return _figure("Traffic", plot, "What the run counted on the wire ÷ tokens.")


def _figure(name: str, plot: str, caption: str) -> Html:
    return element("figure", element("h3", name), Html(plot), element("figcaption", caption) if caption else "")


def _numbers(record: RunRecord) -> list[int]:
    return [one.number for one in record.rounds]
