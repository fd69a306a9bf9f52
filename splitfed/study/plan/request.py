"""What is asked of the planner, and its answer: plans for each device, the choice, and what rules out the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitfed.config import RunConfig
from splitfed.config.device import DeviceProfile, LinkSection
from splitfed.config.plan import Aim, Limits
from splitfed.config.run import CodecName
from splitfed.study.cost import ModelShape
from splitfed.study.plan.choice import Constraint, judge, pareto
from splitfed.study.plan.evidence import Evidence
from splitfed.study.plan.fleet import choose
from splitfed.study.plan.plans import Axes, Place, Plan, make_plans, noise_for
from splitfed.study.plan.writing import bytes_text, nats, percent, points, seconds
from splitfed.training.protection import with_default_noise

NOISE_LEVELS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Noise multipliers that are tried where a constraint asks for more than the run has."""

OnStage = Callable[[str, float], None]


@dataclass(frozen=True)
class Seat:
    """A device that a plan is wanted for.

    Attributes:
        name: Name of its agent.
        device: Its profile.
        link: How it reaches the server.
    """

    name: str
    device: DeviceProfile
    link: LinkSection


@dataclass(frozen=True)
class Request:
    """What is asked of the planner.

    Attributes:
        shape: The model.
        run: The run, of which everything is kept that a plan does not choose.
        seats: The devices.
        server: The server's machine.
        limits: What plans have to keep.
        evidence: What losses and leakage go by.
        agents: Agents of a round.
        examples: Rows of a device.
        most_blocks: Most blocks at each end.
        ranks: Ranks to choose among.
        codecs: Codecs to choose among.
        noise: Noise multipliers to choose among; empty: the run's, and more where a limit needs it.
        aim: What counts most among plans that keep the limits.
    """

    shape: ModelShape
    run: RunConfig
    seats: Sequence[Seat]
    server: DeviceProfile
    limits: Limits
    evidence: Evidence
    agents: int = 1
    examples: int = 1000
    most_blocks: int = 4
    ranks: Sequence[int] = (4, 8, 16)
    codecs: Sequence[CodecName] = ("none", "bf16", "int8")
    noise: Sequence[float] = ()
    aim: Aim = "loss"


@dataclass(frozen=True)
class Answer:
    """What the planner says.

    Attributes:
        frontier: Plans of each device that keep its limits and that no other one beats in everything.
        chosen: A plan for each device; empty where there is none.
        sentences: What each limit rules out, by device.
    """

    frontier: Mapping[str, list[Plan]]
    chosen: Mapping[str, Plan]
    sentences: Sequence[str]


def plan(request: Request, on_stage: OnStage = lambda what, part: None) -> Answer:
    """Answer a request.

    Args:
        request: What is asked.
        on_stage: Told what is being done, and the part that is.

    Raises:
        ConfigError: If a profile lacks a rate, or no noise keeps the epsilon.
        SplitFedError: If the model's costs cannot be told.
    """
    axes = Axes(request.most_blocks, request.ranks, request.codecs, noise_multipliers(request))
    allowed: dict[str, list[Plan]] = {}
    sentences: list[str] = []
    for number, seat in enumerate(request.seats):
        place = Place(seat.device, seat.link, request.server, agents=request.agents, examples=request.examples)
        made = make_plans(
            request.shape,
            request.run,
            place,
            axes,
            request.evidence,
            on_progress=lambda part, name=seat.name, before=number: on_stage(  # type: ignore[misc]
                f"plans for {name}", (before + part) / len(request.seats)
            ),
        )
        verdict = judge(made, constraints(request, seat))
        allowed[seat.name] = verdict.allowed
        prefix = f"{seat.name}: " if len(request.seats) > 1 else ""
        sentences += [prefix + sentence for sentence in verdict.sentences]
    frontier = {name: pareto(plans) for name, plans in allowed.items()}
    pool = frontier if len(request.seats) == 1 else allowed  # what one device does best, another may not be able to do
    chosen = choose(pool, request.aim) if all(pool.values()) else {}
    if not chosen and all(allowed.values()):
        sentences.append(_nothing_shared(allowed))
    return Answer(frontier, chosen, sentences)


def noise_multipliers(request: Request) -> list[float]:
    """Give the noise multipliers to try: what was asked for; else the run's, and more where a limit needs more.

    Raises:
        ConfigError: If no noise keeps the epsilon.
    """
    if request.noise:
        return sorted(set(request.noise))
    epsilon = request.limits.epsilon or request.run.privacy.epsilon
    if epsilon is not None:
        found = set(noise_for(request.run, epsilon, examples=request.examples))
    else:
        found = {with_default_noise(request.run.privacy).noise_multiplier or 0.0}
    if request.limits.leakage is not None:
        found |= {level for level in NOISE_LEVELS if level > min(found)}
    return sorted(found)


def constraints(request: Request, seat: Seat) -> list[Constraint]:
    """List what a device's plans have to keep: what was asked for, and what its memory and the server's allow."""
    limits, device = request.limits, seat.device.device
    found = []
    if limits.memory_bytes is None or limits.memory_bytes > device.memory_bytes:
        name = f"the device's memory of {bytes_text(device.memory_bytes)}"
        found.append(Constraint(name, device.memory_bytes, lambda plan: plan.memory_bytes, bytes_text, is_asked=False))
    else:
        name = f"--max-memory {bytes_text(limits.memory_bytes)}"
        found.append(Constraint(name, limits.memory_bytes, lambda plan: plan.memory_bytes, bytes_text))
    of_server = request.server.device.memory_bytes
    name = f"the server's memory of {bytes_text(of_server)}"
    found.append(Constraint(name, of_server, lambda plan: plan.server_memory_bytes, bytes_text, is_asked=False))
    if limits.step_s is not None:
        name = f"--max-step {seconds(limits.step_s)}"
        found.append(Constraint(name, limits.step_s, lambda plan: plan.step_s, seconds))
    if limits.step_bytes is not None:
        name = f"--max-bytes {bytes_text(limits.step_bytes)}"
        found.append(Constraint(name, limits.step_bytes, lambda plan: plan.step_bytes, bytes_text))
    if limits.loss_nats is not None:
        name = f"--max-loss-cost {limits.loss_nats:g}"
        found.append(Constraint(name, limits.loss_nats, lambda plan: plan.loss.nats, nats))
    if limits.leakage is not None:
        name = f"--max-leakage {percent(limits.leakage)}"
        found.append(Constraint(name, limits.leakage, lambda plan: plan.leakage.most, percent, points))
    if limits.epsilon is not None:
        name = f"--epsilon {limits.epsilon:g}"
        found.append(Constraint(name, limits.epsilon, lambda plan: plan.epsilon, lambda value: f"{value:.4g}"))
    return found


def _nothing_shared(allowed: Mapping[str, Sequence[Plan]]) -> str:
    each = []
    for name, plans in allowed.items():
        codecs = " or ".join(sorted({plan.codec for plan in plans}))
        noise = " or ".join(f"{value:g}" for value in sorted({plan.noise_multiplier for plan in plans}))
        each.append(f"{name} has {codecs} with noise {noise}")
    return (
        "Codec and noise are the run's, and no pair of them serves every device: "
        f"{', '.join(each)}; loosen a constraint."
    )


__all__ = ["NOISE_LEVELS", "Answer", "Request", "Seat", "constraints", "noise_multipliers", "plan"]
