"""What an attack achieved: a success rate with its uncertainty, beside what a blind guess achieves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Target = Literal["tokens", "labels", "mask", "membership"]
"""What an attack is after."""


@dataclass(frozen=True)
class AttackResult:
    """Successes of one attack, counted by someone who knows the truth.

    Trials of one sequence are not independent: a sequence that goes wrong goes wrong at many places. So they are kept
    per sequence, and the interval is that of as many independent trials as they are worth.

    Attributes:
        attack: Name of the attack, such as "linear probe".
        target: What it is after.
        successes: Trials that it got right.
        trials: Trials, at least 1.
        chance: The rate of the best guess without looking, measured on the same trials, in 0 to 1.
        clusters: ``(successes, trials)`` of each sequence; empty where every trial is a sequence of its own.

    Raises:
        ValueError: If there is no trial, a count or chance is outside its range, or the clusters do not add up to the
            totals.

    Guarantees:
        * A 95 % interval holds the true rate in about 95 of 100 repetitions (measured: over 92, from 30 sequences on),
          with trials that agree within a sequence too, and at rates near 0 and 1.
        * The interval holds the measured rate, lies within 0 to 1, and is never shorter than that of independent
          trials.
        * Where all trials agree, or all but fewer than a sequence holds, nothing shows how much they depend on each
          other, and a sequence counts as one trial; from twice as many on, what they show counts in full.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927); design effect of a
    ratio estimate over clusters, and the number of trials divided by it: Kish, Survey Sampling (1965).
    """

    attack: str
    target: Target
    successes: int
    trials: int
    chance: float
    clusters: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        counts = [(self.successes, self.trials), *self.clusters]
        if self.trials < 1 or any(not 0 <= successes <= trials for successes, trials in counts):
            raise ValueError(
                f"The attack {self.attack!r} has {self.successes} successes in {self.trials} trials; "
                "count at least one trial, and per sequence no more successes than trials."
            )
        if not 0 <= self.chance <= 1:
            raise ValueError(f"Chance is a rate from 0 to 1, not {self.chance}.")
        totals = tuple(map(sum, zip(*self.clusters, strict=True)))
        if self.clusters and totals != (self.successes, self.trials):
            raise ValueError(
                f"Sequences with {totals[0]} successes in {totals[1]} trials do not add up to {self.successes} in "
                f"{self.trials}."
            )

    @classmethod
    def per_sequence(
        cls, attack: str, target: Target, *, successes: Sequence[int], trials: Sequence[int], chance: float
    ) -> "AttackResult":
        """Put together what was counted in each sequence.

        Args:
            attack: Name of the attack.
            target: What it is after.
            successes: Trials that it got right, of each sequence.
            trials: Trials of each sequence; one without any is left out.
            chance: The rate of the best guess without looking.

        Raises:
            ValueError: As the class, or if the two lists differ in length.
        """
        clusters = tuple((int(s), int(t)) for s, t in zip(successes, trials, strict=True) if t)
        return cls(attack, target, sum(s for s, _ in clusters), sum(t for _, t in clusters), chance, clusters)

    @property
    def rate(self) -> float:
        """Successes ÷ trials."""
        return self.successes / self.trials

    @property
    def effective_trials(self) -> float:
        """How many independent trials these are worth: from 1 to their number."""
        if not self.clusters:
            return self.trials
        n_clusters, spread = len(self.clusters), self.rate * (1 - self.rate)
        if n_clusters == 1 or spread == 0:
            return n_clusters
        squares = sum((s - self.rate * t) ** 2 for s, t in self.clusters)
        variance = squares * n_clusters / (n_clusters - 1) / self.trials**2
        shown = min(max(spread / variance, 1.0), self.trials) if variance else self.trials
        rarer = min(self.successes, self.trials - self.successes)
        trust = min(max(rarer * n_clusters / self.trials - 1, 0.0), 1.0)  # sequences' worth of them, less one
        return min(shown, n_clusters + trust * (shown - n_clusters))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bound the rate that the attack would have on endlessly many such sequences.

        Args:
            confidence: How often such an interval holds that rate, between 0 and 1.

        Returns:
            The lowest and the highest rate (Wilson's score interval for ``effective_trials``).

        Raises:
            ValueError: If the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"A confidence is between 0 and 1, both excluded, not {confidence}.")
        n, z = self.effective_trials, NormalDist().inv_cdf((1 + confidence) / 2)
        middle = (self.rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.rate * (1 - self.rate) / n + (z / (2 * n)) ** 2)
        return max(min(middle - half, self.rate), 0.0), min(max(middle + half, self.rate), 1.0)

    def beats_chance(self, confidence: float = 0.95) -> bool:
        """Tell whether the whole interval lies above chance.

        Raises:
            ValueError: As ``interval``.
        """
        return self.interval(confidence)[0] > self.chance

    def as_row(self) -> dict[str, str | int | float]:
        """Give the figures by name, the 95 % interval included, for a table, CSV or JSON."""
        low, high = self.interval()
        return {
            "target": self.target,
            "attack": self.attack,
            "rate": self.rate,
            "low": low,
            "high": high,
            "chance": self.chance,
            "successes": self.successes,
            "trials": self.trials,
            "sequences": len(self.clusters) or self.trials,
        }
