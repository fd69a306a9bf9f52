"""What really leaves a device, seen from the link: with noise on, nothing that the ledger does not know."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitfed.errors import BudgetExhausted, LedgerError
from splitfed.privacy import GaussianSequenceMechanism, Ledger, NoMechanism, epsilon, read_ledger
from splitfed.training.data import Example
from splitfed.training.evaluation import evaluate
from splitfed.training.releases import LedgeredReleases, OpenReleases, Releases
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.training.split_client import (
    PAD,
    TRAINING,
    B,
    D,
    ScriptedNoise,
    SplitClient,
    T,
    example,
    examples,
    noisy,
    split_client,
    tiny_parts,
)

CHANNELS = {"forward": "smashed", "backward": "output_gradient"}
DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def silent(ledger: Ledger, *, clipping_norms: tuple[float, float] = (1e6, 1e6)) -> LedgeredReleases:
    """Noise is on, and every sample of it is zero: what is left is what the noise would cover."""
    return noisy(ledger, clipping_norms=clipping_norms, streams=(ScriptedNoise(0), ScriptedNoise(0)))


def sent_of_a_step(releases: Releases, chosen: list[Example], **changes: object) -> SplitClient:
    client = split_client(releases, training=TRAINING.model_copy(update=changes))
    client.trainer.step(client.link, chosen, round=1, step=0)
    return client


def run_evaluation(client: SplitClient, held_out: list[Example]) -> float:
    return evaluate(
        client.link,
        client.parts.bottom,
        client.parts.top,
        client.trainer.releases,
        held_out,
        batch_size=B,
        max_tokens=T,
        pad_token_id=PAD,
        round=1,
    ).own


# Nothing beside the tensors


@pytest.mark.parametrize("micro_batch_size", [B, 2, 1])
def test_with_noise_on_texts_of_any_length_look_the_same_from_outside(ledger: Ledger, micro_batch_size: int) -> None:
    """Calls, their order, places, shapes, what goes beside the tensors, and bytes."""
    seen = []
    for lengths in ([2, 3, 4, 5], [T, 2, T, 7], [T, T, T, T]):
        client = split_client(
            noisy(ledger), training=TRAINING.model_copy(update={"micro_batch_size": micro_batch_size}), codec="int8"
        )
        client.trainer.step(client.link, examples(*lengths, seed=sum(lengths)), round=1, step=0)
        run_evaluation(client, examples(*lengths, lengths[0]))
        assert {tuple(sent.tensor_BTD.shape[1:]) for sent in client.link.sent} == {(T, D)}
        assert {(sent.attention_mask_BT, sent.position_ids_BT) for sent in client.link.sent} == {(None, None)}
        outside = [(s.call, s.place, s.tensor_BTD.shape, s.wants_smashed_gradient) for s in client.link.sent]
        seen.append((outside, client.link.calls, client.link.traffic))
    assert seen[0] == seen[1] == seen[2]


def test_with_noise_off_rows_are_as_many_as_the_longest_text_has_tokens() -> None:
    client = sent_of_a_step(OpenReleases(), examples(2, 3, 4, 5))
    assert [tuple(tensor_BTD.shape) for tensor_BTD in client.link.of("forward")] == [(B, 5, D)]


def test_the_count_of_sent_tokens_is_a_constant_of_the_run_with_noise_on(ledger: Ledger) -> None:
    for lengths in ([2, 3, 4, 5], [T, T, T, T]):
        client = split_client(noisy(ledger))
        assert client.trainer.step(client.link, examples(*lengths), round=1, step=0).sent_tokens == B * T


# Padding and masked rows


@pytest.mark.parametrize("top_blocks", [0, 1])
def test_rows_of_padding_and_of_masked_prompts_carry_noise(ledger: Ledger, top_blocks: int) -> None:
    texts = examples(6, 8, 10, T, prompt=4)
    bare = split_client(parts=tiny_parts(top_blocks=top_blocks))
    bare.trainer.step(bare.link, texts, round=1, step=0)
    (bare_gradient_BTD,) = bare.link.of("backward")
    assert bare_gradient_BTD[0, 6:].count_nonzero() == 0  # padding shows itself
    assert (bare_gradient_BTD[:, :3].count_nonzero() == 0) == (top_blocks == 0)  # and so do prompts
    client = split_client(noisy(ledger, noise_multiplier=1e-3), parts=tiny_parts(top_blocks=top_blocks))
    client.trainer.step(client.link, texts, round=1, step=0)
    for sent in client.link.sent:
        assert sent.tensor_BTD.count_nonzero() == B * T * D


def test_rows_of_padding_differ_even_where_nothing_but_the_padding_token_is_in_them(ledger: Ledger) -> None:
    texts = examples(3, 4, 5, T)
    bare = split_client(parts=tiny_parts(bottom_blocks=0))
    bare.trainer.step(bare.link, texts, round=1, step=0)
    assert len(torch.unique(bare.link.of("forward")[0][0, 3:], dim=0)) == 1
    client = split_client(noisy(ledger, noise_multiplier=1e-3), parts=tiny_parts(bottom_blocks=0))
    client.trainer.step(client.link, texts, round=1, step=0)
    assert len(torch.unique(client.link.of("forward")[0].flatten(0, 1), dim=0)) == B * T


def test_padding_carries_as_much_noise_as_any_row(ledger: Ledger) -> None:
    """Its gradient is zero, so what leaves in its rows is the noise itself, over the batch size."""
    noise_multiplier, clipping_norm = 0.5, 0.01
    releases = noisy(ledger, noise_multiplier=noise_multiplier, clipping_norms=(1.0, clipping_norm))
    client = sent_of_a_step(releases, examples(2, 2, 2, 2))
    padding = client.link.of("backward")[0][:, 2:].double()
    expected = noise_multiplier * 2 * clipping_norm * math.sqrt(T) / B
    assert padding.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * padding.numel()))
    assert abs(padding.mean().item()) / expected < 5 / math.sqrt(padding.numel())


# Records do not leak through each other

OTHERS = ([5, 5, 5], [2, T, 9], [T, T, T])
"""Lengths of the other texts of a batch."""


@pytest.mark.parametrize("clipping_norms", [(1e6, 1e6), (0.5, 1e-3)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("micro_batch_size", [B, 2])
def test_what_leaves_of_a_sequence_does_not_depend_on_the_others_of_its_batch(
    ledger: Ledger, clipping_norms: tuple[float, float], micro_batch_size: int
) -> None:
    releases = silent(ledger, clipping_norms=clipping_norms)
    mine = example("mine", 7, seed=50)
    rows: dict[str, list[Tensor]] = {"forward": [], "backward": []}
    for seed, lengths in enumerate(OTHERS):
        client = sent_of_a_step(
            releases, [mine, *examples(*lengths, seed=100 * seed)], micro_batch_size=micro_batch_size
        )
        for call, found in rows.items():
            found.append(client.link.of(call)[0][0])
    for call, (first, *rest) in rows.items():
        for other in rest:
            assert_equal_to_rounding(other, first, call)


def test_without_noise_the_others_do_matter() -> None:
    """The step's divisor is its count of tokens then, as in central training."""
    mine = example("mine", 7, seed=50)
    first, second = (
        sent_of_a_step(OpenReleases(), [mine, *examples(*lengths)]).link.of("backward")[0][0, :7]
        for lengths in OTHERS[:2]
    )
    tokens = [6 + sum(length - 1 for length in lengths) for lengths in OTHERS[:2]]
    assert_equal_to_rounding(second, first * tokens[0] / tokens[1], "scaled by the counts of both batches")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3, B])
