"""What a simulation refuses before it trains, whose update it goes on without, and that it can be run again."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import splitfed
from splitfed.config import AggregationSection, CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.federation.cohort import ranked
from splitfed.models import Partition
from splitfed.training.releases import OpenReleases
from splitfed.training.simulate import Simulation, simulate
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import examples

TRAINING = TrainingSection(rounds=2, local_steps=2, batch_size=2, max_tokens=12, learning_rate=1e-2)
OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
SHARDS = {"a": examples(5, 6, 7, seed=1), "b": examples(8, 9, seed=50)}
STEP = FederationSection(variant="parallel", merge_ends="step")

Run = Callable[..., Simulation]


class Spoilt(OpenReleases):
    """A gate through which a client's update comes out as something else, in some rounds."""

    def __init__(self, spoil: Callable[[Tensor], Tensor], rounds: tuple[int, ...]) -> None:
        super().__init__()
        self._spoil, self._rounds = spoil, rounds

    def adapter_update(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, round: int
    ) -> dict[str, Tensor]:
        update = super().adapter_update(before, after, round=round)
        return {name: self._spoil(tensor) if round in self._rounds else tensor for name, tensor in update.items()}


def not_finite(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def spoiling(client: str, *rounds: int, spoil: Callable[[Tensor], Tensor] = not_finite) -> Any:
    return lambda name: Spoilt(spoil, rounds if name == client else ())


def cut(bottom: int = 1, top: int = 1) -> Partition:
    return splitfed.partition(tiny_model("llama", num_hidden_layers=4), bottom_blocks=bottom, top_blocks=top)


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast) -> Run:
    """Simulate on a fresh tiny model, unless there are parts."""

    def run(**changes: Any) -> Simulation:
        parts, shards = changes.pop("parts", None) or cut(), changes.pop("shards", SHARDS)
        settings = {"training": TRAINING, "lora": LoraSection(rank=2), "codecs": OPEN, "seed": 4, **changes}
        return simulate(parts, tokenizer, shards, **settings)

    return run


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shards": {}}, "There is no client; give shards with one client at least"),
        ({"parts": {"a": None}}, "parts has nothing for the client 'b'; give something for every client of shards"),
        ({"parts": {"a": None, "b": None, "c": None}}, "parts has 'c', which is no client of shards; take it out"),
        ({"ranks": {"zz": 1}}, "ranks has 'zz', which is no client of shards; take it out"),
        (
            {"ranks": {"a": 32}},
            r"ranks\['a'\] is 32, but the run's ranks go from 1 to 2 \(lora\); choose one,",
        ),
        ({"ranks": {"a": 0}}, r"ranks\['a'\] is 0, but the run's ranks go from 1 to 2"),
        (
            {"ranks": {"a": 1}, "lora": LoraSection(rank=4, least_rank=2)},
            r"ranks\['a'\] is 1, but the run's ranks go from 2 to 4",
        ),
        ({"personal": ["trunk"]}, 'personal has \'trunk\'; give a list of "bottom", "top", both or neither'),
        ({"seconds": {"a": 1, "b": 2}}, 'seconds needs variant = "async", not "sflv1"; leave seconds out'),
        (
            {"federation": FederationSection(variant="async"), "seconds": {"a": 1}},
            "seconds has nothing for the client 'b'; give something for every client of shards",
        ),
        (
            {"federation": FederationSection(variant="async"), "seconds": {"a": 1, "b": 1, "c": 2}},
            "seconds has 'c', which is no client of shards; take it out",
        ),
        (
            {"federation": FederationSection(variant="async"), "seconds": {"a": 1, "b": -1}},
            r"seconds\['b'\] is -1; give a finite number, 0 or more",
        ),
        (
            {"federation": FederationSection(agents=3)},
            "federation.agents is 3, but shards has 2; make it 2",
        ),
        (
            {"federation": FederationSection(population=5)},
            "federation.population is 5, but shards has 2; make it 2",
        ),
        (
            {"federation": FederationSection(agents=2, straggler_margin=3.0)},
            "federation.straggler_margin is about agents that are late, and in a simulation none is; leave ",
        ),
        (
            {"federation": FederationSection(agents=2, cohort=1, over_selection=1)},
            "federation.over_selection is about agents that are late",
        ),
        (
            {"federation": FederationSection(agents=2, cohort=1, late_updates="merge")},
            "federation.late_updates is about agents that are late",
        ),
        (
            {"federation": FederationSection(variant="async", max_staleness=0)},
            "federation: max_staleness is 0, but 2 agents at work make up to 1 steps in between; raise it",
        ),
        (
            {"aggregation": AggregationSection(rule="median")},
            'A round has 2 updates, but aggregation.rule = "median" needs 3; give more clients',
        ),
        (
            {"federation": STEP, "aggregation": AggregationSection(norm_bound=1.0)},
            "aggregation.norm_bound = 1 works on what agents bring to the end of a round",
        ),
        ({"federation": STEP, "personal": ("top",)}, 'federation.merge_ends = "step" needs clients that hold the same'),
        ({"federation": STEP, "ranks": {"a": 1}}, 'federation.merge_ends = "step" needs clients that hold the same'),
        ({"federation": STEP, "parts": {"a": (1, 1), "b": (2, 1)}}, 'merge_ends = "step" needs clients that hold the '),
    ],
    ids=str,
)
def test_what_names_nobody_or_has_no_effect_is_refused_in_one_sentence(
    run: Run, changes: dict[str, Any], said: str
) -> None:
    if "parts" in changes:
        changes = {**changes, "parts": {name: cut(*(where or (1, 1))) for name, where in changes["parts"].items()}}
    with pytest.raises(ValueError, match=said) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


