"""Devices with cuts and ranks of their own in one run, aggregation rules in a whole run, parts that stay personal."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.config.aggregation import AggregationSection
from splitfed.models import Partition, Trunk, initial_adapter
from splitfed.training.data import Example, collate
from splitfed.training.setup import lora_settings
from splitfed.training.simulate import Simulation, examples_of, simulate
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
LORA = LoraSection(rank=16, alpha=32.0)
TRAINING = TrainingSection(rounds=2, local_steps=3, batch_size=4, max_tokens=40, learning_rate=3e-3)
CUTS = {"a": (1, 1), "b": (2, 1), "c": (0, 2)}
RANKS = {"a": 4, "b": 8, "c": 16}
VARIANTS = ["sflv1", "sflv2", "parallel", "async"]
TEXTS = [f"The branch lent {n} books on day {n * n}, and {n % 3} came back late. " * (1 + n % 3) for n in range(40)]


@pytest.fixture(scope="module")
def base() -> Path:
    return splitfed.base_model_folder()


@pytest.fixture(scope="module")
def shards(base: Path) -> dict[str, list[Example]]:
    examples = examples_of(TEXTS, AutoTokenizer.from_pretrained(base), max_tokens=TRAINING.max_tokens)
    return {"a": examples[:8], "b": examples[8:11], "c": examples[11:30]}


def parts_of(base: Path, cuts: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Partition], Trunk]:
    """Cut one model for each client, around the same parameters; the trunk is that of all blocks."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = {
        client: splitfed.partition(model, bottom_blocks=bottom, top_blocks=top)
        for client, (bottom, top) in cuts.items()
    }
    return parts, splitfed.partition(model, bottom_blocks=0, top_blocks=0).trunk


def run_of(
    base: Path,
    shards: Mapping[str, list[Example]],
    *,
    cuts: Mapping[str, tuple[int, int]] | None = None,
    variant: str = "sflv1",
    lora: LoraSection = LORA,
    aggregation: dict[str, Any] | None = None,
    **options: Any,
) -> Simulation:
    parts, trunk = parts_of(base, cuts or dict.fromkeys(shards, (1, 1)))
    return simulate(
        parts,
        AutoTokenizer.from_pretrained(base),
        shards,
        training=options.pop("training", TRAINING),
        lora=lora,
        codecs=OPEN,
        federation=FederationSection.model_validate(
            {"agents": len(shards), "variant": variant, "cohort": options.pop("cohort", None)}
        ),
        aggregation=AggregationSection.model_validate(aggregation or {}),
        trunk=trunk,
        seed=5,
        **options,
    )


