"""One plan for each device of a fleet: a cut and a rank of its own, one codec and one noise for all."""

from collections.abc import Mapping, Sequence

from splitfed.config.plan import Aim
from splitfed.study.plan.choice import best, figures_of
from splitfed.study.plan.plans import Plan


def choose(allowed: Mapping[str, Sequence[Plan]], aim: Aim) -> dict[str, Plan]:
    """Choose for a fleet what is best where it is worst.

    Codec and noise are the run's; split point and rank are each device's own. Of all pairs of codec and noise the one
    is taken whose worst device is best off.

    Args:
        allowed: The plans that each device may choose among, by its name.
        aim: What counts most.

    Returns:
        A plan by device; empty where no codec and noise serve all of them.
    """
    shared = sorted(set.intersection(*({_of_the_run(plan) for plan in plans} for plans in allowed.values())))
    found = [
        {
            name: best([plan for plan in plans if _of_the_run(plan) == pair], figures_of, aim)
            for name, plans in allowed.items()
        }
        for pair in shared
    ]
    return best(found, _worst, aim) if found else {}


def _worst(chosen: Mapping[str, Plan]) -> list[float]:
    return [max(figures) for figures in zip(*map(figures_of, chosen.values()), strict=True)]


def _of_the_run(plan: Plan) -> tuple[str, float]:
    return plan.codec, plan.noise_multiplier
