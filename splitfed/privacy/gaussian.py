"""What one Gaussian release guarantees, exactly; any number of them are one.

With squared signal μ² = Σ 1/z², an attacker tells two neighbours apart as well as N(0, 1) from N(μ, 1), and

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε · Φ(-μ/2 - ε/μ).

Written so, it overflows for a large ε and cancels for a small μ. With the threshold t = ε/μ - μ/2, the density φ and
Mills' ratio M(t) = Φ(-t) / φ(t) = √(π/2) · erfcx(t / √2), it is

    δ = φ(t) · (M(t) - M(t + μ)),        ε = μ · (μ/2 + t),

in which nothing overflows: e^ε is gone, and t stays within ±40 wherever δ is a float64.

Source: Balle & Wang, Improving the Gaussian mechanism for differential privacy (2018), Theorem 8; Dong, Roth & Su,
Gaussian differential privacy (2022), section 3, for the composition.
"""

import math
from collections.abc import Callable
from typing import Final

MAX_SQUARED_SIGNAL: Final = 1e20

_LARGEST_DELTA: Final = 0.5
_SMALLEST_DELTA: Final = 1e-305  # above what rounding does to a float64 near its smallest
_FARTHEST: Final = 40.0  # Φ(-40) is below the smallest float64
_SMALL: Final = 2.0**-8  # a μ below which two values of Mills' ratio are too close to subtract
_HAIR: Final = 1e-10  # above all rounding errors of a logarithm of delta, below what anybody would notice
_GRID_BITS: Final = 32


def gaussian_delta(signal: float, epsilon: float) -> float:
    """State the delta at which Gaussian releases keep an epsilon.

    Args:
        signal: Squared signal μ² of all releases together, Σ 1/z².
        epsilon: The epsilon to state delta at, finite and at least 0.

    Returns:
        Delta, in 0 to 1.

    Raises:
        ValueError: If the signal is negative or NaN, or epsilon negative, NaN or infinite.

    Guarantees:
        * At least the exact delta, and at most 1e-6 of it above where it is over 1e-300.
        * 0 without a signal, 1 for an infinite one.
    """
    _check_signal(signal)
    _check_epsilon(epsilon)
    if signal == 0:
        return 0.0
    if signal == math.inf:
        return 1.0
    delta = math.exp(min(_log_delta(_threshold(signal, epsilon), math.sqrt(signal)) + _HAIR, 0.0))
    return max(delta, _SMALLEST_DELTA)


def gaussian_epsilon(signal: float, delta: float) -> float | None:
    """State the epsilon that Gaussian releases keep at a delta.

    Args:
        signal: Squared signal μ² of all releases together, Σ 1/z².
        delta: The delta to state epsilon at, between 0 and 1.

    Returns:
        Epsilon; 0 if nothing was released; None if the signal is over ``MAX_SQUARED_SIGNAL``: nothing is guaranteed.

    Raises:
        ValueError: If the signal is negative or NaN, or delta is not between 0 and 1.

    Guarantees:
        * At least the exact epsilon, and at most 1e-6 of it above, or 1e-8 · μ where epsilon is less than that.
        * Never falls as the signal grows or delta falls, down to the last bit.
        * A delta above 0.5 gives the epsilon of 0.5, which holds for it too.
    """
    _check_signal(signal)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, both excluded, not {delta}.")
    if signal == 0:
        return 0.0
    if signal > MAX_SQUARED_SIGNAL:
        return None
    # On a grid that is coarser than any rounding error, a larger signal cannot come out with a smaller epsilon.
    mu = math.sqrt(_on_grid(signal * (1 + 1e-12), math.ceil))
    budget = _budget(delta)
    nearest = max(-mu / 2, -10.0)  # epsilon is 0 at the first, delta over 0.5 at the second
    if _log_delta(nearest, mu) <= budget:
        return 0.0
    threshold = _first_that_holds(lambda t: _log_delta(t, mu) <= budget, nearest, _FARTHEST)
    return mu * (mu / 2 + threshold) * (1 + 1e-12)


def gaussian_signal(epsilon: float, delta: float) -> float:
    """State the largest squared signal that keeps an epsilon at a delta: the inverse of ``gaussian_epsilon``.

    Args:
        epsilon: The epsilon to keep, finite and at least 0.
        delta: The delta to keep it at, between 0 and 1.

    Returns:
        Squared signal μ², just below ``MAX_SQUARED_SIGNAL`` at most; 0 if it is below 1e-300.

    Raises:
        ValueError: If epsilon is negative, NaN or infinite, or delta is not between 0 and 1.

    Guarantees:
        * ``gaussian_epsilon`` of it is at most epsilon.
        * At most 1e-8 of it below the exact one, for a delta up to 0.5.
    """
    _check_epsilon(epsilon)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, both excluded, not {delta}.")
    budget = _budget(delta)

    def is_too_much(log_signal: float) -> bool:
        signal = math.exp(log_signal)
        return _log_delta(_threshold(signal, epsilon), math.sqrt(signal)) > budget

    least, most = math.log(1e-300), math.log(MAX_SQUARED_SIGNAL)
    if is_too_much(least):
        return 0.0
    return math.exp(_first_that_holds(is_too_much, least, most)) * (1 - 2e-9)  # more than gaussian_epsilon rounds up


def _first_that_holds(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Find by bisection, to the last bit, where something begins to hold; ``high`` if it does nowhere."""
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _budget(delta: float) -> float:
    """Give the largest ln δ that a computed one may have."""
    return math.log(_on_grid(min(delta, _LARGEST_DELTA), math.floor)) - _HAIR


def _log_delta(threshold: float, mu: float) -> float:
    """Give ln δ for t >= -μ/2."""
    from scipy.special import ndtr  # scipy takes a fifth of a second, which whoever only imports this need not wait

    if threshold > _FARTHEST:
        return -math.inf
    log_density = -(threshold * threshold + math.log(2 * math.pi)) / 2
    if mu < _SMALL:  # M' = t·M - 1, integrated by Gauss's rule with two nodes
        middle, offset = threshold + mu / 2, mu / math.sqrt(12)
        slope = sum(1 - node * _mills(node) for node in (middle - offset, middle + offset)) / 2
        return log_density + math.log(slope) + math.log(mu)
    if threshold < 0:  # M(t) would overflow
        return math.log(float(ndtr(-threshold)) - math.exp(log_density) * _mills(threshold + mu))
    return log_density + math.log(_mills(threshold) - _mills(threshold + mu))


def _mills(x: float) -> float:
    """Give Φ(-x) / φ(x)."""
    from scipy.special import erfcx

    return math.sqrt(math.pi / 2) * float(erfcx(x / math.sqrt(2)))


def _threshold(signal: float, epsilon: float) -> float:
    """Give t = ε/μ - μ/2 with one subtraction that loses nothing: ε and μ²/2 may agree in all but the last digits."""
    return (epsilon - signal / 2) / math.sqrt(signal)


def _on_grid(value: float, rounded: Callable[[float], int]) -> float:
    """Round to a mantissa of a few bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(rounded(math.ldexp(mantissa, _GRID_BITS)), exponent - _GRID_BITS)


def _check_signal(signal: float) -> None:
    if not signal >= 0:
        raise ValueError(f"A squared signal must be at least 0, not {signal}.")


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and at least 0, not {epsilon}.")
