"""What secret sampling adds to noise: the Poisson-sampled Gaussian mechanism under zero-out, by Rényi divergences."""

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Final

_SMALLEST_EXCESS: Final = 1e-9  # of an order over 1
_LARGEST_FRACTION: Final = 32.0  # above some 40, opacus's series for an order that is no integer ends too early
_LARGEST_ORDER: Final = 1024  # above 1029, its binomial coefficients overflow
_RATIO: Final = 1.02
_NEIGHBOURS: Final = 2


def sampled_epsilon(sampled: Mapping[tuple[float, float], int], signal: float, delta: float) -> float:
    """State what sampled steps cost under zero-out, together with releases that are not sampled.

    The border to opacus: its ``noise_multiplier`` is std ÷ clip under add/remove. Zero-out moves a contribution by the
    clip as well, and replace-one by twice as much, so a step with squared signal s under replace-one has the multiplier
    (s/4)^(-1/2) there, and a release without sampling the Rényi divergence α · s/8.

    Args:
        sampled: ``(sample rate q, squared signal s of one step)`` to the number of such steps, under replace-one.
        signal: Squared signal of the releases that are not sampled, under replace-one.
        delta: The delta to state epsilon at, between 0 and 1.

    Returns:
        Epsilon; infinite if it cannot be evaluated.

    Guarantees:
        * At least the exact epsilon of the composition: any order gives a valid one, and the least is taken over a grid
          of orders 2 % apart, from 1 + 1e-9 to 1024.
        * Every divergence is rounded up by more than opacus's rounding errors; one that opacus cannot compute is not
          used.

    Source: Mironov, Talwar & Zhang, Rényi differential privacy of the sampled Gaussian mechanism (2019), section 3, for
    the divergence in both directions; Balle et al., Hypothesis testing interpretations and Rényi differential privacy
    (2020), Theorem 21, for the conversion.
    """
    steps = [(rate, 2 / math.sqrt(squared), count) for (rate, squared), count in sorted(sampled.items())]

    @cache
    def epsilon_at(index: int) -> float:
        order = orders[index]
        excess = order - 1
        spent = order * signal / 8 + sum(count * _divergence(rate, noise, order) for rate, noise, count in steps)
        value = spent - (math.log(delta) + math.log(order)) / excess + math.log(excess / order)
        return max(value * (1 + 1e-12), 0.0)

    # (α - 1) · epsilon is convex in α, so epsilon falls up to the best order and grows from there.
    orders = _orders()
    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if epsilon_at(middle) <= epsilon_at(middle + 1) else (middle + 1, high)
    return min(epsilon_at(i) for i in range(max(low - _NEIGHBOURS, 0), min(low + _NEIGHBOURS + 1, len(orders))))


def poisson_overflow(records: int, sample_rate: float, capacity: int, steps: int) -> float:
    """Bound the probability that some step draws more records than its batch has places for.

    It is the probability that the other records alone fill the batch, P[Binomial(records - 1, q) >= capacity], summed
    over the steps. That is a little more than P[Binomial(records, q) > capacity], and it does not depend on whether the
    record in question is drawn, which is what lets it be added to delta as it is, without a factor of e^ε.

    Args:
        records: Records that each step draws from.
        sample_rate: Probability with which each is drawn, in 0 to 1.
        capacity: Places in the batch.
        steps: Steps.

    Returns:
        The bound, in 0 to 1.

    Raises:
        ValueError: If the sample rate is outside its range, the capacity below 1, or a count negative.

    Guarantees:
        * At least the exact probability that in one of the steps more than ``capacity`` of ``records`` are drawn.
        * At most 1e-6 of it above steps · P[Binomial(records - 1, q) >= capacity], where that is over 1e-300.
    """
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"A sample rate lies in 0 to 1, not {sample_rate}.")
    if capacity < 1 or records < 0 or steps < 0:
        raise ValueError(
            "A batch has at least 1 place, and there are at least 0 records and steps, "
            f"not {capacity}, {records} and {steps}."
        )
    if capacity >= records or not sample_rate or not steps:
        return 0.0
    from scipy.special import betainc  # P[Binomial(n, q) >= k] = I_q(k, n - k + 1)

    tail = float(betainc(capacity, records - capacity, sample_rate)) * (1 + 1e-9)
    return min(max(tail, 1e-305) * steps, 1.0)


@lru_cache(maxsize=1 << 14)
def _divergence(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Give the Rényi divergence of one sampled step, rounded up; infinite if it cannot be computed."""
    import numpy as np
    from opacus.accountants.analysis import rdp  # takes two seconds; what samples nothing does not need it

    try:
        with np.errstate(all="ignore"):
            value = float(
                rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order))
            )
        # opacus sums in log space: its errors are those of terms of the size of 1 and of (α/σ)²
        rounding = (1e-12 + 1e-14 * order + 1e-15 * (order / noise_multiplier) ** 2) / (order - 1)
    except (ArithmeticError, ValueError):
        return math.inf
    return max(value, 0.0) + rounding if -rounding <= value < math.inf else math.inf


@cache
def _orders() -> tuple[float, ...]:
    """List the Rényi orders: fractions near 1, for large epsilons, and integers above, for small ones."""
    fractions, order = [], 1 + _SMALLEST_EXCESS
    while order < _LARGEST_FRACTION:
        fractions.append(order)
        order = 1 + (order - 1) * _RATIO
    integers = []
    whole = int(_LARGEST_FRACTION)
    while whole <= _LARGEST_ORDER:
        integers.append(float(whole))
        whole = max(whole + 1, int(whole * _RATIO))
    return (*fractions, *integers)
