"""From all plans to the few worth looking at, to one, and to what stands in the way of the rest."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from splitfed.config.plan import AIMS, Aim
from splitfed.study.plan.plans import Plan

_LOSS_GRAIN, _LEAKAGE_GRAIN, _COST_GRAIN = 0.02, 0.01, 0.02
"""Differences that are none: nats per token, share recovered, and parts of a cost. Seeds differ by as much."""


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
            sentences.append(_too_much(each, least, " that keeps the others" if others else ""))
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
    figure, excess = constraint.text(least), (constraint.difference or constraint.text)(least - constraint.limit)
    return f"{constraint.name} rules out every plan{which}: the least is {figure}, {excess} too much."


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Leave out every plan that another one equals or beats in everything: memory, time, bytes, loss, leakage, epsilon.

    Differences that are smaller than what seeds or the cost model are off by count as none; of plans that are equal in
    this sense the one with the least loss stays, and of these the one with the least bytes.

    Args:
        plans: The plans.

    Returns:
        Those that are left, in the order of a choice.
    """
    seen: dict[tuple[float, ...], Plan] = {}
    for plan in sorted(plans, key=lambda plan: (plan.loss.nats, plan.step_bytes, plan.memory_bytes)):
        seen.setdefault(_figures(plan), plan)
    kept = [
        plan
        for figures, plan in seen.items()
        if not any(
            other is not figures and all(theirs <= own for theirs, own in zip(other, figures, strict=True))
            for other in seen
        )
    ]
    return sorted(kept, key=rank_by("loss"))


def rank_by(aim: Aim) -> Callable[[Plan], tuple[float, ...]]:
    """Give what plans are compared by: the aim first, then the others in their order.

    Args:
        aim: What counts most.
    """
    order = [aim, *(other for other in AIMS if other != aim)]

    def key(plan: Plan) -> tuple[float, ...]:
        of = dict(zip(AIMS, _aims(plan), strict=True))
        return (*(of[each] for each in order), plan.epsilon, plan.loss.nats)

    return key


def _aims(plan: Plan) -> tuple[float, ...]:
    return (
        round(plan.loss.nats / _LOSS_GRAIN),
        round(plan.leakage.most / _LEAKAGE_GRAIN),
        _on_a_grid(plan.step_s),
        _on_a_grid(plan.step_bytes),
        _on_a_grid(plan.memory_bytes),
    )


def _figures(plan: Plan) -> tuple[float, ...]:
    return (*_aims(plan), plan.epsilon)


def _on_a_grid(cost: float) -> float:
    return round(math.log(cost) / _COST_GRAIN)


__all__ = ["Constraint", "Verdict", "judge", "pareto", "rank_by"]