def exported_loss(run: Simulation, folder: Path, base: Path, examples: list[Example]) -> float:
    run.export(folder, base=base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    batch = collate(examples, pad_token_id=0)
    with torch.no_grad():
        loss: Tensor = model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss
    return loss.item()


def products(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B A of every layer, in float64."""
    return {
        name.removesuffix(".lora_A.weight"): adapter[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        for name, tensor in adapter.items()
        if name.endswith(".lora_A.weight")
    }


# Cuts and ranks


@pytest.mark.parametrize("variant", VARIANTS)
def test_unlike_cuts_and_ranks_train_one_adapter_that_peft_loads(
    base: Path, shards: dict[str, list[Example]], tmp_path: Path, variant: str
) -> None:
    run = run_of(base, shards, cuts=CUTS, variant=variant, ranks=RANKS)
    whole = initial_adapter(AutoModelForCausalLM.from_pretrained(base), lora_settings(LORA), seed=5)
    assert {name: tensor.shape for name, tensor in run.adapter.items()} == {n: t.shape for n, t in whole.items()}
    held_out = shards["c"][:6]
    trained = exported_loss(run, tmp_path / "after", base, held_out)
    untrained = exported_loss(Simulation(LORA, whole), tmp_path / "before", base, held_out)
    assert trained < untrained - 0.1
    assert all(product.abs().max() > 0 for product in products(run.adapter).values())


def test_whoever_trained_a_layer_counts_in_its_mean(base: Path, shards: dict[str, list[Example]]) -> None:
    """A block is in one client's bottom, in the trunk for another: each gives what it, or the trunk for it, has."""
    training = TRAINING.model_copy(update={"rounds": 1})
    run = run_of(base, shards, cuts=CUTS, training=training)
    alone = [
        run_of(base, {client: shards[client]}, cuts={client: CUTS[client]}, training=training).adapter
        for client in shards
    ]
    weights = [len(shard) for shard in shards.values()]
    for name, tensor in run.adapter.items():
        mean = sum(w * each[name].double() for w, each in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-22, atol=2**-43)


@pytest.mark.parametrize("cut", CUTS.values())
def test_one_client_has_the_same_losses_wherever_it_is_cut(
    base: Path, shards: dict[str, list[Example]], cut: tuple[int, int]
) -> None:
    whole = run_of(base, {"a": shards["a"]}, cuts={"a": (0, 0)})
    run = run_of(base, {"a": shards["a"]}, cuts={"a": cut})
    assert run.losses["a"] == pytest.approx(whole.losses["a"], abs=1e-5)


# Aggregation rules


def test_ffa_and_alternating_train_the_factors_that_they_say(base: Path, shards: dict[str, list[Example]]) -> None:
    start = initial_adapter(AutoModelForCausalLM.from_pretrained(base), lora_settings(LORA), seed=5)
    seen: dict[str, list[dict[str, Tensor]]] = {"ffa": [], "alternating": []}
    for rule, states in seen.items():
        run_of(
            base,
            shards,
            aggregation={"lora": rule},
            on_round=lambda round, adapter, states=states: states.append(dict(adapter)),
        )
    changed = {
        rule: [
            {name.rpartition(".lora_")[2][0] for name in after if not torch.equal(before[name], after[name])}
            for before, after in zip([start, *states], states, strict=False)
        ]
        for rule, states in seen.items()
    }
    assert changed == {"ffa": [{"B"}, {"B"}], "alternating": [{"B"}, {"A"}]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_flora_goes_on_where_the_round_ended_although_its_factors_start_afresh(
    base: Path, shards: dict[str, list[Example]], tmp_path: Path, variant: str
) -> None:
    one = {"a": shards["a"]}
    plain = run_of(base, one)
    run = run_of(base, one, variant=variant, aggregation={"lora": "flora", "flora_rank": 20})
    assert run.losses["a"][: TRAINING.local_steps + 1] == pytest.approx(
        plain.losses["a"][: TRAINING.local_steps + 1], abs=1e-5
    )
    assert run.losses["a"] != pytest.approx(plain.losses["a"], abs=1e-5)
    ranks = {tensor.shape[0] for name, tensor in run.adapter.items() if "lora_A" in name}
    assert max(ranks) == LORA.rank + 20
    one_round = run_of(base, one, training=TRAINING.model_copy(update={"rounds": 1, "schedule": "constant"}))
    after_one = exported_loss(one_round, tmp_path / "one", base, shards["a"])
    assert exported_loss(run, tmp_path / "two", base, shards["a"]) < after_one


def test_flexlora_averages_products(base: Path, shards: dict[str, list[Example]]) -> None:
    training = TRAINING.model_copy(update={"rounds": 1, "local_steps": 1})
    run = run_of(
        base, shards, training=training, lora=LoraSection(rank=64, alpha=64.0), aggregation={"lora": "flexlora"}
    )
    alone = {
        client: run_of(base, {client: shards[client]}, training=training, lora=LoraSection(rank=64, alpha=64.0))
        for client in shards
    }
    total = sum(len(shard) for shard in shards.values())
    for layer, product in products(run.adapter).items():
        mean = sum(len(shards[client]) / total * products(alone[client].adapter)[layer] for client in shards)
        left_out = torch.linalg.svdvals(mean)[64:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(product - mean) <= left_out * 1.001 + 1e-6


@pytest.mark.parametrize("rule", ["flexlora", "flora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_every_clients_segments_end_with_the_result_and_peft_loads_the_same(
    tmp_path: Path, family: str, rule: str
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    ids_BT = torch.randint(3, VOCABULARY, (12, 9))
    examples = [Example(row, row, record=str(number)) for number, row in enumerate(ids_BT.tolist())]
    parts, trunk = parts_of(tmp_path / "base", CUTS)
    with torch.enable_grad():
        run = simulate(
            parts,
            SimpleNamespace(pad_token_id=0),  # type: ignore[arg-type]
            {client: examples[place::3] for place, client in enumerate(CUTS)},
            training=TRAINING.model_copy(update={"max_tokens": 9, "learning_rate": 3e-2}),
            lora=LoraSection(rank=8, alpha=16.0),
            codecs=OPEN,
            aggregation=AggregationSection.model_validate({"lora": rule}),
            trunk=trunk,
            ranks={"a": 2, "b": 4, "c": 8},
        )
    run.export(tmp_path / "adapter", base=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before_BTV = base(ids_BT).logits
    expected_BTV = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids_BT).logits
    assert (expected_BTV - before_BTV).abs().max() > 1
    for client, (bottom, middle, top) in parts.items():
        for segment in (bottom, middle, top):
            segment.eval()
        assert_equal_to_rounding(top(middle(bottom(ids_BT))).logits, expected_BTV, client)


def test_a_server_optimiser_and_a_robust_rule_carry_a_run(base: Path, shards: dict[str, list[Example]]) -> None:
    for aggregation in ({"server_optimiser": "fedadam", "server_learning_rate": 1e-3}, {"rule": "median"}):
        run = run_of(base, shards, aggregation=aggregation)
        assert all(losses[-1] < losses[0] for losses in run.losses.values())


# What stays personal


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_personal_top_stays_with_its_client(base: Path, shards: dict[str, list[Example]], variant: str) -> None:
    start = initial_adapter(AutoModelForCausalLM.from_pretrained(base), lora_settings(LORA), seed=5)
    run = run_of(base, shards, variant=variant, personal={"top"})
    names = set(run.personal["a"])
    assert names
    assert all(set(kept) == names for kept in run.personal.values())
    for name in names:
        assert torch.equal(run.adapter[name], start[name])
    for name in [name for name in names if "lora_B" in name]:
        assert len({kept[name].sum().item() for kept in run.personal.values()}) == len(shards)


# Many clients


def test_64_clients_take_part_in_turn(base: Path) -> None:
    examples = examples_of(TEXTS, AutoTokenizer.from_pretrained(base), max_tokens=24)
    shards = {f"client-{n:02}": examples[n % 30 : n % 30 + 3] for n in range(64)}
    training = TrainingSection(rounds=4, local_steps=1, batch_size=2, max_tokens=24, learning_rate=1e-3)
    parts = parts_of(base, {"one": (1, 1)})[0]["one"]
    run = simulate(
        parts,
        AutoTokenizer.from_pretrained(base),
        shards,
        training=training,
        lora=LoraSection(rank=2),
        codecs=OPEN,
        federation=FederationSection(agents=64, cohort=8, variant="parallel"),
    )
    assert sum(len(losses) for losses in run.losses.values()) == 4 * 8
    assert sum(bool(losses) for losses in run.losses.values()) > 16