def test_the_released_gradient_is_that_of_the_sequence_alone_over_a_constant_of_the_run(
    ledger: Ledger, family: str, batch: int
) -> None:
    """Of the sum of the sequence's token losses ÷ T ÷ batch size, even where a step has fewer sequences."""
    mine = example("mine", 7, prompt=2, seed=50)
    client = split_client(silent(ledger), parts=tiny_parts(family))
    client.trainer.step(client.link, [mine, *examples(*[9] * (batch - 1))], round=1, step=0)
    (released_BTD,) = client.link.of("backward")
    parts = tiny_parts(family)
    trunk_output_1TD = parts.trunk(parts.bottom(torch.tensor([mine.input_ids]))).detach().requires_grad_()
    logits_TV = parts.top(trunk_output_1TD).logits[0]
    (F.cross_entropy(logits_TV[1:-1], torch.tensor(mine.input_ids[2:]), reduction="sum") / T / B).backward()
    assert trunk_output_1TD.grad is not None
    assert_equal_to_rounding(released_BTD[0, :7], trunk_output_1TD.grad[0], "the text")
    assert released_BTD[0, 7:].count_nonzero() == 0


# Clip and noise on what leaves


@pytest.mark.parametrize("clipping_norms", [(0.5, 1e-3), (2.0, 1e-5)])
def test_no_token_leaves_longer_than_the_clip_before_its_noise(
    ledger: Ledger, clipping_norms: tuple[float, float]
) -> None:
    client = sent_of_a_step(silent(ledger, clipping_norms=clipping_norms), examples(T, T, 9, 5))
    units = {"forward": 1, "backward": B}  # the clip of a gradient is applied before the division by the batch size
    for (call, unit), clipping_norm in zip(units.items(), clipping_norms, strict=True):
        norms_BT = client.link.of(call)[0].double().norm(dim=-1) * unit
        assert norms_BT.max() <= clipping_norm * (1 + 2**-22)
        assert norms_BT.max() == pytest.approx(clipping_norm, rel=1e-6)  # it did cut


