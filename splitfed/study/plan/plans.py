"""Every way to cut a run for a device: what each costs, and what it is expected to lose and to leak."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from splitfed.config import CodecSection, LoraSection, PrivacySection, RunConfig
from splitfed.config.device import DeviceProfile, LinkSection
from splitfed.config.privacy import refuse_unsound
from splitfed.config.run import DIRECTIONS, CodecName
from splitfed.errors import ConfigError
from splitfed.study.cost import (
    ModelShape,
    SplitPoint,
    StepTime,
    Workload,
    cost_of,
    peak_memory_bytes,
    step_time,
)
from splitfed.study.plan.evidence import Evidence
from splitfed.study.plan.leakage import Leakage
from splitfed.study.plan.levels import Target
from splitfed.study.plan.loss import LossCost
from splitfed.training import protection

OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class Axes:
    """What a plan chooses among.

    Attributes:
        most_blocks: Most blocks at each end.
        ranks: Ranks of the adapter.
        codecs: Codecs, each for all directions of the cut.
        noise_multipliers: Noise multipliers; 0 = no noise.
    """

    most_blocks: int
    ranks: Sequence[int]
    codecs: Sequence[CodecName]
    noise_multipliers: Sequence[float]


@dataclass(frozen=True)
class Place:
    """A device in a run.

    Attributes:
        device: The device.
        link: How it reaches the server.
        server: The server's machine.
        agents: Agents that take part in a round, this one included.
        examples: Rows that the device has.
    """

    device: DeviceProfile
    link: LinkSection
    server: DeviceProfile
    agents: int = 1
    examples: int = 1000


@dataclass(frozen=True)
class Plan:
    """One way to cut a run, and what is expected of it.

    Attributes:
        split_point: Where the model is cut.
        rank: Of the adapter.
        codec: In every direction of the cut.
        noise_multiplier: Of every channel; 0 = no noise.
        memory_bytes: Most memory of the agent's process.
        server_memory_bytes: Most memory of the server's process, with all agents of a round.
        step: How long a local step takes, for this agent alone.
        step_s: The same with the server's time shared among the agents of a round.
        up_bytes: Bytes of a step, agent to server.
        down_bytes: Bytes of a step, server to agent.
        weight_bytes: The agent's share of the base model, which it fetches first unless it has the base model.
        fetch_s: How long that takes on its link.
        loss: What it costs in loss.
        leakage: What attacks recover.
        epsilon: What the whole run costs the record that is worst off; infinite where nothing is guaranteed.
    """

    split_point: SplitPoint
    rank: int
    codec: CodecName
    noise_multiplier: float
    memory_bytes: int
    server_memory_bytes: int
    step: StepTime
    step_s: float
    up_bytes: int
    down_bytes: int
    weight_bytes: int
    fetch_s: float
    loss: LossCost
    leakage: Leakage
    epsilon: float

    def __str__(self) -> str:
        cut = self.split_point
        noise = f"noise {self.noise_multiplier:g}" if self.noise_multiplier else "no noise"
        return f"{cut.bottom_blocks} + {cut.top_blocks} blocks, rank {self.rank}, codec {self.codec}, {noise}"

    @property
    def step_bytes(self) -> int:
        """Bytes of a step, both ways."""
        return self.up_bytes + self.down_bytes


def split_points(shape: ModelShape, privacy: PrivacySection, most_blocks: int) -> list[SplitPoint]:
    """List the split points that leave the trunk a block, and that the run's units of privacy allow."""
    found = []
    for bottom in range(min(most_blocks, shape.n_blocks - 1) + 1):
        for top in range(min(most_blocks, shape.n_blocks - 1 - bottom) + 1):
            try:
                refuse_unsound(privacy, bottom_blocks=bottom, top_blocks=top)
            except ValueError:
                continue
            found.append(SplitPoint(bottom, top))
    return found


