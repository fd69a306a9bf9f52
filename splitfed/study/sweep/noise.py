"""Noise that can be drawn again: in a sweep nothing leaves the process, and a run has to give the same bits twice."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

from splitfed.privacy import (
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Mechanism,
    MetricMechanism,
    NoiseStream,
    PerExampleMechanism,
    UpdateMechanism,
)
from splitfed.training.releases import LedgeredReleases


def with_repeatable_noise(gate: LedgeredReleases, *names: str) -> LedgeredReleases:
    """Give the same gate with noise that depends on nothing but names: same clip, same standard deviation, same ledger.

    Whoever knows the names can take the noise away again: what passes such a gate must not leave the process.

    Args:
        gate: The gate.
        *names: Names of run and client; the noise of two runs or clients is independent.
    """

    def stream(channel: str) -> NoiseStream:
        return NoiseStream(hashlib.sha256("\0".join((*names, channel)).encode()).digest())

    per_example, update = gate.per_example, gate.update
    return replace(
        gate,
        smashed_mechanism=_rebuilt(gate.smashed_mechanism, lambda: stream("smashed")),
        output_gradient_mechanism=_rebuilt(gate.output_gradient_mechanism, lambda: stream("output_gradient")),
        per_example=per_example
        and PerExampleMechanism(per_example.clipping_norm, per_example.noise_multiplier, stream("adapter")),
        update=update and UpdateMechanism(update.clipping_norm, update.noise_multiplier, stream("adapter")),
    )


def _rebuilt(mechanism: Mechanism, stream: Callable[[], NoiseStream]) -> Mechanism:
    clip_and_noise = (getattr(mechanism, "clipping_norm", 0.0), mechanism.noise_multiplier)
    if isinstance(mechanism, GaussianTokenMechanism):
        return GaussianTokenMechanism(*clip_and_noise, rows=mechanism.rows, stream=stream())
    if isinstance(mechanism, GaussianSequenceMechanism):
        return GaussianSequenceMechanism(*clip_and_noise, mechanism.per, stream())
    if isinstance(mechanism, MetricMechanism):
        return MetricMechanism(mechanism.eta, stream())
    return mechanism  # no noise
