"""What attacks have recovered where it was measured, over depth and noise, and what that says of a plan."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from splitfed.study.cost import SplitPoint
from splitfed.study.plan.levels import Setting, Target, at_level, nearest_cuts

TARGETS: Final = ("tokens", "labels")
"""What counts as a plan's leakage: tokens behind smashed data, labels behind output gradients."""


@dataclass(frozen=True)
class LeakagePoint(Setting):
    """What the strongest of several attacks has recovered at one setting.

    Attributes:
        recovers: "tokens" or "labels".
        attack: The strongest attack.
        recovered: Share that it recovered.
        chance: What the best guess without looking gets.
    """

    recovers: str
    attack: str
    recovered: float
    chance: float

    @property
    def level(self) -> float:
        """Noise ÷ signal of a token's vector, up to a constant."""
        return self.target.leakage_level(self.noise_multiplier)


@dataclass(frozen=True)
class Leakage:
    """What the strongest attacks are expected to recover: a lower bound on what leaks, never a guarantee.

    Attributes:
        tokens: Share of the tokens, from smashed data.
        labels: Share of the labels, from output gradients.
    """

    tokens: float
    labels: float

    @property
    def most(self) -> float:
        """The larger of the two."""
        return max(self.tokens, self.labels)


class LeakageTable:
    """Says what attacks are expected to recover, from what they recovered where it was measured.

    Tokens depend on the bottom and on noise ÷ signal of a token's vector; labels on the top and the same. Depth carries
    over by its share of the blocks. Noise beyond what was measured is taken to hide no more than the most that was.

    Args:
        points: At least one for each target.

    Raises:
        ValueError: If one has none.
    """

    def __init__(self, points: Iterable[LeakagePoint]) -> None:
        self.points = tuple(points)
        for target in TARGETS:
            if not any(point.recovers == target for point in self.points):
                raise ValueError(f"No attack on {target} is among them; add one.")

    @property
    def noise_multipliers(self) -> list[float]:
        """What was measured, in order."""
        return sorted({point.noise_multiplier for point in self.points})

    def leakage(self, target: Target, split_point: SplitPoint, *, noise: float) -> Leakage:
        """Say what attacks are expected to recover.

        Args:
            target: The model and the length of its sequences.
            split_point: Where it is cut.
            noise: The noise multiplier.
        """
        level = target.leakage_level(noise)
        ends = {"tokens": (split_point.bottom_blocks, 0), "labels": (0, split_point.top_blocks)}
        found = {}
        for kind, end in ends.items():
            points = [point for point in self.points if point.recovers == kind]
            depths = nearest_cuts({(_depth(point), point.n_blocks) for point in points}, target, SplitPoint(*end))
            found[kind] = max(at_level(_curve(points, depth).items(), level) for depth in depths)
        return Leakage(**found)


def _depth(point: LeakagePoint) -> tuple[int, int]:
    return (point.bottom_blocks, 0) if point.recovers == "tokens" else (0, point.top_blocks)


def _curve(points: Iterable[LeakagePoint], depth: tuple[int, int]) -> dict[float, float]:
    """Give the most that was recovered at a depth, by noise level."""
    curve: dict[float, float] = {}
    for point in points:
        if _depth(point) == depth:
            curve[point.level] = max(curve.get(point.level, 0.0), point.recovered)
    return curve