def make_plans(
    shape: ModelShape,
    run: RunConfig,
    place: Place,
    axes: Axes,
    evidence: Evidence,
    on_progress: OnProgress = lambda part: None,
) -> list[Plan]:
    """Say of every way to cut a run for a device what it costs.

    Args:
        shape: The model.
        run: The run, of which everything is kept that a plan does not choose.
        place: The device, its link and its server.
        axes: What there is to choose among.
        evidence: What losses and leakage go by.
        on_progress: Told the part that is done.

    Raises:
        UnsupportedFamily: If the family's cost cannot be told without values.
        ConfigError: If a profile lacks a rate, or the run guarantees something that no attack was measured on.
    """
    if run.privacy.smashed == "metric":
        raise ConfigError(
            'privacy.smashed = "metric" has noise of another kind than what was measured, so its leakage cannot be '
            "planned; choose sequence or token, or try it with splitfed audit"
        )
    target = Target(shape.n_blocks, shape.hidden_size, run.training.max_tokens)
    cuts = split_points(shape, run.privacy, axes.most_blocks)
    epsilon_of = cache(lambda trains, noise: run_epsilon(run, noise, *trains, examples=place.examples))
    plans: list[Plan] = []
    for number, cut in enumerate(cuts):
        on_progress(number / len(cuts))
        for variety in _varieties(run, axes):
            costs = cost_of(shape, cut, Workload.of(variety))
            step = step_time(costs, place.device, place.server, place.link)
            alone = peak_memory_bytes(costs.server, place.server)
            base = place.server.process.memory_bytes + costs.server.weight_bytes
            for noise in axes.noise_multipliers:
                if variety.privacy.is_on != (noise > 0):
                    continue
                rank, codec = variety.lora.rank, variety.codecs.smashed
                plans.append(
                    Plan(
                        split_point=cut,
                        rank=rank,
                        codec=codec,
                        noise_multiplier=noise,
                        memory_bytes=peak_memory_bytes(costs.agent, place.device),
                        server_memory_bytes=base + place.agents * (alone - base),
                        step=step,
                        step_s=max(step.step_s, place.agents * step.server_s),
                        up_bytes=costs.link.up_bytes,
                        down_bytes=costs.link.down_bytes,
                        weight_bytes=costs.agent.weight_bytes,
                        fetch_s=costs.agent.weight_bytes / place.link.down_bytes_per_s,
                        loss=evidence.loss.cost(target, cut, noise=noise, codec=codec, rank=rank),
                        leakage=evidence.leakage.leakage(target, cut, noise=noise),
                        epsilon=epsilon_of((cut.bottom_blocks > 0, cut.top_blocks > 0), noise),
                    )
                )
    on_progress(1.0)
    return plans


def run_epsilon(
    run: RunConfig, noise_multiplier: float, bottom_trains: bool, top_trains: bool, *, examples: int
) -> float:
    """State what a whole run costs a record of a device that has each row once, over all channels.

    Args:
        run: The run.
        noise_multiplier: Of every channel.
        bottom_trains: The bottom has an adapter.
        top_trains: The top has one.
        examples: Rows of the device.
    """
    privacy = run.privacy.model_copy(update={"noise_multiplier": noise_multiplier, "epsilon": None})
    return protection.run_epsilon(privacy, _workload(run, bottom_trains, top_trains, examples))


def noise_for(run: RunConfig, epsilon: float, *, examples: int) -> list[float]:
    """Calibrate noise to an epsilon of the whole run, for each set of segments that may have an adapter.

    Args:
        run: The run.
        epsilon: What the run may cost a record.
        examples: Rows of the device.

    Raises:
        ConfigError: If no noise multiplier keeps it.
    """
    privacy = run.privacy.model_copy(update={"noise_multiplier": None, "epsilon": epsilon})
    found = set()
    for bottom in (False, True):
        for top in (False, True):
            settled = protection.settle_noise(privacy, _workload(run, bottom, top, examples))
            assert settled.noise_multiplier is not None
            found.add(settled.noise_multiplier)
    return sorted(found)


def _workload(run: RunConfig, bottom_trains: bool, top_trains: bool, examples: int) -> protection.Workload:
    records = [str(number) for number in range(examples)]
    return protection.Workload(
        run.training, records, bottom_trains=bottom_trains, top_trains=top_trains, seed=run.run.seed
    )


def _varieties(run: RunConfig, axes: Axes) -> Iterable[RunConfig]:
    """Give the run in each form that has a cost of its own: by rank, codec and whether there is noise."""
    alpha_of_rank = run.lora.alpha / run.lora.rank
    for rank in axes.ranks:
        lora = LoraSection.model_validate(
            {**run.lora.model_dump(), "rank": rank, "least_rank": None, "alpha": alpha_of_rank * rank}
        )
        for codec in axes.codecs:
            codecs = CodecSection(**dict.fromkeys(DIRECTIONS, codec), adapter=run.codecs.adapter)
            for is_noisy in sorted({noise > 0 for noise in axes.noise_multipliers}):
                noise = {"noise_multiplier": 1.0 if is_noisy else 0.0, "epsilon": None}
                privacy = run.privacy.model_copy(update=noise)
                yield run.model_copy(update={"lora": lora, "codecs": codecs, "privacy": privacy})


__all__ = ["Axes", "Place", "Plan", "make_plans", "noise_for", "run_epsilon", "split_points"]
