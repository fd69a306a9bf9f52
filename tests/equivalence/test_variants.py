"""Every variant with one client is central LoRA; joint steps are central LoRA on the joint batch."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import splitfed
from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.federation.cohort import ranked
from splitfed.training.data import Example
from splitfed.training.simulate import Simulation, examples_of, simulate
from tests.equivalence.central import batches_of, central_run, central_steps

TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats."""

OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
LORA = LoraSection(rank=4, alpha=8.0)
TRAINING = TrainingSection(
    rounds=3, local_steps=2, batch_size=4, max_tokens=40, learning_rate=3e-3, weight_decay=0.01, warmup_steps=1
)
VARIANTS = ["sflv1", "sflv2", "parallel", "async"]
TEXTS = [
    f"The clinic saw {n} patients on day {n * n}, and {n % 3} of them came back. " * (1 + n % 3) for n in range(40)
]


@pytest.fixture(scope="module")
def base() -> Path:
    return splitfed.base_model_folder()


@pytest.fixture(scope="module")
def shards(base: Path) -> dict[str, list[Example]]:
    examples = examples_of(TEXTS, AutoTokenizer.from_pretrained(base), max_tokens=TRAINING.max_tokens)
    return {"a": examples[:8], "b": examples[8:11], "c": examples[11:30]}


def split_run(
    base: Path,
    shards: Mapping[str, list[Example]],
    *,
    bottom_blocks: int = 1,
    top_blocks: int = 1,
    training: TrainingSection = TRAINING,
    lora: LoraSection = LORA,
    seconds: Mapping[str, float] | None = None,
    **federation: object,
) -> Simulation:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = splitfed.partition(model, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    return simulate(
        parts,
        AutoTokenizer.from_pretrained(base),
        shards,
        training=training,
        lora=lora,
        codecs=OPEN,
        federation=FederationSection.model_validate({"agents": len(shards), **federation}),
        seconds=seconds,
        seed=5,
    )


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 2},
        {"max_grad_norm": 0.3},
        {"micro_batch_size": 2, "max_grad_norm": 0.3},
        {"proximal": 30.0},
        {"proximal": 30.0, "max_grad_norm": 0.3},
    ],
    ids=str,
)
def test_with_one_client_every_variant_is_central_lora(
    base: Path, shards: Mapping[str, list[Example]], settings: dict[str, object]
) -> None:
    training = TRAINING.model_copy(update=settings)
    losses, _ = central_run(base, shards["a"], training, LORA, client="a", seed=5)
    runs = {variant: split_run(base, {"a": shards["a"]}, training=training, variant=variant) for variant in VARIANTS}
    runs["parallel, merged at every step"] = split_run(
        base, {"a": shards["a"]}, training=training, variant="parallel", merge_ends="step"
    )
    for variant, run in runs.items():
        assert run.losses["a"] == pytest.approx(losses, abs=TOLERANCE), variant
        assert run.losses["a"] == runs["sflv1"].losses["a"], variant
        for name, tensor in run.adapter.items():
            torch.testing.assert_close(tensor, runs["sflv1"].adapter[name], rtol=0, atol=2**-43)


@pytest.mark.parametrize("settings", [{"max_grad_norm": 1e-4}, {"proximal": 30.0}], ids=str)
def test_one_norm_really_clips_and_the_proximal_term_really_pulls(
    base: Path, shards: Mapping[str, list[Example]], settings: dict[str, object]
) -> None:
    free = split_run(base, {"a": shards["a"]})
    held = split_run(base, {"a": shards["a"]}, training=TRAINING.model_copy(update=settings))
    assert held.losses["a"] != pytest.approx(free.losses["a"], abs=10 * TOLERANCE)


