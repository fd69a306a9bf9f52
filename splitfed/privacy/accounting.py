"""From noise multipliers to epsilon."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from splitfed.privacy.amplification import poisson_overflow, sampled_epsilon
from splitfed.privacy.gaussian import MAX_SQUARED_SIGNAL, gaussian_delta, gaussian_epsilon, gaussian_signal

__all__ = [
    "MAX_SQUARED_SIGNAL",
    "REPLACE_ONE",
    "ZERO_OUT",
    "Composition",
    "epsilon",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_signal",
    "poisson_overflow",
    "squared_signal",
]

REPLACE_ONE: Final = "replace-one"
"""One unit becomes any other in its place."""
ZERO_OUT: Final = "zero-out"
"""A unit's clipped contribution becomes zero, its rows noise alone: half as far, so a quarter of the squared signal."""


@dataclass(frozen=True)
class Composition:
    """Releases that depend on one unit, and what they cost together.

    **Without sampling** a release is a Gaussian whose mean the unit moves by at most 1/z standard deviations, whatever
    was released before it. Any number of them, adaptively chosen, tell no more than one with μ² = Σ 1/z², whose epsilon
    is known exactly (``gaussian_epsilon``).

    **With sampling**, under zero-out only. Let a step draw every record on its own with probability q. Fix what the
    other records draw, and where each record would stand: the step is then a function of one record x and of whether x
    is drawn. If it is, everything that the step releases about x, over all channels and with the server choosing each
    of its answers in between, is an adaptive composition of Gaussians, dominated by the pair N(μ, 1), N(0, 1) with
    μ² = Σ 1/z² over the step's channels. If it is not, and likewise if x is zeroed, x's place holds noise alone. So the
    step is dominated by the pair (1 - q) · N(0, 1) + q · N(μ, 1) and N(0, 1), in either order: the Poisson-sampled
    Gaussian mechanism. What was fixed has the same law with x and without, so mixing over it makes the two no easier to
    tell apart. Steps draw afresh, so they compose adaptively, and the Rényi divergences of sampled steps and of
    releases without sampling add up (``sampled_epsilon``).

    A step whose other records alone fill its places is outside this argument: with the probability ``overflow``
    anything may happen, so the epsilon is that of delta - overflow. The figure without sampling needs no such thing,
    and the smaller of the two is stated.

    It may be claimed only if all of this is true:

    * Every step draws every record on its own, from a cryptographic generator, and who was drawn stays secret: no name,
      order, count, length or time tells it.
    * The batch has the same number of places in every step. What was drawn stands in random places, the others hold
      noise-only rows that look the same, and what finds no place is left out.
    * A record takes one place, and all that depends on it in the step is noised and counted in the step's signal.
    * Nothing else that is released depends on the record, or it is counted in ``signal``: what persists on the device
      is frozen, or trained only on releases that are counted here.
    * ``overflow`` is at least ``poisson_overflow`` of the steps.

    Under replace-one a sampled step counts as if the record were always drawn.

    Attributes:
        signal: Squared signal of the releases that are not sampled, Σ 1/z² under replace-one; infinite = unprotected.
        sampled: ``(sample rate, squared signal of one step over all its channels, under replace-one)`` to the number of
            such steps.
        overflow: Probability, over all steps, that a sample did not fit its batch.
        coupled: Squared signal of releases that depend on the unit through what was trained on it. They move from one
            clipped value to another whatever becomes of the unit's own contribution, so zero-out does not halve them.

    Raises:
        ValueError: If a signal is negative or NaN, a probability outside 0 to 1, or a number of steps negative.

    Guarantees:
        * Never below the exact epsilon of the releases, and under replace-one at most 1e-6 of it above, with
          ``gaussian_epsilon``'s exception near 0.
        * Zero-out never costs more than replace-one.
        * Never falls as the signal, the steps or the overflow grow, or as delta falls.

    Source: Zhu, Dong & Wang, Optimal accounting of differential privacy via characteristic function (2022): dominating
    pairs under adaptive composition and Poisson sampling. Kairouz et al., Practical and private (deep) learning without
    sampling or shuffling (2021), for zero-out.
    """

    signal: float = 0.0
    sampled: Mapping[tuple[float, float], int] = field(default_factory=dict)
    overflow: float = 0.0
    coupled: float = 0.0

    def __post_init__(self) -> None:
        for squared in (self.signal, self.coupled, *(squared for _, squared in self.sampled)):
            if not squared >= 0:
                raise ValueError(f"A squared signal must be at least 0, not {squared}.")
        for probability in (self.overflow, *(rate for rate, _ in self.sampled)):
            if not 0 <= probability <= 1:
                raise ValueError(f"A probability must be in 0 to 1, not {probability}.")
        for steps in self.sampled.values():
            if steps < 0:
                raise ValueError(f"A number of steps is at least 0, not {steps}.")

    def __add__(self, other: "Composition") -> "Composition":
        """Compose with releases that depend on the same unit."""
        return Composition(
            self.signal + other.signal,
            Counter(self.sampled) + Counter(other.sampled),
            min(self.overflow + other.overflow, 1.0),
            self.coupled + other.coupled,
        )

    def epsilon(self, delta: float, relation: str = REPLACE_ONE) -> float | None:
        """State what the releases cost.

        Args:
            delta: The delta to state epsilon at, between 0 and 1.
            relation: The neighbouring relation, ``REPLACE_ONE`` or ``ZERO_OUT``.

        Returns:
            Epsilon; 0 if nothing was released; None if nothing is guaranteed.

        Raises:
            ValueError: If delta is not between 0 and 1, or there is no such relation.
        """
        if relation not in (REPLACE_ONE, ZERO_OUT):
            raise ValueError(f"There is no relation {relation!r}; choose {REPLACE_ONE!r} or {ZERO_OUT!r}.")
        steps_of = {(rate, squared): n for (rate, squared), n in self.sampled.items() if rate and squared and n}
        fixed = self.signal + self.coupled * (1 if relation == REPLACE_ONE else 4)  # a quarter of it is stated below
        total = sum((squared * n for (_, squared), n in steps_of.items()), fixed)
        if relation == REPLACE_ONE:
            return gaussian_epsilon(total, delta)
        unamplified = gaussian_epsilon(total / 4, delta)
        certain = sum((squared * n for (rate, squared), n in steps_of.items() if rate == 1), fixed)
        sampled = {(rate, squared): n for (rate, squared), n in steps_of.items() if rate < 1}
        left = math.nextafter(delta - self.overflow, 0.0)
        largest = max([certain, *(squared for _, squared in sampled)])
        if unamplified == 0 or not sampled or left <= 0 or largest / 4 > MAX_SQUARED_SIGNAL:
            return unamplified
        stated = min(sampled_epsilon(sampled, certain, left), math.inf if unamplified is None else unamplified)
        return stated if stated < math.inf else None


def epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float | None:
    """State what a number of Gaussian releases, all of which depend on one unit, cost together under replace-one.

    Args:
        releases: ``(noise multiplier, count)`` of each kind of release; a multiplier is std ÷ sensitivity.
        delta: The delta to state epsilon at, between 0 and 1.

    Returns:
        Epsilon; 0 if nothing was released; None if nothing is guaranteed, because a release had no noise, or so little
        that epsilon passes 5e19.

    Raises:
        ValueError: If a noise multiplier is negative, NaN or infinite, a count negative, or delta not between 0 and 1.

    Guarantees:
        * Those of ``gaussian_epsilon``: the exact figure, rounded up by less than 1e-6 of it.
        * Grows with each count, falls as a noise multiplier or delta grows.
        * Depends on Σ count/z² alone, up to float64 rounding.
    """
    return gaussian_epsilon(squared_signal(releases), delta)


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
