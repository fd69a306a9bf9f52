"""Plans of a small model: what they promise is what the cost model, the ledger and the evidence say."""

import math
from typing import Any

import pytest

from splitfed.config import RunConfig
from splitfed.config.device import LinkSection
from splitfed.config.plan import Limits
from splitfed.errors import ConfigError
from splitfed.study.cost import SplitPoint, Workload, cost_of, model_shape, peak_memory_bytes, step_time
from splitfed.study.plan import Plan, Request, Seat, device_profile, plan
from splitfed.study.plan.levels import Target
from splitfed.study.plan.plans import run_epsilon
from splitfed.study.plan.request import noise_multipliers
from tests.equivalence.tiny_models import tiny_config
from tests.study.plan.evidence_of import made_up

LINK = LinkSection(up_bits_per_s=2e7, down_bits_per_s=2e7, latency_s=0.04)
PHONE, SERVER = device_profile("phone"), device_profile("server")
SHAPE = model_shape(tiny_config("llama"))
EVIDENCE = made_up()


def run_of(**sections: dict[str, Any]) -> RunConfig:
    training = {"max_tokens": 16, "batch_size": 4, "rounds": 2, "local_steps": 5, **sections.pop("training", {})}
    return RunConfig.model_validate({"run": {}, "model": {"base": "demo"}, "training": training, **sections})


def request_of(**changes: Any) -> Request:
    seats = changes.pop("seats", [Seat("phone", PHONE, LINK)])
    limits = changes.pop("limits", Limits())
    of: dict[str, Any] = {"run": run_of(), "server": SERVER, "examples": 50, "most_blocks": 2, **changes}
    return Request(shape=SHAPE, seats=seats, limits=limits, evidence=EVIDENCE, **of)


def chosen(request: Request) -> Plan:
    return plan(request).chosen[request.seats[0].name]


def test_a_plan_promises_what_the_cost_model_says() -> None:
    run = run_of(codecs=dict.fromkeys(("smashed", "trunk_output", "output_gradient", "smashed_gradient"), "bf16"))
    found = chosen(request_of(run=run, codecs=["bf16"], ranks=[8], noise=[0.01]))
    costs = cost_of(SHAPE, found.split_point, Workload.of(run))
    assert found.memory_bytes == peak_memory_bytes(costs.agent, PHONE)
    assert found.server_memory_bytes == peak_memory_bytes(costs.server, SERVER)
    assert found.step == step_time(costs, PHONE, SERVER, LINK)
    assert (found.up_bytes, found.down_bytes) == (costs.link.up_bytes, costs.link.down_bytes)
    assert found.fetch_s == found.weight_bytes * 8 / LINK.down_bits_per_s
    assert found.weight_bytes == costs.agent.weight_bytes
    assert found.epsilon == run_epsilon(run, 0.01, False, False, examples=50)
    target = Target(SHAPE.n_blocks, SHAPE.hidden_size, 16)
    assert found.leakage == EVIDENCE.leakage.leakage(target, found.split_point, noise=0.01)


def test_several_agents_share_the_server_s_time_and_its_base_model() -> None:
    slow = device_profile("phone")
    alone, together = (
        plan(request_of(server=slow, agents=agents, codecs=["int8"], ranks=[8])).frontier["phone"][0]
        for agents in (1, 64)
    )
    assert together.step_s == pytest.approx(64 * together.step.server_s)
    assert alone.step_s == alone.step.step_s
    for_each = alone.server_memory_bytes - slow.process.memory_bytes
    assert for_each < together.server_memory_bytes - slow.process.memory_bytes < 64 * for_each


def test_noise_is_the_run_s_and_more_only_where_a_limit_needs_it() -> None:
    assert noise_multipliers(request_of()) == [0.002]
    assert noise_multipliers(request_of(run=run_of(privacy={"noise_multiplier": 0.0}))) == [0.0]
    assert noise_multipliers(request_of(noise=[0.5, 0.1])) == [0.1, 0.5]
    with_leakage = noise_multipliers(request_of(limits=Limits(leakage=0.5)))
    assert (min(with_leakage), len(with_leakage) > 3) == (0.002, True)


def test_an_epsilon_is_kept_by_noise_that_is_calibrated_to_it() -> None:
    request = request_of(limits=Limits(epsilon=20.0))
    found = chosen(request)
    assert 10 < found.epsilon <= 20
    bottom, top = found.split_point.bottom_blocks > 0, found.split_point.top_blocks > 0
    spent = run_epsilon(request.run, found.noise_multiplier, bottom, top, examples=50)
    assert spent == found.epsilon


def test_a_leakage_is_kept_by_more_noise_at_a_cost_in_loss() -> None:
    free, tight = chosen(request_of()), chosen(request_of(limits=Limits(leakage=0.6)))
    assert free.leakage.most > 0.6 >= tight.leakage.most
    assert tight.noise_multiplier > free.noise_multiplier
    assert tight.loss.nats > free.loss.nats


@pytest.mark.parametrize("limit", ["memory_bytes", "step_s", "step_bytes", "loss_nats"])
def test_a_limit_that_the_best_plan_keeps_just_so_is_kept_and_a_little_less_is_said_to_be_too_little(
    limit: str,
) -> None:
    of = {
        "memory_bytes": lambda found: found.memory_bytes,
        "step_s": lambda found: found.step_s,
        "step_bytes": lambda found: found.step_bytes,
        "loss_nats": lambda found: found.loss.nats,
    }[limit]
    aim = {"memory_bytes": "memory", "step_s": "step", "step_bytes": "bytes", "loss_nats": "loss"}[limit]
    least = min(map(of, plan(request_of(aim=aim)).frontier["phone"]))
    assert plan(request_of(limits=Limits(**{limit: least}))).chosen
    refused = plan(request_of(limits=Limits(**{limit: least * 0.5})))
    assert refused.chosen == {}
    assert "too much" in refused.sentences[0]


def test_a_fleet_gets_a_cut_for_each_device() -> None:
    small = PHONE.model_copy(update={"device": PHONE.device.model_copy(update={"memory_bytes": 10**6})})
    refused = plan(request_of(seats=[Seat("small", small, LINK), Seat("phone", PHONE, LINK)]))
    assert refused.chosen == {}
    assert refused.sentences[0].startswith("small: the device's memory of 1.00 MB rules out every plan")
    found = plan(request_of(seats=[Seat("a", PHONE, LINK), Seat("b", device_profile("laptop"), LINK)]))
    assert found.chosen.keys() == {"a", "b"}
    assert len({(each.codec, each.noise_multiplier) for each in found.chosen.values()}) == 1


def test_units_of_privacy_that_a_cut_cannot_keep_leave_only_those_that_can() -> None:
    found = plan(request_of(run=run_of(privacy={"smashed": "token", "output_gradient": "token"})))
    assert {each.split_point for each in found.frontier["phone"]} == {SplitPoint(0, 0)}


def test_metric_privacy_is_refused_since_no_attack_was_measured_on_it() -> None:
    with pytest.raises(ConfigError, match="noise of another kind than what was measured"):
        plan(request_of(run=run_of(privacy={"smashed": "metric", "eta": 1.0})))


def test_without_noise_nothing_is_guaranteed() -> None:
    assert chosen(request_of(noise=[0.0])).epsilon == math.inf


def test_progress_ends_at_the_whole() -> None:
    told: list[tuple[str, float]] = []
    plan(request_of(ranks=[8], codecs=["int8"]), on_stage=lambda what, part: told.append((what, part)))
    assert told[-1] == ("plans for phone", 1.0)
    assert [part for _, part in told] == sorted(part for _, part in told)