def test_agents_may_be_left_out_of_the_federation(run: Run) -> None:
    left_out, given = (run(federation=FederationSection(variant="sflv2", **more)) for more in ({}, {"agents": 2}))
    assert left_out.losses == given.losses
    assert_same_bits(left_out.adapter, given.adapter)


def test_one_personal_segment_may_be_given_by_its_name_alone(run: Run) -> None:
    alone, listed = run(personal="top"), run(personal=["top"])
    assert_same_bits(alone.personal["a"], listed.personal["a"])
    assert alone.personal["a"]


# Updates that are refused


def test_a_round_goes_on_without_an_update_that_is_not_finite(run: Run) -> None:
    together, alone = run(releases=spoiling("b", 1, 2)), run(shards={"a": SHARDS["a"]})
    assert {round: list(clients) for round, clients in together.refused.items()} == {1: ["b"], 2: ["b"]}
    assert "nan" in together.refused[1]["b"]
    assert together.losses["a"] == alone.losses["a"]
    assert_same_bits(together.adapter, alone.adapter)
    assert alone.refused == {}


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "parallel", "async"])
def test_a_change_that_is_too_long_is_refused_in_its_round_and_named(run: Run, variant: str) -> None:
    result = run(
        federation=FederationSection.model_validate({"variant": variant}),
        aggregation=AggregationSection(refuse_norm=50.0),
        releases=spoiling("a", 2, spoil=lambda tensor: tensor + 100),
    )
    assert list(result.refused) == [2]
    assert list(result.refused[2]) == ["a"]
    assert "above refuse_norm = 50" in result.refused[2]["a"]
    assert all(tensor.isfinite().all() and tensor.abs().max() < 50 for tensor in result.adapter.values())
    assert [len(losses) for losses in result.losses.values()] == [4, 4]


def test_a_client_whose_update_is_refused_is_where_it_would_be_without_its_round(run: Run) -> None:
    """Its second round is that of a client that was not asked for the first one."""
    seed = next(seed for seed in range(100) if [ranked("ab", seed=seed, round=n)[0] for n in (1, 2)] == ["a", "b"])
    not_asked = run(federation=FederationSection(agents=2, cohort=1), seed=seed)
    refused = run(releases=spoiling("b", 1), seed=seed)
    assert refused.losses["b"][2:] == not_asked.losses["b"]


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_turn_may_change_the_trunk_no_further_than_the_bound(run: Run, blocks: int) -> None:
    def in_turns(**changes: Any) -> Simulation:
        return run(parts=cut(blocks, blocks), federation=FederationSection(variant="sflv2"), **changes)

    free = in_turns()
    bounded = in_turns(aggregation=AggregationSection(norm_bound=1e-3))
    start = in_turns(training=TRAINING.model_copy(update={"learning_rate": 1e-12}))

    def moved(result: Simulation) -> float:
        squares = [(result.adapter[key] - start.adapter[key]).square().sum() for key in start.adapter]
        return float(sum(squares)) ** 0.5

    turns = 2 * TRAINING.rounds
    assert moved(free) > 2 * turns * 1e-3
    assert 1e-3 < moved(bounded) <= turns * 1e-3 * (1 + 1e-4)


def test_in_turns_the_next_one_goes_on_from_before_the_refused(run: Run) -> None:
    seed = next(seed for seed in range(100) if ranked("ab", seed=seed, round=1)[0] == "a")
    training = TRAINING.model_copy(update={"rounds": 1})
    in_turns = {"federation": FederationSection(variant="sflv2"), "training": training, "seed": seed}
    together = run(releases=spoiling("a", 1), **in_turns)
    alone = run(shards={"b": SHARDS["b"]}, **in_turns)
    assert together.losses["b"] == alone.losses["b"]
    assert_same_bits(together.adapter, alone.adapter)


@pytest.mark.parametrize(("quorum", "clients", "left"), [(2, "b", 1), (1, "ab", 0)])
def test_a_round_with_fewer_updates_than_its_quorum_ends_the_run(
    run: Run, quorum: int, clients: str, left: int
) -> None:
    said = rf"^Round 2 has {left} updates, fewer than federation.quorum = {quorum}; refused were '{clients[0]}': .*nan"
    with pytest.raises(ValueError, match=said):
        run(
            federation=FederationSection(agents=2, quorum=quorum),
            releases=lambda name: Spoilt(not_finite, (2,) if name in clients else ()),
        )


# Again


def test_a_second_run_on_the_same_parts_is_a_run_of_its_own(run: Run) -> None:
    parts = cut()
    first = run(parts=parts)
    stacked = run(parts=parts, aggregation=AggregationSection(lora="flora", flora_rank=4))
    assert stacked.losses != first.losses
    again = run(parts=parts)
    assert again.losses == first.losses
    assert_same_bits(again.adapter, first.adapter)


def test_what_a_simulation_is_told_comes_from_one_place() -> None:
    from splitfed import config

    assert simulate.__doc__ is not None
    for name in ("TrainingSection", "LoraSection", "CodecSection", "FederationSection", "AggregationSection"):
        assert name in simulate.__doc__
        assert name in config.__all__
        assert getattr(splitfed, name) is getattr(config, name)
