"""From noise multipliers to epsilon."""

import math
from collections.abc import Iterable
from typing import Final

MAX_SQUARED_SIGNAL: Final = 1e20
_LEAST_SQUARED_SIGNAL: Final = 1e-20
_LARGEST_DELTA: Final = 0.5
_SMALLEST_EXCESS: Final = 1e-11  # of an order over 1: below the best one within the two bounds above, above rounding


def epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float | None:
    """State what a number of Gaussian releases, all of which depend on one unit, cost together.

    Evaluated by opacus's RDP analysis. At its border: opacus's ``noise_multiplier`` is std ÷ sensitivity, which it
    takes to be the clip because its relation is add/remove; ours is std ÷ sensitivity under replace-one, so the number
    is passed on as it is and the result holds under replace-one. The sample rate is 1: no amplification is claimed.

    Unsampled Gaussian releases compose exactly, 1/z² adds, so all of them are one release with multiplier
    (Σ count/z²)^(-1/2), whatever their order. Any Rényi order above 1 gives a valid epsilon; the best one is solved
    for. With little noise it is close to 1: opacus's default orders begin at 1.1 and would overstate such an epsilon.

    Args:
        releases: ``(noise multiplier, count)`` of each kind of release; a multiplier is std ÷ sensitivity.
        delta: The delta to state epsilon at, between 0 and 1.

    Returns:
        Epsilon; 0 if nothing was released; None if nothing is guaranteed, because a release had no noise, or so little
        that epsilon passes 5e19.

    Raises:
        ValueError: If a noise multiplier is negative, NaN or infinite, a count negative, or delta not between 0 and 1.

    Guarantees:
        * At least the exact epsilon of the composition (Balle & Wang 2018, Theorem 8), and at most 12 % above it where
          that is over 0.1 and delta at most 1e-5.
        * Grows with each count, falls as a noise multiplier or delta grows.
        * Depends on Σ count/z² alone, up to float64 rounding.
        * A delta above 0.5 gives the epsilon of 0.5, which holds for it too.

    Source: Mironov, Rényi differential privacy (2017), Proposition 1 and Corollary 3; conversion by Balle et al.,
    Hypothesis testing interpretations and Rényi differential privacy (2020), Theorem 21, as in opacus.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, both excluded, not {delta}.")
    signal = squared_signal(releases)
    if signal == 0:
        return 0.0
    if signal > MAX_SQUARED_SIGNAL:
        return None
    return _gaussian_epsilon(max(signal, _LEAST_SQUARED_SIGNAL), min(delta, _LARGEST_DELTA))


def squared_signal(releases: Iterable[tuple[float, int]]) -> float:
    """Add up count/z²: the squared signal-to-noise ratio that Gaussian releases give an attacker together.

    It orders what releases cost at any delta; above ``MAX_SQUARED_SIGNAL``, infinity included, nothing is guaranteed.

    Args:
        releases: ``(noise multiplier, count)`` of each kind of release.

    Raises:
        ValueError: If a noise multiplier is negative, NaN or infinite, or a count negative.
    """
    total = 0.0
    for noise_multiplier, count in releases:
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"A noise multiplier must be finite and at least 0, not {noise_multiplier}.")
        if count < 0:
            raise ValueError(f"A count of releases is at least 0, not {count}.")
        if count:
            inverse = 1 / noise_multiplier if noise_multiplier else math.inf
            total += max(count * inverse * inverse, math.ulp(0.0))
    return total


def _gaussian_epsilon(signal: float, delta: float) -> float:
    """Convert Σ count/z² into epsilon."""
    from opacus.accountants.analysis import rdp  # takes a second; what charges nothing does not need it

    excess = _best_order(signal, delta) - 1
    orders = [1 + excess * factor for factor in (0.9, 1.0, 1.1)]  # opacus warns if the best one is at an end
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=1 / math.sqrt(signal), steps=1, orders=orders)
    value, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    return max(float(value), 0.0)


def _best_order(signal: float, delta: float) -> float:
    """Find the Rényi order with the least epsilon, by bisection.

    The derivative of the conversion, α·ρ - (ln δ + ln α) / (α - 1) + ln((α - 1) / α) with ρ = signal / 2, is zero where
    ρ·(α - 1)² + ln α = ln(1/δ), whose left side grows with α.
    """
    budget = -math.log(delta)
    low, high = _SMALLEST_EXCESS, math.sqrt(2 * budget / signal)
    for _ in range(100):
        middle = math.sqrt(low * high)
        if signal / 2 * middle**2 + math.log1p(middle) < budget:
            low = middle
        else:
            high = middle
    return 1 + high
