"""Constraints, the Pareto set and the choice, on plans whose figures are known."""

import itertools
import random
from dataclasses import replace

import pytest

from splitfed.study.cost import SplitPoint, StepTime
from splitfed.study.plan import Constraint, Leakage, LossCost, Plan, judge, pareto
from splitfed.study.plan.choice import best, figures_of
from splitfed.study.plan.fleet import choose
from splitfed.study.plan.writing import bytes_text, percent, points

PLAN = Plan(
    SplitPoint(1, 1),
    8,
    "int8",
    0.002,
    memory_bytes=10**9,
    server_memory_bytes=10**9,
    step=StepTime(1.0, 0.5, 0.2, 0.5),
    step_s=1.0,
    up_bytes=10**6,
    down_bytes=10**6,
    weight_bytes=10**8,
    fetch_s=10.0,
    loss=LossCost(0.1, 0.05, 0.01),
    leakage=Leakage(0.9, 0.5),
    epsilon=100.0,
)
MEMORY = Constraint("--max-memory 500 MB", 5e8, lambda plan: plan.memory_bytes, bytes_text)
LEAKS = Constraint("--max-leakage 50 %", 0.5, lambda plan: plan.leakage.most, percent, points)


def of(memory: float = 1e9, leaks: float = 0.9, loss: float = 0.1, **changes: object) -> Plan:
    changed = {"memory_bytes": int(memory), "leakage": Leakage(leaks, 0.0), "loss": LossCost(loss, 0.0, 0.0), **changes}
    return replace(PLAN, **changed)  # type: ignore[arg-type]


def test_a_verdict_says_what_each_constraint_rules_out_and_how_near_it_is() -> None:
    plans = [of(4e8, 0.4), of(6e8, 0.4), of(9e8, 0.4), of(4e8, 0.9), of(9e8, 0.9)]
    verdict = judge(plans, [MEMORY, LEAKS])
    assert verdict.allowed == plans[:1]
    assert verdict.sentences == [
        "--max-memory 500 MB rules out 3 of 5 plans, 2 of them alone; the nearest of these has 600 MB.",
        "--max-leakage 50 % rules out 2 of 5 plans, 1 of them alone; the nearest of these has 90 %.",
    ]


def test_a_constraint_that_rules_out_nothing_is_told_only_where_it_was_asked_for() -> None:
    implied = replace(LEAKS, is_asked=False)
    assert judge([of(4e8, 0.4)], [MEMORY, implied]).sentences == ["--max-memory 500 MB rules out none of 1 plans."]
    assert len(judge([of(4e8, 0.4), of(4e8, 0.9)], [MEMORY, implied]).sentences) == 2


def test_what_others_rule_out_too_is_said_to_be_so() -> None:
    verdict = judge([of(4e8, 0.4), of(9e8, 0.9)], [MEMORY, LEAKS])
    assert verdict.sentences[0].endswith("rules out 1 of 2 plans, each of which something else rules out, too.")


def test_an_infeasible_request_says_which_constraint_and_by_how_much() -> None:
    verdict = judge([of(6e8, 0.4), of(7e8, 0.4), of(5.5e8, 0.9)], [MEMORY, LEAKS])
    assert verdict.allowed == []
    assert verdict.sentences == [
        "--max-memory 500 MB rules out every plan that keeps the others: the least is 600 MB, 100 MB too much."
    ]
    implied = replace(LEAKS, is_asked=False)
    assert judge([of(6e8, 0.4)], [MEMORY, implied]).sentences[0].startswith("--max-memory 500 MB rules out every plan:")


def test_either_of_two_constraints_may_be_the_one_to_loosen() -> None:
    sentences = judge([of(6e8, 0.4), of(4e8, 0.9)], [MEMORY, LEAKS]).sentences
    assert len(sentences) == 2
    assert sentences[1].endswith("the least is 90 %, 40 percentage points too much.")


