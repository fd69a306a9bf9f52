"""The baselines are what their names say: stock LoRA in one place, and averaged once a round, by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, get_scheduler

from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.models import initial_adapter, partition
from splitfed.training.baselines import CENTRAL, Burden, adapter_burden, central_burden, central_lora, fed_lora
from splitfed.training.data import Example, collate
from splitfed.training.link import Traffic
from splitfed.training.setup import lora_settings
from splitfed.training.simulate import simulate
from tests.equivalence.central import batches_of, central_run
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import examples

LOSS_TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats."""
ADAPTER_TOLERANCE = 1e-5
"""Largest difference of a factor's element, in factors that move by about 1e-2 a step: AdamW's quotients magnify the
rounding of the gradients."""

SEED = 6
LORA = LoraSection(rank=2, alpha=4.0)
OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
TRAINING = TrainingSection(
    rounds=3, local_steps=3, batch_size=4, max_tokens=12, learning_rate=1e-2, weight_decay=0.01, warmup_steps=2
)
SHARDS = {
    "b": examples(10, 11, 7, seed=50),
    "a": examples(5, 6, 7, 8, 9, 12, 4, 8, seed=1),
    "c": examples(9, 9, 3, 12, 6, prompt=2, seed=90),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def run(of: Any, base: Path, tokenizer: PreTrainedTokenizerFast, shards: Mapping[str, Any], **changes: Any) -> Any:
    settings = {"training": TRAINING, "lora": LORA, "seed": SEED, **changes}
    return of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokenizer, shards, **settings)


# Central LoRA


