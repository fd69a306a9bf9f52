"""The planner as a command: from options to a plan, and to its configuration files."""

import math
from pathlib import Path

from splitfed.config import AgentConfig, ServerConfig
from splitfed.config.plan import PlanOptions
from splitfed.errors import ConfigError
from splitfed.models import resolve_base
from splitfed.privacy import format_epsilon
from splitfed.study.command_line import stages_on_stderr
from splitfed.study.cost import model_shape
from splitfed.study.plan.classes import device_profile
from splitfed.study.plan.evidence import evidence
from splitfed.study.plan.files import agent_config, agent_name, server_config, write_files
from splitfed.study.plan.request import Answer, OnStage, Request, Seat, plan
from splitfed.study.plan.told import Made, expected
from splitfed.study.plan.writing import bytes_text
from splitfed.study.profile import measure_device


def plan_at_terminal(options: PlanOptions) -> Made:
    """Make a plan, say on stderr how far it is, and write its configuration where that is asked for.

    Args:
        options: The options of the command.

    Raises:
        ConfigError: If nothing keeps the limits, with by how much; or something of the options cannot be used.
        SplitFedError: If the model cannot be used.
    """
    with stages_on_stderr() as on_stage:
        request = _request(options, on_stage)
        answer = plan(request, on_stage)
    if not answer.chosen:
        raise ConfigError(f"{' '.join(answer.sentences)} Loosen it, or plan with another model, device or link")
    written = [] if options.output is None else _written(options.output, options, answer)
    return Made(request, answer, options.show, written)


def _request(options: PlanOptions, on_stage: OnStage) -> Request:
    config = options.config
    if options.measure and options.link is None:
        raise ConfigError("--measure tells nothing of the link; add --link, such as 20mbit,40ms")
    server = device_profile(options.server)
    profiles = [device_profile(each) for each in options.devices]
    base = config.model.base
    if base == "demo" or Path(base).is_dir():
        base = str(resolve_base(base, None))
    shape = model_shape(base, dtype=config.model.dtype)
    if options.measure:
        profiles.append(measure_device(on_progress=lambda what: on_stage(f"measuring {what}", 0.01)))
    seats: list[Seat] = []
    for profile in profiles:
        name = agent_name(profile.device.name)
        if [agent_name(other.device.name) for other in profiles].count(name) > 1:
            name += f"-{1 + sum(agent_name(seat.device.device.name) == name for seat in seats)}"
        link = options.link or profile.link
        if link is None:
            raise ConfigError(
                f"the profile of {profile.device.name} has no link; add --link, such as 20mbit,40ms, or measure it "
                "with splitfed profile --link-to"
            )
        seats.append(Seat(name, profile, link))
    return Request(
        shape=shape,
        run=config.shared(),
        seats=seats,
        server=server,
        limits=options.limits,
        evidence=evidence(options.sweeps, options.audits),
        agents=options.in_a_round,
        examples=options.examples,
        most_blocks=options.most_blocks,
        ranks=options.ranks,
        codecs=options.codecs,
        noise=options.noise,
        aim=options.aim,
    )


def _written(folder: Path, options: PlanOptions, answer: Answer) -> list[Path]:
    listening, address = options.addresses()
    server = server_config(options.config, answer.chosen, agents=options.agents, address=listening)
    most_bytes = max(each.server_memory_bytes for each in answer.chosen.values())
    comment = f"Planned for {', '.join(answer.chosen)}.\nExpected: {bytes_text(most_bytes)} of memory."
    files: dict[str, tuple[ServerConfig | AgentConfig, str]] = {"server.toml": (server, comment)}
    data = str(Path(options.data).resolve()) if Path(options.data).exists() else options.data
    for name, chosen in answer.chosen.items():
        agent = agent_config(name, chosen, server, address=address, data=data)
        spent = f"epsilon {format_epsilon(chosen.epsilon)}" if math.isfinite(chosen.epsilon) else "no epsilon"
        comment = (
            f"Planned for {name}: {chosen}.\nExpected: {expected(chosen)};\n{spent} for the whole run, with "
            f"{options.examples} rows of one sequence each: longer rows cost more."
        )
        files[f"agent-{name}.toml"] = (agent, comment)
    return write_files(folder, files)