def joint_losses(run: Simulation, shards: Mapping[str, list[Example]], training: TrainingSection) -> list[float]:
    """The cohort's mean loss per token of every step."""
    counted = {
        client: [
            sum(label != -100 for example in batch for label in example.labels[1:])
            for batch in batches_of(shard, training, client=client, seed=5)
        ]
        for client, shard in shards.items()
    }
    steps = range(training.rounds * training.local_steps)
    return [
        sum(run.losses[client][step] * counted[client][step] for client in shards)
        / sum(counted[client][step] for client in shards)
        for step in steps
    ]


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.3, "micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize(
    ("bottom_blocks", "top_blocks", "merge_ends"), [(0, 0, "round"), (1, 1, "step"), (2, 0, "step")]
)
def test_joint_steps_are_central_lora_on_the_joint_batch(
    base: Path,
    shards: Mapping[str, list[Example]],
    bottom_blocks: int,
    top_blocks: int,
    merge_ends: str,
    settings: dict[str, object],
) -> None:
    training = TRAINING.model_copy(update=settings)
    drawn = [batches_of(shard, training, client=client, seed=5) for client, shard in shards.items()]
    batches = [[example for batch in together for example in batch] for together in zip(*drawn, strict=True)]
    losses, _ = central_steps(base, batches, training, LORA, seed=5)
    run = split_run(
        base,
        shards,
        bottom_blocks=bottom_blocks,
        top_blocks=top_blocks,
        training=training,
        variant="parallel",
        merge_ends=merge_ends,
    )
    assert joint_losses(run, shards, training) == pytest.approx(losses, abs=TOLERANCE)
    assert losses[-1] < losses[0] - 100 * TOLERANCE


def test_joint_steps_with_ends_merged_once_a_round_are_something_else(
    base: Path, shards: Mapping[str, list[Example]]
) -> None:
    by_round, by_step = (split_run(base, shards, variant="parallel", merge_ends=when) for when in ("round", "step"))
    losses = [joint_losses(run, shards, TRAINING) for run in (by_round, by_step)]
    assert losses[0][:1] == losses[1][:1]
    assert losses[0] != pytest.approx(losses[1], abs=TOLERANCE)


def test_the_sequential_variant_hands_one_adapter_from_client_to_client_in_each_rounds_order(
    base: Path, shards: Mapping[str, list[Example]]
) -> None:
    """With nothing on the clients, they are central LoRA on the batches of one turn after the other."""
    training = TRAINING.model_copy(update={"rounds": 2, "schedule": "constant", "warmup_steps": 0})
    pair = {client: shards[client] for client in ("b", "c")}
    run = split_run(base, pair, bottom_blocks=0, top_blocks=0, training=training, variant="sflv2")
    order = [(client, round) for round in (1, 2) for client in ranked(pair, seed=5, round=round)]
    assert order == [("c", 1), ("b", 1), ("b", 2), ("c", 2)]  # neither that of names nor the same in both
    steps = {(client, round): slice(2 * round - 2, 2 * round) for client, round in order}
    drawn = {client: batches_of(shard, training, client=client, seed=5) for client, shard in pair.items()}
    batches = [batch for client, round in order for batch in drawn[client][steps[client, round]]]
    losses, _ = central_steps(base, batches, training, LORA, seed=5)
    seen = [loss for client, round in order for loss in run.losses[client][steps[client, round]]]
    assert seen == pytest.approx(losses, abs=TOLERANCE)


# What comes first


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A model of hidden size 256, where the shape of a batch changes bits."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "parallel"])
def test_the_order_in_which_clients_are_named_changes_no_bit(
    wide: Path, shards: Mapping[str, list[Example]], variant: str
) -> None:
    training = TRAINING.model_copy(update={"rounds": 1})
    runs = [
        split_run(wide, dict(sorted(shards.items(), reverse=reverse)), training=training, variant=variant)
        for reverse in (False, True)
    ]
    assert runs[0].losses == runs[1].losses
    assert_same_bits(runs[0].adapter, runs[1].adapter)


def test_free_steps_depend_on_who_is_fast_and_no_step_is_older_than_allowed(
    base: Path, shards: Mapping[str, list[Example]]
) -> None:
    training = TRAINING.model_copy(update={"rounds": 1, "local_steps": 8})
    even = split_run(base, shards, training=training, variant="async", max_staleness=50)
    skewed = {"a": 1.0, "b": 10.0, "c": 1.0}
    free = split_run(base, shards, training=training, variant="async", max_staleness=50, seconds=skewed)
    held = split_run(base, shards, training=training, variant="async", max_staleness=4, seconds=skewed)
    light = split_run(
        base, shards, training=training, variant="async", max_staleness=4, staleness_exponent=3.0, seconds=skewed
    )
    assert even.losses != free.losses
    assert free.oldest_step > 4
    assert held.oldest_step <= 4
    assert free.losses != held.losses
    assert held.losses != light.losses
    assert all(losses[-1] < losses[0] for losses in free.losses.values())