def test_central_lora_is_stock_lora_on_everybodys_examples(base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    everybody = [*SHARDS["a"], *SHARDS["b"], *SHARDS["c"]]
    losses, adapter = central_run(base, everybody, TRAINING, LORA, client=CENTRAL, seed=SEED)
    result = run(central_lora, base, tokenizer, SHARDS)
    assert result.losses.keys() == {CENTRAL}
    assert result.losses[CENTRAL] == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert_close(result.adapter, adapter)
    assert max(tensor.abs().max().item() for tensor in adapter.values()) > 1000 * ADAPTER_TOLERANCE


def test_central_lora_does_not_depend_on_the_order_of_the_clients(
    base: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, second = (
        run(central_lora, base, tokenizer, dict(sorted(SHARDS.items(), reverse=reverse))) for reverse in (False, True)
    )
    assert first.losses == second.losses


# FedLoRA


def averaged_by_hand(
    base: Path, shards: Mapping[str, Sequence[Example]], training: TrainingSection
) -> tuple[dict[str, list[float]], list[dict[str, Tensor]]]:
    """FedAvg over stock models: the losses of each client, and the mean adapter of each round, float64."""
    start = initial_adapter(tiny_model("llama"), lora_settings(LORA), seed=SEED)
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in start})
    models, optimisers, schedulers = {}, {}, {}
    for client in shards:
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets),
        )
        optimisers[client] = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
        )
        schedulers[client] = get_scheduler(
            training.schedule,
            optimisers[client],
            num_warmup_steps=training.warmup_steps,
            num_training_steps=training.rounds * training.local_steps,
        )
        models[client] = {
            name.removeprefix("base_model.model.").replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        models[client, "whole"] = model.train()
    batches = {client: batches_of(shard, training, client=client, seed=SEED) for client, shard in shards.items()}
    losses: dict[str, list[float]] = {client: [] for client in shards}
    mean = {name: tensor.double() for name, tensor in start.items()}
    means = []
    for round in range(training.rounds):
        for client in shards:
            for name, parameter in models[client].items():
                parameter.data.copy_(mean[name])
            for step in range(training.local_steps):
                batch = collate(batches[client][round * training.local_steps + step], pad_token_id=0)
                loss = models[client, "whole"](input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss
                loss.backward()
                optimisers[client].step()
                schedulers[client].step()
                optimisers[client].zero_grad()
                losses[client].append(loss.item())
        total = sum(len(shard) for shard in shards.values())
        mean = {
            name: sum(len(shard) * models[client][name].detach().double() for client, shard in shards.items()) / total
            for name in start
        }
        means.append(mean)
    return losses, means


def assert_close(adapter: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(adapter[name], tensor.float(), rtol=0, atol=ADAPTER_TOLERANCE, msg=name)


def test_fed_lora_is_federated_averaging_by_hand(base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    losses, means = averaged_by_hand(base, SHARDS, TRAINING)
    seen: list[dict[str, Tensor]] = []
    result = run(fed_lora, base, tokenizer, SHARDS, on_round=lambda round, adapter: seen.append(dict(adapter)))
    assert {client: len(curve) for client, curve in result.losses.items()} == dict.fromkeys(SHARDS, 9)
    for client, curve in losses.items():
        assert result.losses[client] == pytest.approx(curve, abs=LOSS_TOLERANCE), client
    for adapter, mean in zip(seen, means, strict=True):
        assert_close(adapter, mean)
    assert_close(result.adapter, means[-1])


@pytest.mark.parametrize("cut", [(1, 1), (2, 1), (0, 3)])
def test_sflv1_computes_what_fed_lora_computes(
    base: Path, tokenizer: PreTrainedTokenizerFast, cut: tuple[int, int]
) -> None:
    whole = run(fed_lora, base, tokenizer, SHARDS)
    split = simulate(
        partition(tiny_model("llama"), bottom_blocks=cut[0], top_blocks=cut[1]),
        tokenizer,
        SHARDS,
        training=TRAINING,
        lora=LORA,
        codecs=OPEN,
        federation=FederationSection(agents=len(SHARDS), variant="sflv1"),
        seed=SEED,
    )
    for client in SHARDS:
        assert split.losses[client] == pytest.approx(whole.losses[client], abs=LOSS_TOLERANCE)
    assert_close(split.adapter, whole.adapter)
    assert whole.traffic == dict.fromkeys(SHARDS, Traffic())
    assert split.traffic["a"].sent_bytes > 0


@pytest.mark.parametrize("of", [central_lora, fed_lora])
def test_a_baseline_exports_an_adapter_that_stock_peft_loads(
    of: Any, base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run(of, base, tokenizer, SHARDS).export(tmp_path, base=base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    input_ids_BT = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids_BT).logits
        after = PeftModel.from_pretrained(model, tmp_path).eval()(input_ids_BT).logits
    assert (after - before).abs().max() > 1e-3


def test_a_client_without_examples_is_refused_by_name(base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="client 'd' has nothing to train on"):
        run(fed_lora, base, tokenizer, {**SHARDS, "d": []})


# What they ask of a client


def test_a_client_of_fed_lora_sends_and_receives_the_adapter_that_is_exported(
    base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    result = run(fed_lora, base, tokenizer, {"a": SHARDS["a"]}, training=TRAINING.model_copy(update={"rounds": 1}))
    result.export(tmp_path, base=base)
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert adapter_burden(result.adapter) == Burden(numbers, 4 * numbers, 4 * numbers)


def test_a_client_of_central_training_trains_nothing_and_gives_its_tokens_away() -> None:
    assert central_burden(examples(5, 6, prompt=2)) == Burden(data_bytes=4 * 11)


HELD = {
    "h.0.q.lora_A.weight": torch.zeros(2, 10),
    "h.0.q.lora_B.weight": torch.zeros(30, 2),
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "ffa"}, Burden(60, 4 * 60, 4 * 80)),
        ({"rule": "alternating"}, Burden(40, 4 * 40, 4 * 80)),
        ({"rule": "flexlora"}, Burden(80, 4 * 80, 4 * 80)),
        ({"rule": "flora", "residual_rank": 3}, Burden(80, 4 * 80, 4 * (80 + 3 * 40))),
        ({"exchanges": 5}, Burden(80, 4 * 6 * 80, 4 * 6 * 80)),
        ({"rule": "ffa", "exchanges": 5}, Burden(60, 4 * 6 * 60, 4 * (80 + 5 * 60))),
    ],
)
def test_only_what_a_round_trains_is_sent(settings: dict[str, Any], expected: Burden) -> None:
    assert adapter_burden(HELD, **settings) == expected


def test_a_client_that_holds_no_block_sends_no_adapter() -> None:
    assert adapter_burden({}) == Burden()


# Unlike devices


def test_wherever_each_client_is_cut_it_computes_what_fed_lora_computes(
    base: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    cuts = {"a": (1, 1), "b": (2, 1), "c": (0, 2)}
    whole = run(fed_lora, base, tokenizer, SHARDS)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    split = simulate(
        {client: partition(model, bottom_blocks=cut[0], top_blocks=cut[1]) for client, cut in cuts.items()},
        tokenizer,
        SHARDS,
        training=TRAINING,
        lora=LORA,
        codecs=OPEN,
        trunk=partition(model, bottom_blocks=0, top_blocks=0).trunk,
        seed=SEED,
    )
    for client in SHARDS:
        assert split.losses[client] == pytest.approx(whole.losses[client], abs=LOSS_TOLERANCE)
    assert_close(split.adapter, whole.adapter)
