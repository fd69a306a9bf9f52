"""A whole run in one process: federated averaging by hand, adapters that stock PEFT loads, and the README's session."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import splitfed
from splitfed.config import CodecSection, LoraSection, TrainingSection
from splitfed.models import Partition, adapter_state
from splitfed.privacy import GaussianSequenceMechanism, Ledger, epsilon
from splitfed.training.data import Example
from splitfed.training.releases import LedgeredReleases, OpenReleases
from splitfed.training.simulate import Simulation, examples_of, simulate
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import examples

TRAINING = TrainingSection(rounds=1, local_steps=3, batch_size=2, max_tokens=12, learning_rate=1e-2)
LORA = LoraSection(rank=2, alpha=4.0)
OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
DELTA = 1e-5


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Simulate on a fresh tiny model."""

    def run(shards: Mapping[str, Sequence[Example]], **changes: Any) -> tuple[Simulation, Partition]:
        family, training = changes.pop("family", "llama"), changes.pop("training", TRAINING)
        parts = splitfed.partition(tiny_model(family), bottom_blocks=1, top_blocks=1)
        settings = {"training": training, "lora": LORA, "codecs": OPEN, "seed": 4, **changes}
        return simulate(parts, tokenizer, shards, **settings), parts

    return run


def assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Federated averaging


def test_a_round_is_the_mean_of_the_clients_own_rounds_by_examples(run: Any) -> None:
    shards = {"a": examples(5, 6, 7, 8, 9, seed=1), "b": examples(10, 11, seed=50)}
    alone = {client: run({client: shard})[0] for client, shard in shards.items()}
    together, parts = run(shards)
    assert together.losses == {client: alone[client].losses[client] for client in shards}
    for name, tensor in together.adapter.items():
        mean = (5 * alone["a"].adapter[name].double() + 2 * alone["b"].adapter[name].double()) / 7
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-23, atol=2**-43)
        assert not torch.equal(alone["a"].adapter[name], alone["b"].adapter[name])
    assert_same_bits({name: tensor for part in parts for name, tensor in adapter_state(part).items()}, together.adapter)


class AsIfNoisy(OpenReleases):
    """Says that noise is on, and adds none."""

    is_noisy = True


def test_with_noise_on_every_client_counts_the_same_as_on_a_server(run: Any) -> None:
    """The number of examples says something about them, and leaves no device then."""
    shards = {"a": examples(5, 6, 7, 8, 9, seed=1), "b": examples(10, 11, seed=50)}
    gated = {"releases": lambda client: AsIfNoisy()}
    alone = {client: run({client: shard}, **gated)[0] for client, shard in shards.items()}
    together, _ = run(shards, **gated)
    for name, tensor in together.adapter.items():
        mean = (alone["a"].adapter[name].double() + alone["b"].adapter[name].double()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-23, atol=2**-44)
        assert not torch.equal(alone["a"].adapter[name], alone["b"].adapter[name])


def test_the_next_round_starts_from_the_mean_and_each_client_keeps_its_optimiser(run: Any) -> None:
    """Two clients with one and the same text, in two rounds, are one client with it in one round of as many steps."""
    one_text = examples(9)
    alone, _ = run({"a": one_text}, training=TRAINING.model_copy(update={"local_steps": 6}))
    together, _ = run({"a": one_text, "b": one_text}, training=TRAINING.model_copy(update={"rounds": 2}))
    assert together.losses["a"] == together.losses["b"]
    assert together.losses["a"] == pytest.approx(alone.losses["a"], rel=1e-6)
    assert alone.losses["a"][-1] < alone.losses["a"][0]


def test_identical_clients_leave_each_other_unchanged(run: Any) -> None:
    """The mean of equal numbers is the number, to the resolution of the sum: 2⁻⁴⁴."""
    one_text = examples(9)
    alone, _ = run({"a": one_text})
    together, _ = run(dict.fromkeys("abc", one_text))
    assert alone.adapter.keys() == together.adapter.keys()
    for name, tensor in alone.adapter.items():
        assert (together.adapter[name].double() - tensor.double()).abs().max() <= 2**-44


def test_the_order_in_which_clients_are_named_does_not_change_a_bit(run: Any) -> None:
    shards = {"a": examples(5, 6, 7, seed=1), "b": examples(10, 11, seed=50), "c": examples(4, seed=90)}
    lora = LORA.model_copy(update={"dropout": 0.2})
    first, _ = run(shards, lora=lora)
    second, _ = run({client: shards[client] for client in "cab"}, lora=lora)
    assert first.losses == second.losses
    assert_same_bits(first.adapter, second.adapter)