def test_constraints_that_no_single_one_of_undoes_are_told_with_the_nearest_plan() -> None:
    sentences = judge([of(6e8, 0.6), of(9e8, 0.9)], [MEMORY, LEAKS]).sentences
    assert sentences[0] == "--max-memory 500 MB rules out every plan: the least is 600 MB, 100 MB too much."
    assert sentences[-1] == (
        "No plan keeps all constraints, whichever one is given up; the nearest (1 + 1 blocks, rank 8, codec int8, "
        "noise 0.002) has 600 MB where --max-memory 500 MB is asked for and 60 % where --max-leakage 50 % is asked for."
    )


def figures(plan: Plan) -> tuple[float, ...]:
    return plan.memory_bytes, plan.step_s, plan.step_bytes, plan.loss.nats, plan.leakage.most, plan.epsilon


def test_the_pareto_set_is_what_no_other_plan_equals_or_beats_in_everything() -> None:
    draw = random.Random(0)
    plans = [
        of(
            10 ** draw.randint(6, 9),
            draw.choice([0.1, 0.5, 0.9]),
            draw.choice([0.1, 0.4]),
            step_s=draw.choice([1, 2, 4]),
        )
        for _ in range(200)
    ]
    kept = pareto(plans)
    for plan in kept:
        beaten = [other for other in plans if all(a <= b for a, b in zip(figures(other), figures(plan), strict=True))]
        assert all(figures(other) == figures(plan) for other in beaten)
    for plan in plans:
        assert any(all(a <= b for a, b in zip(figures(other), figures(plan), strict=True)) for other in kept)
    assert len({figures(plan) for plan in kept}) == len(kept) < len({figures(plan) for plan in plans})


def test_differences_that_seeds_make_do_not_count() -> None:
    assert pareto([of(1e9, loss=0.101), of(0.999e9, loss=0.104), of(1e9, loss=0.109)]) == [of(1e9, loss=0.101)]


def test_a_difference_that_counts_as_none_never_decides_wherever_it_lies() -> None:
    for loss in (0.5, 0.5881, 0.59, 0.61):
        slow, fast = of(loss=loss, step_s=2.0), of(loss=loss + 0.003, step_s=1.0)
        assert best([slow, fast], figures_of, "loss") is fast
        assert pareto([slow, fast]) == [fast]


@pytest.mark.parametrize(("aim", "first"), [("loss", 0), ("leakage", 1), ("memory", 2)])
def test_what_counts_most_comes_first(aim: str, first: int) -> None:
    plans = [of(9e8, 0.9, 0.1), of(9e8, 0.1, 0.5), of(1e8, 0.5, 0.5)]
    assert best(plans, figures_of, aim) is plans[first]  # type: ignore[arg-type]


def test_a_fleet_shares_codec_and_noise_and_is_best_where_it_is_worst() -> None:
    def plans(losses: dict[tuple[str, float], float]) -> list[Plan]:
        return [of(loss=loss, codec=codec, noise_multiplier=z) for (codec, z), loss in losses.items()]

    phone = plans({("int8", 0.1): 0.5, ("none", 0.1): 0.1})
    laptop = plans({("int8", 0.1): 0.2, ("none", 0.1): 0.9, ("none", 0.0): 0.0})
    chosen = choose({"phone": phone, "laptop": laptop}, "loss")
    assert {name: (plan.codec, plan.loss.nats) for name, plan in chosen.items()} == {
        "phone": ("int8", 0.5),
        "laptop": ("int8", 0.2),
    }


def test_a_fleet_without_a_codec_and_noise_in_common_has_no_choice() -> None:
    assert choose({"a": [of(codec="none")], "b": [of(codec="int8")]}, "loss") == {}


def test_a_fleet_s_choice_does_not_depend_on_the_order_of_its_devices() -> None:
    draw = random.Random(1)
    plans = {
        name: [of(loss=draw.random(), codec=codec) for codec in ("none", "int8") for _ in range(5)] for name in "abc"
    }
    choices = [choose({name: plans[name] for name in order}, "loss") for order in itertools.permutations("abc")]
    assert all(choice == choices[0] for choice in choices)
