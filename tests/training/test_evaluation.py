"""Evaluation over a link is the whole model's loss, and leaves the trunk as it found it."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from splitfed.errors import BudgetExhausted, NonFiniteLoss, ProtocolError
from splitfed.models import Partition, adapter_parameters, adapter_state, load_adapter_state
from splitfed.privacy import Ledger, epsilon
from splitfed.training.data import Example
from splitfed.training.evaluation import evaluate
from splitfed.training.link import Kind, Place
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.releases import OpenReleases
from tests.equivalence.tiny_models import tiny_model
from tests.training.split_client import PAD, D, ScriptedNoise, SplitClient, T, examples, noisy, split_client, tiny_parts

HELD_OUT = [*examples(5, 9, T, 2, 7), *examples(6, 8, prompt=4, seed=20)]
DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def run_evaluation(client: SplitClient, held_out: list[Example] = HELD_OUT, *, batch_size: int = 3) -> float:
    return evaluate(
        client.link,
        client.parts.bottom,
        client.parts.top,
        client.trainer.releases,
        held_out,
        batch_size=batch_size,
        max_tokens=T,
        pad_token_id=PAD,
        round=1,
    ).own


def merged(model: PreTrainedModel, parts: Partition) -> PreTrainedModel:
    """Fold the segments' adapters into the whole model's own weights; alpha / rank is 4 / 2."""
    states = {name: tensor for segment in parts for name, tensor in adapter_state(segment).items()}
    with torch.no_grad():
        for name, a_RI in states.items():
            layer, is_a, _ = name.partition(".lora_A.weight")
            if is_a:
                model.get_parameter(f"{layer}.weight").add_(states[f"{layer}.lora_B.weight"] @ a_RI, alpha=4 / 2)
    return model


@pytest.mark.parametrize("batch_size", [1, 3, len(HELD_OUT)])
def test_the_loss_is_that_of_the_whole_model_with_the_same_adapter(batch_size: int) -> None:
    parts = tiny_parts(dropout=0.3)
    whole = merged(tiny_model("llama"), parts)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for held_out in HELD_OUT:  # one by one, without padding
            labels = torch.tensor([held_out.labels])
            n_tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
            total += whole(torch.tensor([held_out.input_ids]), labels=labels).loss.item() * n_tokens
            tokens += n_tokens
    assert tokens == sum([4, 8, T - 1, 1, 6, 2, 4])
    assert run_evaluation(split_client(parts=parts), batch_size=batch_size) == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("is_noisy", [False, True])
def test_it_changes_nothing_and_leaves_nothing_in_flight(ledger: Ledger, is_noisy: bool) -> None:
    client = split_client(noisy(ledger) if is_noisy else OpenReleases(), parts=tiny_parts(dropout=0.3))
    before = client.adapters()
    run_evaluation(client, HELD_OUT * 3, batch_size=1)  # many more than may be in flight
    assert client.link.calls == ["forward"] * 3 * len(HELD_OUT)
    assert {sent.wants_smashed_gradient for sent in client.link.sent} == {False}
    after = client.adapters()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [p.grad for s in client.parts for p in adapter_parameters(s).values() if p.grad is not None] == []
    with pytest.raises(ProtocolError, match="without its forward"):
        client.trunk.backward("a", 0, 0, torch.zeros(1, T, D))
    client.trunk.step("a", 0)  # refused while anything is in flight


def test_training_goes_on_as_if_there_had_been_no_evaluation() -> None:
    undisturbed, evaluated = (split_client(parts=tiny_parts(dropout=0.3)) for _ in range(2))
    for client in (undisturbed, evaluated):
        for step in range(2):
            client.trainer.step(client.link, examples(5, 6, 7, 8), round=1, step=step)
            if client is evaluated:
                run_evaluation(client)
    wanted, found = undisturbed.adapters(), evaluated.adapters()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_places_are_numbered_and_marked_as_evaluation() -> None:
    client = split_client()
    run_evaluation(client, batch_size=3)
    assert [sent.place for sent in client.link.sent] == [Place(0, index, Kind.EVALUATE) for index in range(3)]
    assert [len(sent.tensor_BTD) for sent in client.link.sent] == [3, 3, 1]


def test_with_noise_on_it_is_charged_like_training_and_padded_to_the_runs_length(ledger: Ledger) -> None:
    client = split_client(noisy(ledger, noise_multiplier=0.5))
    run_evaluation(client, batch_size=3)
    assert {tuple(sent.tensor_BTD.shape[1:]) for sent in client.link.sent} == {(T, D)}
    assert ledger.spent("smashed", DELTA) == epsilon([(0.5, len(HELD_OUT))], DELTA)
    assert ledger.spent("output_gradient", DELTA) == 0


def test_padding_to_the_runs_length_does_not_change_the_loss(ledger: Ledger) -> None:
    silent = noisy(ledger, clipping_norms=(1e6, 1e6), streams=(ScriptedNoise(0), ScriptedNoise(0)))
    assert run_evaluation(split_client(silent)) == pytest.approx(run_evaluation(split_client()), rel=1e-5)


def test_it_stops_at_the_budget(ledger: Ledger) -> None:
    ledger.set_policy(delta=DELTA, epsilon_budget=epsilon([(0.5, 6)], DELTA))
    client = split_client(noisy(ledger, noise_multiplier=0.5))
    with pytest.raises(BudgetExhausted):
        run_evaluation(client, batch_size=3)
    assert [len(sent.tensor_BTD) for sent in client.link.sent] == [3, 3]


def test_examples_without_a_token_to_learn_have_loss_zero() -> None:
    assert run_evaluation(split_client(), examples(5, 6, prompt=6)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_smashed_data_that_is_not_finite_does_not_leave_and_says_so(value: float) -> None:
    client = split_client()
    *_, last = adapter_parameters(client.parts.bottom).values()  # of the feed-forward layer: attention may hide a NaN
    with torch.no_grad():
        last.view(-1)[0] = value
    with pytest.raises(NonFiniteLoss, match="smashed data of step 0 in round 1 cannot be sent"):
        run_evaluation(client)
    assert client.link.calls == []


def test_another_top_is_tried_on_the_same_outputs_and_the_own_one_stays() -> None:
    client = split_client(parts=tiny_parts(seed=0))
    own, other = adapter_state(client.parts.top), adapter_state(tiny_parts(seed=1).top)
    alone = run_evaluation(client)
    with_other = evaluate(
        client.link,
        client.parts.bottom,
        client.parts.top,
        client.trainer.releases,
        HELD_OUT,
        batch_size=3,
        max_tokens=T,
        pad_token_id=PAD,
        round=1,
        other_top=other,
    )
    sent = len(client.link.sent)
    load_adapter_state(client.parts.top, other)
    assert with_other.own == alone
    assert with_other.merged == run_evaluation(client) != alone
    assert len(client.link.sent) == sent * 3 // 2
    load_adapter_state(client.parts.top, own)