def test_equal_seeds_give_equal_runs_and_others_do_not(run: Any) -> None:
    shards = {"a": examples(5, 6, 7)}
    first, _ = run(shards)
    torch.manual_seed(5)
    again, _ = run(shards)
    other, _ = run(shards, seed=5)
    assert_same_bits(first.adapter, again.adapter)
    name = min(first.adapter)
    assert not torch.equal(first.adapter[name], other.adapter[name])


# Its result


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_peft_gives_the_split_models_logits(run: Any, family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    result, parts = run({"a": examples(5, 6), "b": examples(7)}, family=family)
    result.export(tmp_path / "adapter", base=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    input_ids_BT = torch.randint(3, 90, (2, 9))
    for segment in parts:
        segment.eval()
    with torch.no_grad():
        before = base(input_ids_BT).logits
        stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids_BT).logits
        split = parts.top(parts.trunk(parts.bottom(input_ids_BT))).logits
    assert_equal_to_rounding(split, stock, "logits")
    assert (split - before).abs().max() > 100 * (split - stock).abs().max()  # the adapter does something


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_the_loss_falls_with_every_codec(run: Any, codec: str) -> None:
    codecs = CodecSection.model_validate(dict.fromkeys(OPEN.model_dump(exclude={"adapter"}), codec))
    result, _ = run({"a": examples(9)}, training=TRAINING.model_copy(update={"local_steps": 8}), codecs=codecs)
    assert result.losses["a"][-1] < 0.9 * result.losses["a"][0]


def test_with_noise_on_it_runs_and_each_clients_ledger_has_its_own_releases(run: Any, tmp_path: Path) -> None:
    ledgers = {client: Ledger(tmp_path / client / "ledger.jsonl") for client in "ab"}

    def releases(client: str) -> LedgeredReleases:
        mechanisms = GaussianSequenceMechanism(1.0, 0.5), GaussianSequenceMechanism(0.01, 0.5)
        return LedgeredReleases(*mechanisms, ledgers[client], run="r")

    training = TRAINING.model_copy(update={"rounds": 2})
    result, _ = run({"a": examples(5, 6), "b": examples(7)}, training=training, releases=releases)
    assert all(torch.isfinite(tensor).all() for tensor in result.adapter.values())
    for ledger in ledgers.values():
        for channel in ("smashed", "output_gradient"):
            assert ledger.spent(channel, DELTA) == epsilon([(0.5, 2 * 3 * 2)], DELTA)
        ledger.close()


# Its input


def test_texts_become_examples_that_know_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    found = examples_of(["w1 w2", "w3 w4 w5 w6 w7"], tokenizer, max_tokens=4)
    assert [example.record for example in found] == ["0", "1", "1"]
    assert max(len(example.input_ids) for example in found) == 4
    assert [example.labels for example in found] == [example.input_ids for example in found]


def test_texts_and_their_examples_are_the_same_input(tokenizer: PreTrainedTokenizerFast, run: Any) -> None:
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    as_texts, _ = run({"a": texts})
    as_examples, _ = run({"a": examples_of(texts, tokenizer, max_tokens=TRAINING.max_tokens)})
    assert_same_bits(as_texts.adapter, as_examples.adapter)


@pytest.mark.parametrize("shard", [[], [""]], ids=["no text", "an empty text"])
def test_a_client_with_nothing_to_train_on_is_refused_by_name(run: Any, shard: list[str]) -> None:
    with pytest.raises(ValueError, match="client 'b' has nothing to train on"):
        run({"a": examples(5), "b": shard})


# The README


def test_the_readmes_session_runs_as_it_stands(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    (session,) = [block for block in blocks if "splitfed.simulate(" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(session, "README.md", "exec"), names)
    losses = names["run"].losses
    assert losses.keys() == {"clinic", "branch"}
    assert [client for client, curve in losses.items() if curve[-1] >= curve[0]] == []
    base = AutoModelForCausalLM.from_pretrained(splitfed.base_model_folder())
    assert PeftModel.from_pretrained(base, tmp_path / "adapter").active_adapters == ["default"]


def test_a_gate_sees_the_adapters_that_it_is_for(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: dict[str, int] = {}
    parts = splitfed.partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1)

    def releases(client: str) -> OpenReleases:
        seen[client] = len(adapter_state(parts.bottom)) + len(adapter_state(parts.top))
        return OpenReleases()

    simulate(parts, tokenizer, {"a": examples(5, 6)}, training=TRAINING, lora=LORA, codecs=OPEN, releases=releases)
    assert seen["a"] > 0
