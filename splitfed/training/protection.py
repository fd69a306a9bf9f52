"""From what owner and run say about privacy to the gate: mechanisms, their clips, and the noise that was asked for."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitfed.config import (
    DEFAULT_NOISE_MULTIPLIER,
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    PrivacySection,
    TrainingSection,
)
from splitfed.errors import ConfigError, WeightsError
from splitfed.models import Bottom, Top, adapter_parameters
from splitfed.privacy import (
    Composition,
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Ledger,
    Mechanism,
    MetricMechanism,
    NoMechanism,
    PerExampleMechanism,
    StepSampling,
    UpdateMechanism,
    gaussian_epsilon,
    gaussian_signal,
    poisson_overflow,
    sampled_noise_multiplier_for,
)
from splitfed.training.order import step_examples
from splitfed.training.releases import LedgeredReleases

_SEQUENCES, _TOKENS = 8, 32
_SHOWN_DIGITS = 4


@dataclass(frozen=True)
class Workload:
    """How often a run releases something of a record, at most.

    Attributes:
        training: Rounds, steps, batch size and length.
        train: The record of each example to train on, at least one.
        held_out: The record of each held-out example; all are evaluated once a round.
        most_of_a_row: Most sequences that one row to train on was cut into; a record of more stands in several rows.
        bottom_trains: The bottom has an adapter.
        top_trains: The top has an adapter.
        client: Name of the client, for its order of examples.
        seed: The run's seed, for the same.
    """

    training: TrainingSection
    train: Sequence[str]
    held_out: Sequence[str] = ()
    most_of_a_row: int = 1
    bottom_trains: bool = True
    top_trains: bool = True
    client: str = ""
    seed: int = 0

    @property
    def steps(self) -> int:
        """Local steps in the run."""
        return self.training.rounds * self.training.local_steps

    @property
    def most_sequences(self) -> int:
        """Most sequences of one record."""
        return max(Counter(self.train).values(), default=0)

    def uses(self) -> dict[str, tuple[int, int]]:
        """Count what the whole run trains on of each record: its sequences, and Σ k² over steps with k of them."""
        found: dict[str, tuple[int, int]] = {}
        for round in range(1, self.training.rounds + 1):
            for step in range(self.training.local_steps):
                drawn = step_examples(
                    len(self.train),
                    seed=self.seed,
                    client=self.client,
                    round=round,
                    step=step,
                    batch_size=self.training.batch_size,
                    local_steps=self.training.local_steps,
                )
                for record, k in Counter(self.train[index] for index in drawn).items():
                    uses, squares = found.get(record, (0, 0))
                    found[record] = uses + k, squares + k * k
        return found

    @property
    def evaluations(self) -> int:
        """Most sequences of one record that are evaluated."""
        return self.training.rounds * max(Counter(self.held_out).values(), default=0)


def settle_clip(privacy: PrivacySection, bottom: Bottom) -> PrivacySection:
    """Fill in what was left to the model: the clip of smashed data, from the bottom's output on random tokens.

    Nobody's text has a part in it, so it costs no privacy; and whatever the bottom is, noise grows with the clip.

    Args:
        privacy: What holds on the device.
        bottom: The bottom at the run's start.

    Returns:
        The section with a clip in it.

    Raises:
        WeightsError: If the bottom's output is not finite, zero, or of no size that could be clipped to.
    """
    if privacy.clipping_norm_smashed is not None:
        return privacy
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(bottom.config.vocab_size, (_SEQUENCES, _TOKENS), generator=draw)
    with torch.no_grad():
        norms = bottom(tokens_BT).float().norm(dim=-1)
    norm = norms.median().item() * (1.0 if privacy.clip == "token" else math.sqrt(_TOKENS))
    if not 1e-20 <= norm <= 1e20:
        raise WeightsError(f"The base model's bottom gives vectors of norm {norm}; fetch the base model again.")
    return privacy.model_copy(update={"clipping_norm_smashed": float(f"{norm:.3g}")})


def settle_noise(privacy: PrivacySection, workload: Workload) -> PrivacySection:
    """Fill in the noise multiplier: the default, or what keeps the epsilon that was asked for over the whole run.

    Args:
        privacy: What holds on the device.
        workload: How often the run releases something of a record.

    Returns:
        The section with a noise multiplier in place of an epsilon.

    Raises:
        ConfigError: If no noise multiplier keeps that epsilon, or a secret sample would outgrow its batch too often.
    """
    if privacy.epsilon is None:
        return with_default_noise(privacy)
    value = _calibrated(privacy, privacy.epsilon, workload)
    if not LEAST_NOISE_MULTIPLIER <= value <= LARGEST_NOISE_MULTIPLIER:
        way = "raise" if value > 1 else "lower"
        raise ConfigError(
            f"[privacy] epsilon = {privacy.epsilon:g} takes a noise multiplier of {value:g}, outside "
            f"{LEAST_NOISE_MULTIPLIER:g} to {LARGEST_NOISE_MULTIPLIER:g}; {way} epsilon"
        )
    return privacy.model_copy(update={"noise_multiplier": value, "epsilon": None})


def run_epsilon(privacy: PrivacySection, workload: Workload) -> float:
    """State what a whole run will cost the record that is worst off, over all channels, as a ledger will count it.

    Args:
        privacy: What holds on the device, settled.
        workload: How often the run releases something of a record.

    Returns:
        Epsilon at the section's delta and relation; infinite where a channel is without an epsilon.

    Raises:
        ConfigError: If a secret sample would outgrow its batch too often.
    """
    trains = workload.bottom_trains or workload.top_trains
    open_channels = privacy.open_channels().keys() - (set() if trains else {"adapter"})
    if open_channels:
        return math.inf
    assert privacy.noise_multiplier is not None
    squared = privacy.noise_multiplier**-2
    sampling = _sampling(privacy, workload)
    if sampling is not None and privacy.sample_rate is not None:
        adapter = (privacy.noise_multiplier_adapter or privacy.noise_multiplier) ** -2 if trains else 0.0
        spent = Composition(
            signal=workload.evaluations * squared,
            sampled={(privacy.sample_rate, 2 * squared + adapter): workload.steps},
            overflow=min(1.0, workload.steps * sampling.overflow),
        ).epsilon(privacy.delta, privacy.relation)
    else:
        shared, fixed = _releases(privacy, workload)
        spent = gaussian_epsilon(shared * squared + fixed, privacy.delta)
    return math.inf if spent is None else spent


def with_default_noise(privacy: PrivacySection) -> PrivacySection:
    """Fill in the default noise multiplier where the section has neither one nor an epsilon."""
    if privacy.noise_multiplier is not None or privacy.epsilon is not None:
        return privacy
    return privacy.model_copy(update={"noise_multiplier": DEFAULT_NOISE_MULTIPLIER})


def smashed_mechanism(privacy: PrivacySection) -> Mechanism:
    """Build what stands between smashed data and the wire.

    Args:
        privacy: What holds on the device, settled.
    """
    assert privacy.clipping_norm_smashed is not None
    assert privacy.noise_multiplier is not None
    if not privacy.is_on:
        return NoMechanism()
    if privacy.smashed == "metric":
        assert privacy.eta is not None
        return MetricMechanism(privacy.eta)
    if privacy.smashed == "token":
        return GaussianTokenMechanism(privacy.clipping_norm_smashed, privacy.noise_multiplier, rows=1)
    return GaussianSequenceMechanism(privacy.clipping_norm_smashed, privacy.noise_multiplier, privacy.clip)


def output_gradient_mechanism(privacy: PrivacySection) -> Mechanism:
    """Build what stands between output gradients and the wire.

    Args:
        privacy: What holds on the device, settled.
    """
    assert privacy.noise_multiplier is not None
    if not privacy.is_on:
        return NoMechanism()
    if privacy.output_gradient == "token":
        return GaussianTokenMechanism(privacy.clipping_norm_output_gradient, privacy.noise_multiplier, rows=2)
    return GaussianSequenceMechanism(privacy.clipping_norm_output_gradient, privacy.noise_multiplier, privacy.clip)


def open_gate(
    privacy: PrivacySection, ledger: Ledger, run_id: str, *, bottom: Bottom, top: Top, workload: Workload | None = None
) -> LedgeredReleases:
    """Build the gate that everything passes which leaves a device.

    Args:
        privacy: What holds on the device, settled.
        ledger: Where releases are charged.
        run_id: The run, for the ledger.
        bottom: The bottom, with its adapter.
        top: The top, with its adapter.
        workload: What is to be trained; needed where steps draw their examples in secret.

    Raises:
        ConfigError: If a secret sample would outgrow its batch too often.
    """
    bottom_trains, top_trains = bool(adapter_parameters(bottom)), bool(adapter_parameters(top))
    noise_multiplier = privacy.noise_multiplier_adapter or privacy.noise_multiplier or 0.0
    protects = privacy.is_on and (bottom_trains or top_trains)
    clipping_norm = privacy.clipping_norm_adapter
    return LedgeredReleases(
        smashed_mechanism=smashed_mechanism(privacy),
        output_gradient_mechanism=output_gradient_mechanism(privacy),
        ledger=ledger,
        run=run_id,
        per_example=PerExampleMechanism(clipping_norm, noise_multiplier)
        if protects and privacy.adapter == "dp-sgd"
        else None,
        update=UpdateMechanism(clipping_norm, noise_multiplier) if protects and privacy.adapter == "update" else None,
        bottom_trains=bottom_trains,
        top_trains=top_trains,
        sampling=_sampling(privacy, workload) if privacy.is_on else None,
    )


def _sampling(privacy: PrivacySection, workload: Workload | None) -> StepSampling | None:
    if privacy.sample_rate is None:
        return None
    assert workload is not None
    if workload.most_of_a_row > 1:
        raise ConfigError(
            f"[privacy] sample_rate needs records of one sequence each, but one is cut into {workload.most_of_a_row}; "
            "raise training.max_tokens, shorten the records, or leave sample_rate out"
        )
    if workload.most_sequences > 1:
        raise ConfigError(
            f"[privacy] sample_rate needs each record once, but one stands in {workload.most_sequences} rows of the "
            "data; remove duplicate rows, or leave sample_rate out"
        )
    capacity, examples = workload.training.batch_size, len(workload.train)
    overflow = poisson_overflow(examples, privacy.sample_rate, capacity, 1)
    if overflow * workload.steps >= privacy.delta:
        raise ConfigError(
            f"[privacy] sample_rate = {privacy.sample_rate:g} draws more than batch_size = {capacity} of {examples} "
            f"examples in one of {workload.steps} steps with probability {min(1.0, overflow * workload.steps):.2g}, "
            f"which delta = {privacy.delta:g} does not cover; raise batch_size, or lower sample_rate"
        )
    return StepSampling(privacy.sample_rate, overflow)


def _calibrated(privacy: PrivacySection, epsilon: float, workload: Workload) -> float:
    """Find the noise multiplier that all channels share."""
    trains = workload.bottom_trains or workload.top_trains
    if privacy.smashed == "metric" or (privacy.adapter == "none" and trains):
        open_channel = 'smashed = "metric"' if privacy.smashed == "metric" else 'adapter = "none"'
        raise ConfigError(
            f"[privacy] epsilon = {epsilon:g} cannot be kept with {open_channel}, which guarantees no epsilon; "
            "choose another mechanism, or give noise_multiplier in place of epsilon"
        )
    if privacy.sample_rate is not None:
        sampling = _sampling(privacy, workload)
        assert sampling is not None
        try:
            return sampled_noise_multiplier_for(
                epsilon,
                privacy.delta,
                sample_rate=privacy.sample_rate,
                steps=workload.steps,
                channels=2 + trains,
                unsampled=workload.evaluations,
                overflow=min(1.0, workload.steps * sampling.overflow),
            )
        except ValueError as error:
            raise ConfigError(f"[privacy] {error}") from error
    shared, fixed = _releases(privacy, workload)
    room = gaussian_signal(epsilon, privacy.delta) - fixed
    if room <= 0 and privacy.noise_multiplier_adapter is None:
        raise ConfigError(f"[privacy] no noise is enough for epsilon = {epsilon:g}; raise epsilon, or delta")
    if room <= 0:
        raise ConfigError(
            f"[privacy] epsilon = {epsilon:g} is spent by the adapter update alone at noise_multiplier_adapter = "
            f"{privacy.noise_multiplier_adapter:g}; raise one of them"
        )
    return _rounded_up(math.sqrt(shared / room))


def _releases(privacy: PrivacySection, workload: Workload) -> tuple[float, float]:
    """Count the releases that fall on the record that is worst off; under zero-out its own count a quarter.

    Returns:
        Those with the shared noise multiplier, counted; and Σ 1/z² of those with a noise multiplier of their own.
    """
    T, is_dp_sgd, own = workload.training.max_tokens, privacy.adapter == "dp-sgd", privacy.noise_multiplier_adapter
    smashed_units = T if privacy.smashed == "token" else 1
    gradient_units = max(T / 2, 1) if privacy.output_gradient == "token" else 1
    everything = workload.steps * workload.training.batch_size
    trains = workload.bottom_trains or workload.top_trains
    common = fixed = 0.0
    if workload.bottom_trains and not is_dp_sgd:
        common += smashed_units * (everything + workload.training.rounds * len(workload.held_out))
    if workload.top_trains and not is_dp_sgd:
        common += gradient_units * everything
    if trains and not is_dp_sgd:
        if own is None:
            common += workload.training.rounds
        else:
            fixed = float(workload.training.rounds)
    own_units: float = smashed_units * (is_dp_sgd or not workload.bottom_trains)
    most, most_fixed = float(workload.evaluations * own_units), 0.0
    own_units += gradient_units * (is_dp_sgd or not workload.top_trains)
    for uses, squares in workload.uses().values():
        adapter = float(squares) if trains and is_dp_sgd else 0.0
        most = max(most, uses * own_units + (adapter if own is None else 0.0))
        most_fixed = max(most_fixed, 0.0 if own is None else adapter)
    part = 0.25 if privacy.relation == "zero-out" else 1.0
    return common + part * most, 0.0 if own is None else (fixed + part * most_fixed) / own**2


def _rounded_up(value: float) -> float:
    scale = 10.0 ** (_SHOWN_DIGITS - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
