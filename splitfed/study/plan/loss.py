"""What split points, noise, codecs and ranks have cost in loss where it was measured, and what that says of others."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from splitfed.study.cost import SplitPoint
from splitfed.study.plan.levels import Setting, Target, at_level, nearest_cuts


@dataclass(frozen=True)
class LossPoint(Setting):
    """What one setting came to, as the mean of some runs.

    Attributes:
        codec: In every direction of the cut.
        rank: Of the adapter.
        base_loss: Held-out loss before training, nats per token.
        loss: The same after it, mean of the runs.
        spread: Sample standard deviation of the runs; 0 where there is one.
        runs: How many there are.
    """

    codec: str
    rank: int
    base_loss: float
    loss: float
    spread: float
    runs: int

    @property
    def level(self) -> float:
        """Noise ÷ signal of one number that crosses the cut, up to a constant."""
        return self.target.loss_level(self.noise_multiplier)


@dataclass(frozen=True)
class LossCost:
    """What a plan is expected to cost in loss.

    Attributes:
        nats: Held-out loss above the best that was measured without noise, nats per token.
        share: The same as a share of what training gained there; 1 = all of it.
        spread: How far apart runs were that differ in their seed alone, nats.
        is_beyond: The noise is more than what was measured, so that the cost is a lower bound.
    """

    nats: float
    share: float
    spread: float
    is_beyond: bool = False


class LossTable:
    """Says what a plan costs in loss, from what was measured.

    Effects of split point with noise, of the codec and of the rank are added up; each is that of settings which differ
    in nothing else, and a codec that does no more than seeds do costs nothing. Another model is taken to be hurt by
    noise ÷ signal as this one is, at the split point of the same relative depth that trains the same segments.

    Args:
        points: At least one without noise; of several at one setting that of most runs counts.

    Raises:
        ValueError: If none is without noise.
    """

    def __init__(self, points: Iterable[LossPoint]) -> None:
        settings: dict[Sequence[object], LossPoint] = {}
        for point in sorted(points, key=lambda point: point.runs):
            settings[_setting(point)] = point
        self.points = tuple(settings.values())
        quiet = [point for point in self.points if point.noise_multiplier == 0]
        if not quiet:
            raise ValueError("No run without noise is among them, so nothing says what noise costs; add one.")
        self._codec = statistics.mode(point.codec for point in self.points)
        self._rank = statistics.mode(point.rank for point in self.points)
        best = min(quiet, key=lambda point: point.loss)
        self._reference, self._gain = best.loss, best.base_loss - best.loss
        self._spread = statistics.mean(point.spread for point in self.points)

    @property
    def noise_multipliers(self) -> list[float]:
        """What was measured, in order."""
        return sorted({point.noise_multiplier for point in self.points})

    def cost(self, target: Target, split_point: SplitPoint, *, noise: float, codec: str, rank: int) -> LossCost:
        """Say what a plan is expected to cost.

        Args:
            target: The model and the length of its sequences.
            split_point: Where it is cut.
            noise: The noise multiplier.
            codec: In every direction.
            rank: Of the adapter.
        """
        level, points = target.loss_level(noise), self._alike(self.points)
        at = [
            at_level(_rising([point for point in points if _cut(point) == cut]), level)
            for cut in nearest_cuts({(_cut(point), point.n_blocks) for point in points}, target, split_point)
        ]
        loss = statistics.mean(at) + self._codec_cost(codec) + self._rank_cost(rank)
        nats = max(0.0, loss - self._reference)
        is_beyond = level > max(point.level for point in points) * (1 + 1e-9)
        return LossCost(nats, nats / self._gain if self._gain > 0 else math.nan, self._spread, is_beyond)

    def _alike(self, points: Iterable[LossPoint]) -> list[LossPoint]:
        return [point for point in points if (point.codec, point.rank) == (self._codec, self._rank)]

    def _codec_cost(self, codec: str) -> float:
        pairs = [
            point.loss - other.loss
            for point in self.points
            if point.codec == codec != self._codec
            for other in self._alike(self.points)
            if _but_for_codec(point) == _but_for_codec(other)
        ]
        cost = statistics.mean(pairs) if pairs else 0.0
        return cost if abs(cost) > self._spread else 0.0  # what seeds do, too, is not the codec's

    def _rank_cost(self, rank: int) -> float:
        """Give the mean over what was measured at several ranks, between two of them by the rank's logarithm."""
        costs: dict[int, list[float]] = {self._rank: [0.0]}
        for point in self.points:
            for other in self._alike(self.points):
                if point.rank != self._rank and _but_for_rank(point) == _but_for_rank(other):
                    costs.setdefault(point.rank, []).append(point.loss - other.loss)
        curve = sorted((float(each), statistics.mean(several)) for each, several in costs.items())
        if rank <= curve[0][0]:
            return curve[0][1]
        for (below, low), (above, high) in pairwise(curve):
            if rank <= above:
                return low + (high - low) * math.log(rank / below) / math.log(above / below)
        return curve[-1][1]


def _rising(points: Iterable[LossPoint]) -> list[tuple[float, float]]:
    """Give losses over noise levels; under so much noise that nothing is learned they fall again, which is no gain."""
    curve = sorted((point.level, point.loss) for point in points)
    return [(level, max(loss for _, loss in curve[: number + 1])) for number, (level, _) in enumerate(curve)]


def _setting(point: LossPoint) -> Sequence[object]:
    return point.n_blocks, point.level, *_cut(point), point.codec, point.rank


def _cut(point: LossPoint) -> tuple[int, int]:
    return point.bottom_blocks, point.top_blocks


def _but_for_codec(point: LossPoint) -> Sequence[object]:
    return *_cut(point), point.noise_multiplier, point.rank


def _but_for_rank(point: LossPoint) -> Sequence[object]:
    return *_cut(point), point.noise_multiplier, point.codec
