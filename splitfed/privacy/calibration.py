"""From an epsilon to the noise multiplier that keeps it."""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from splitfed.privacy.accounting import ZERO_OUT, Composition, squared_signal
from splitfed.privacy.accounting import epsilon as epsilon_of

_MANTISSAS: Final = 9000  # of four digits: 1000 to 9999
_SMALLEST_EXPONENT: Final = -15  # 1e-12
_EXPONENTS: Final = 170


def noise_multiplier_for(epsilon: float, delta: float, releases: int) -> float:
    """Find the least noise with which Gaussian releases keep an epsilon, under replace-one.

    Args:
        epsilon: The epsilon to keep, above 0 and finite.
        delta: The delta to keep it at, between 0 and 1.
        releases: Releases that depend on one unit, at least 1.

    Returns:
        The noise multiplier of each release, std ÷ sensitivity, with four digits.

    Raises:
        ValueError: If an argument is outside its range, or no noise multiplier up to 1e155 is enough.

    Guarantees:
        * The releases keep epsilon with it, and would not with the next smaller number of four digits.
    """
    _check_epsilon(epsilon)
    if releases < 1:
        raise ValueError(f"Noise is calibrated for at least 1 release, not {releases}.")

    def keeps(noise_multiplier: float) -> bool:
        spent = epsilon_of([(noise_multiplier, releases)], delta)
        return spent is not None and spent <= epsilon

    return _least(keeps, epsilon)


def sampled_noise_multiplier_for(
    epsilon: float,
    delta: float,
    *,
    sample_rate: float,
    steps: int,
    channels: int = 1,
    unsampled: int = 0,
    overflow: float = 0.0,
) -> float:
    """Find the least noise with which sampled steps keep an epsilon, under zero-out.

    Args:
        epsilon: The epsilon to keep, above 0 and finite.
        delta: The delta to keep it at, between 0 and 1.
        sample_rate: Probability with which a step draws a record, in secret, in 0 to 1.
        steps: Steps, at least 0.
        channels: Releases of a step that depend on one record, at least 1.
        unsampled: Releases that depend on one record whatever is drawn, at least 0.
        overflow: Probability, over all steps, that a sample does not fit its batch; from delta on, sampling brings
            nothing.

    Returns:
        The noise multiplier of each release, std ÷ sensitivity under replace-one, with four digits; opacus's would be
        twice as large.

    Raises:
        ValueError: If an argument is outside its range, nothing is released, or no noise multiplier up to 1e155 is
            enough.

    Guarantees:
        * The releases keep epsilon with it, and would not with the next smaller number of four digits.
        * At most half of what ``noise_multiplier_for`` gives for as many releases without sampling, rounded up.
    """
    _check_epsilon(epsilon)
    if channels < 1 or unsampled < 0 or steps < 0 or steps + unsampled < 1:
        raise ValueError(
            "Noise is calibrated for at least 1 channel and 1 step or release, "
            f"not {channels} channels, {steps} steps and {unsampled} releases."
        )

    def keeps(noise_multiplier: float) -> bool:
        certain, step = (squared_signal([(noise_multiplier, count)]) for count in (unsampled, channels))
        spent = Composition(certain, {(sample_rate, step): steps}, overflow).epsilon(delta, ZERO_OUT)
        return spent is not None and spent <= epsilon

    return _least(keeps, epsilon)


def _least(keeps: Callable[[float], bool], epsilon: float) -> float:
    """Find the least number of four digits that keeps an epsilon, as all larger ones do."""
    found = bisect_left(range(_MANTISSAS * _EXPONENTS), True, key=lambda index: keeps(_number(index)))
    if found == _MANTISSAS * _EXPONENTS:
        raise ValueError(f"No noise is enough for epsilon {epsilon:g}; choose a larger epsilon or delta.")
    return _number(found)


def _number(index: int) -> float:
    """Count through the numbers of four digits."""
    exponent, mantissa = divmod(index, _MANTISSAS)
    return float(f"{mantissa + 1000}e{exponent + _SMALLEST_EXPONENT}")


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be above 0 and finite, not {epsilon}.")