@pytest.mark.parametrize("micro_batch_size", [B, 1])
def test_the_noise_has_multiplier_times_twice_the_clip_times_root_t_where_the_clip_is_applied(
    ledger: Ledger, micro_batch_size: int
) -> None:
    """One standard deviation in every element: rows without a gradient leave as std ÷ batch size."""
    streams = ScriptedNoise(1), ScriptedNoise(1)
    releases = noisy(ledger, noise_multiplier=0.25, clipping_norms=(2.0, 0.01), streams=streams)
    client = sent_of_a_step(releases, examples(4, 4, 4, 4), micro_batch_size=micro_batch_size)
    expected = [0.25 * 2 * 2.0 * math.sqrt(T), 0.25 * 2 * 0.01 * math.sqrt(T)]
    for stream, std in zip(streams, expected, strict=True):
        assert stream.stds == pytest.approx([std] * (B // micro_batch_size), rel=1e-12)
    for gradient_BTD in client.link.of("backward"):
        padding = gradient_BTD[:, 4:]
        torch.testing.assert_close(padding, torch.full_like(padding, expected[1] / B))


# Noise is nobody's to know


def test_torch_seeds_have_no_influence_on_noise(ledger: Ledger) -> None:
    texts, noise = examples(5, 6, 7, 8), []
    silent_client = sent_of_a_step(silent(ledger, clipping_norms=(1.0, 0.01)), texts)
    for _ in range(2):
        torch.manual_seed(7)
        client = sent_of_a_step(noisy(ledger), texts)
        noise.append(client.link.of("forward")[0] - silent_client.link.of("forward")[0])
    correlation = torch.corrcoef(torch.stack([tensor.flatten() for tensor in noise]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(B * T * D)


def test_no_two_releases_share_noise_over_sequences_steps_channels_and_agents(tmp_path: Path) -> None:
    """All texts are equal, and what leaves in the rows of padding is noise, or noise many times over the data."""
    same, sent = [example("r", 5)] * B, []
    for agent in ("a", "b"):
        with Ledger(tmp_path / agent / "ledger.jsonl") as ledger:
            client = split_client(noisy(ledger))
            for step in range(2):
                client.trainer.step(client.link, same, round=1, step=step)
            sent += [tensor_BTD[:, 5:].flatten(1) for call in CHANNELS for tensor_BTD in client.link.of(call)]
    assert len(sent) == 2 * 2 * 2
    correlations = torch.corrcoef(torch.cat(sent)).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt((T - 5) * D)


# The ledger


def test_every_charge_is_on_disk_before_its_tensor_leaves_evaluation_included(ledger: Ledger) -> None:
    client = split_client(noisy(ledger), training=TRAINING.model_copy(update={"micro_batch_size": 2}))
    leaving: Counter[str] = Counter()
    checks = []

    def check(call: str, tensor_BTD: Tensor) -> None:
        leaving[CHANNELS[call]] += len(tensor_BTD)
        charged: Counter[str] = Counter()
        for row in read_ledger(ledger.path).rows:
            charged[row.channel] += row.sequences
        checks.append(charged >= leaving)

    client.link.before = check
    for step in range(2):
        client.trainer.step(client.link, examples(5, 6, 7, 8), round=1, step=step)
    run_evaluation(client, examples(5, 6, 7, 8, 9))
    assert checks == [True] * (2 * 2 * 2 + 2)
    assert leaving == {"smashed": 2 * B + 5, "output_gradient": 2 * B}


def test_a_charge_says_what_left_where_and_of_which_records(ledger: Ledger) -> None:
    client = split_client(noisy(ledger, noise_multiplier=0.25))
    long_record = [example("long", T, seed=seed) for seed in range(3)]  # a row cut into three sequences
    client.trainer.step(client.link, [*long_record, example("short", 4)], round=1, step=0)
    run_evaluation(client, examples(5))
    rows = read_ledger(ledger.path).rows
    records = ("long", "long", "long", "short")
    assert [(r.kind, r.channel, r.records, r.sequences) for r in rows] == [
        ("train", "smashed", records, 4),
        ("train", "output_gradient", records, 4),
        ("evaluate", "smashed", ("r0",), 1),
    ]
    assert {(r.run, r.round, r.step, r.noise_multiplier, r.coupled) for r in rows} == {("r", 1, 0, 0.25, True)}


def test_evaluation_costs_as_much_as_training(ledger: Ledger) -> None:
    client = split_client(noisy(ledger, noise_multiplier=0.5))
    client.trainer.step(client.link, examples(5, 6, 7, 8), round=1, step=0)
    assert ledger.spent("smashed", DELTA) == epsilon([(0.5, B)], DELTA)
    run_evaluation(client, examples(5, 6, 7))
    assert ledger.spent("smashed", DELTA) == epsilon([(0.5, B + 3)], DELTA)
    assert ledger.spent("output_gradient", DELTA) == epsilon([(0.5, B)], DELTA)


@pytest.mark.parametrize(
    ("multipliers", "spent"),
    [((0.5, 1e3), "forward"), ((1e3, 0.5), "backward")],
    ids=["smashed", "output gradient"],
)
def test_nothing_leaves_once_the_budget_is_spent(ledger: Ledger, multipliers: tuple[float, float], spent: str) -> None:
    """The budget pays for 6 sequences with noise multiplier 0.5, the other channel costs next to nothing."""
    budget = epsilon([(0.5, 6)], DELTA)
    assert budget is not None
    ledger.set_policy(delta=DELTA, epsilon_budget=budget * (1 + 1e-3))
    mechanisms = [GaussianSequenceMechanism(1.0, multiplier) for multiplier in multipliers]
    client = split_client(
        LedgeredReleases(*mechanisms, ledger, run="r"), training=TRAINING.model_copy(update={"micro_batch_size": 1})
    )
    for _ in range(2):  # starting the round again does not help
        with pytest.raises(BudgetExhausted, match="so it was not made"):
            client.trainer.step(client.link, examples(*[5] * 8), round=1, step=0)
        assert client.link.calls.count(spent) == 6
        assert "step" not in client.link.calls
        client.trunk.open_round("a", 1, client.trunk.result("a")[0], {})
    assert ledger.spent(CHANNELS[spent], DELTA) == budget


def test_a_charge_that_cannot_be_written_keeps_the_tensor_here(ledger: Ledger) -> None:
    client = split_client(noisy(ledger))
    ledger.close()
    with pytest.raises(LedgerError, match="so this release was not made"):
        client.trainer.step(client.link, examples(5, 5, 5, 5), round=1, step=0)
    assert client.link.calls == []


def test_without_noise_the_ledger_says_so_once_a_round_and_channel_before_anything_leaves(ledger: Ledger) -> None:
    client = split_client(LedgeredReleases(NoMechanism(), NoMechanism(), ledger, run="r"))
    seen = []
    client.link.before = lambda call, _: seen.append(
        CHANNELS[call] in {row.channel for row in read_ledger(ledger.path).rows}
    )
    assert client.trainer.releases.is_noisy is False
    for step in range(2):
        client.trainer.step(client.link, examples(5, 6, 7, 8), round=1, step=step)
    client.trunk.open_round("a", 2, client.trunk.result("a")[0], {})
    client.trainer.step(client.link, examples(5, 6, 7, 8), round=2, step=0)
    assert seen == [True] * 6
    rows = read_ledger(ledger.path).rows
    assert [(row.channel, row.round, row.noise_multiplier) for row in rows] == [
        ("smashed", 1, 0),
        ("output_gradient", 1, 0),
        ("smashed", 2, 0),
        ("output_gradient", 2, 0),
    ]
    assert ledger.spent("smashed") is None
    assert ledger.spent("output_gradient") is None
    assert ledger.total_statement() == "none: the smashed data and the output gradient are not protected"


def test_noise_on_one_channel_alone_hides_lengths_and_claims_nothing_for_the_other(ledger: Ledger) -> None:
    releases = LedgeredReleases(GaussianSequenceMechanism(1.0, 0.5), NoMechanism(), ledger, run="r")
    client = sent_of_a_step(releases, examples(2, 3, 4, 5))
    assert {tuple(sent.tensor_BTD.shape) for sent in client.link.sent} == {(B, T, D)}
    assert ledger.spent("smashed", DELTA) == epsilon([(0.5, B)], DELTA)
    assert ledger.spent("output_gradient") is None
    assert ledger.total_statement() == "none: the output gradient is not protected"
