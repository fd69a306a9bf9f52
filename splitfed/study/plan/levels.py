"""How noise and depth carry over from a model that was measured to another one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from splitfed.study.cost import SplitPoint

Cut = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """A model and its sequences, as far as noise and depth depend on them.

    Noise that protects a sequence has a standard deviation of 2 · z · C · √T in every number, where C bounds the norm
    of one token's vector. A token thus stands out from it by an amount that goes with 1 ÷ (z · √T), whatever D is; a
    number of its vector, of the size C ÷ √D, with 1 ÷ (z · √(T · D)).

    Attributes:
        n_blocks: Blocks of the model.
        hidden_size: D.
        tokens: T.
    """

    n_blocks: int
    hidden_size: int
    tokens: int

    def leakage_level(self, noise_multiplier: float) -> float:
        """Noise ÷ signal of a token's vector, up to a constant: what attacks on tokens depend on."""
        return noise_multiplier * math.sqrt(self.tokens)

    def loss_level(self, noise_multiplier: float) -> float:
        """Noise ÷ signal of one number, up to a constant: what training depends on, or on less."""
        return noise_multiplier * math.sqrt(self.tokens * self.hidden_size)


@dataclass(frozen=True)
class Setting:
    """Where something was measured.

    Attributes:
        n_blocks: Blocks of the model.
        hidden_size: D of the model.
        tokens: T.
        bottom_blocks: Blocks of the bottom.
        top_blocks: Blocks of the top.
        noise_multiplier: Of every channel.
    """

    n_blocks: int
    hidden_size: int
    tokens: int
    bottom_blocks: int
    top_blocks: int
    noise_multiplier: float

    @property
    def target(self) -> Target:
        """The model and the length of its sequences."""
        return Target(self.n_blocks, self.hidden_size, self.tokens)


def at_level(curve: Iterable[tuple[float, float]], level: float) -> float:
    """Read a curve over noise levels, between two of them by the level's logarithm.

    Args:
        curve: Pairs of level and value; what lies beyond its ends has the value of the end.
        level: Where to read it.
    """
    points = sorted(curve)
    if level <= points[0][0]:
        return points[0][1]
    for (below, low), (above, high) in pairwise(points):
        if level <= above:
            part = math.log(level / below) / math.log(above / below) if below > 0 else level / above
            return low + (high - low) * part
    return points[-1][1]


def nearest_cuts(measured: Iterable[tuple[Cut, int]], target: Target, split_point: SplitPoint) -> list[Cut]:
    """Find the split points of the nearest relative depth, among those that train the same segments if there are any.

    Args:
        measured: Split points, each with the blocks of its model.
        target: The model that is planned for.
        split_point: Its split point.

    Returns:
        All that are nearest.
    """
    wanted = split_point.bottom_blocks, split_point.top_blocks
    known = list(measured)
    alike = [each for each in known if _trains(each[0]) == _trains(wanted)] or known
    shares = _shares(wanted, target.n_blocks)
    distances = [sum(abs(a - b) for a, b in zip(_shares(*each), shares, strict=True)) for each in alike]
    return [cut for (cut, _), distance in zip(alike, distances, strict=True) if distance <= min(distances) + 1e-9]


def _trains(cut: Cut) -> tuple[bool, bool]:
    return cut[0] > 0, cut[1] > 0


def _shares(cut: Sequence[int], n_blocks: int) -> tuple[float, float]:
    return cut[0] / n_blocks, cut[1] / n_blocks
