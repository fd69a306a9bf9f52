"""From all plans to the few worth looking at, to one, and to what stands in the way of the rest."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from splitfed.config.plan import AIMS, Aim
from splitfed.study.plan.plans import Plan

Candidate = TypeVar("Candidate")

_GRAINS: Final = (0.02, 0.01, 0.02, 0.02, 0.02, 0.0)
"""Differences that are none: nats per token, share recovered, parts of a cost. Seeds differ by as much."""


@dataclass(frozen=True)
class Constraint:
    """A limit on plans.

    Attributes:
        name: As a sentence has it, with the limit: "--max-memory 4 GB".
        limit: What a plan may come to at most.
        of: What it comes to.
        text: How a figure is written.
        difference: How a difference of two figures is written; None: as a figure.
        is_asked: Somebody asked for it, so it is spoken of even where it rules out nothing.
    """

    name: str
    limit: float
    of: Callable[[Plan], float]
    text: Callable[[float], str]
    difference: Callable[[float], str] | None = None
    is_asked: bool = True

    def allows(self, plan: Plan) -> bool:
        """Say whether a plan keeps the limit."""
        return self.of(plan) <= self.limit

    def excess(self, plan: Plan) -> float:
        """Say by how much a plan misses the limit, as a share of it; 0 where it keeps it."""
        if self.allows(plan):
            return 0.0
        return (self.of(plan) - self.limit) / self.limit if self.limit > 0 else math.inf


@dataclass(frozen=True)
class Verdict:
    """What constraints leave of the plans.

    Attributes:
        allowed: Plans that keep all of them.
        sentences: Which constraint rules out the rest, or by how much nothing keeps them all.
    """

    allowed: list[Plan]
    sentences: list[str]


def judge(plans: Sequence[Plan], constraints: Sequence[Constraint]) -> Verdict:
    """Apply constraints, and say what each of them does.

    Args:
        plans: At least one.
        constraints: What they have to keep.
    """
    allowed = [plan for plan in plans if all(each.allows(plan) for each in constraints)]
    if allowed:
        told = [each for each in constraints if each.is_asked or not all(map(each.allows, plans))]
        return Verdict(allowed, [_ruled_out(each, plans, constraints) for each in told])
    return Verdict([], _what_is_missing(plans, constraints))


def _ruled_out(constraint: Constraint, plans: Sequence[Plan], constraints: Sequence[Constraint]) -> str:
    ruled_out = [plan for plan in plans if not constraint.allows(plan)]
    if not ruled_out:
        return f"{constraint.name} rules out none of {len(plans)} plans."
    others = [each for each in constraints if each is not constraint]
    alone = [plan for plan in ruled_out if all(each.allows(plan) for each in others)]
    sentence = f"{constraint.name} rules out {len(ruled_out)} of {len(plans)} plans"
    if not alone:
        return f"{sentence}, each of which something else rules out, too."
    nearest = min(alone, key=constraint.of)
    return (
        f"{sentence}, {len(alone)} of them alone; the nearest of these has {constraint.text(constraint.of(nearest))}."
    )


def _what_is_missing(plans: Sequence[Plan], constraints: Sequence[Constraint]) -> list[str]:
    """Say which single constraint, if it were looser and by how much, would leave a plan; else which ones together."""
    sentences = []
    for each in constraints:
        others = [other for other in constraints if other is not each]
        within = [plan for plan in plans if all(other.allows(plan) for other in others)]
        if within:
            least = min(map(each.of, within))
            sentences.append(
                _too_much(each, least, " that keeps the others" if any(o.is_asked for o in others) else "")
            )
    if sentences:
        return sentences
    for each in constraints:
        least = min(map(each.of, plans))
        if least > each.limit:
            sentences.append(_too_much(each, least))
    nearest = min(plans, key=lambda plan: sum(each.excess(plan) for each in constraints))
    missed = " and ".join(
        f"{each.text(each.of(nearest))} where {each.name} is asked for"
        for each in constraints
        if not each.allows(nearest)
    )
    return [
        *sentences,
        f"No plan keeps all constraints, whichever one is given up; the nearest ({nearest}) has {missed}.",
    ]


def _too_much(constraint: Constraint, least: float, which: str = "") -> str:
    if math.isinf(least):
        return (
            f"{constraint.name} rules out every plan{which}: without noise there is no epsilon; give --noise above 0."
        )
    figure, excess = constraint.text(least), (constraint.difference or constraint.text)(least - constraint.limit)
    return f"{constraint.name} rules out every plan{which}: the least is {figure}, {excess} too much."


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Leave out every plan that another one equals or beats in everything: memory, time, bytes, loss, leakage, epsilon.

    Differences that are smaller than what seeds or the cost model are off by count as none; of plans that are equal in
    this sense the one with the least loss stays, and of these the one with the least bytes.

    Args:
        plans: The plans.

    Returns:
        Those that are left, by their loss.
    """
    kept: list[tuple[Plan, tuple[float, ...]]] = []
    for plan in sorted(plans, key=lambda plan: (plan.loss.nats, plan.step_bytes, plan.memory_bytes)):
        figures = figures_of(plan)
        if not any(_is_as_good(other, figures) for _, other in kept):
            kept.append((plan, figures))
    better = [
        plan
        for plan, figures in kept
        if not any(_is_as_good(other, figures) and not _is_as_good(figures, other) for _, other in kept)
    ]
    return better or [plan for plan, _ in kept]


def best(candidates: Sequence[Candidate], figures: Callable[[Candidate], Sequence[float]], aim: Aim) -> Candidate:
    """Choose by one figure after the other: who is as good as the best in one goes on to the next.

    Args:
        candidates: At least one.
        figures: What each comes to, in the order of ``figures_of``.
        aim: What counts most.
    """
    left = list(candidates)
    order = [AIMS.index(aim), *(number for number in range(len(_GRAINS)) if number != AIMS.index(aim))]
    for number in order:
        least = min(figures(each)[number] for each in left)
        left = [each for each in left if figures(each)[number] <= least + _GRAINS[number]]
    return min(left, key=lambda each: tuple(figures(each)))


def figures_of(plan: Plan) -> tuple[float, ...]:
    """Give what plans are compared by: ``AIMS``, then epsilon; costs by their logarithm."""
    costs = plan.step_s, plan.step_bytes, plan.memory_bytes
    return (plan.loss.nats, plan.leakage.most, *map(math.log, costs), plan.epsilon)


def _is_as_good(figures: Sequence[float], others: Sequence[float]) -> bool:
    return all(own <= theirs + grain for own, theirs, grain in zip(figures, others, _GRAINS, strict=True))


__all__ = ["Constraint", "Verdict", "best", "figures_of", "judge", "pareto"]
