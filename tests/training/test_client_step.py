"""A local step gives the same numbers however it crosses the link, and stops before it sends what is not finite."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitfed.errors import NonFiniteLoss, PrivacyError, RoundLost
from splitfed.models import adapter_parameters, load_adapter_state
from splitfed.privacy import Ledger, PerExampleMechanism, StepSampling
from splitfed.training.client_step import ClientTrainer, Loss, causal_lm_loss, count_label_tokens
from splitfed.training.data import Example
from splitfed.training.link import Link, Place
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.releases import LedgeredReleases, OpenReleases, Releases
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.training.split_client import (
    TRAINING,
    VOCABULARY,
    B,
    D,
    RecordingLink,
    ScriptedNoise,
    SplitClient,
    T,
    example,
    examples,
    noisy,
    split_client,
    tiny_parts,
)

TEXTS = examples(5, 8, T, 3, prompt=1)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


@pytest.fixture(params=["noise off", "noise on"])
def releases(request: pytest.FixtureRequest, ledger: Ledger) -> Releases:
    return OpenReleases() if request.param == "noise off" else noisy(ledger)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def run_steps(client: SplitClient, texts: Sequence[Example] = TEXTS) -> list[float]:
    return [client.trainer.step(client.link, texts, round=1, step=step).loss for step in range(2)]


# The loss


def test_the_loss_is_the_sum_of_next_token_losses_over_the_divisor() -> None:
    logits_BTV = torch.randn(3, 5, VOCABULARY)
    labels_BT = torch.randint(0, VOCABULARY, (3, 5))
    labels_BT[1, 2:] = IGNORED_LABEL
    wanted = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    torch.testing.assert_close(causal_lm_loss(logits_BTV, labels_BT, 7.5), wanted / 7.5)
    assert count_label_tokens(labels_BT) == 4 + 1 + 4


def test_the_reported_loss_is_the_mean_per_token_whatever_the_divisor_of_the_run(ledger: Ledger) -> None:
    silent = noisy(ledger, clipping_norms=(1e6, 1e6), streams=(ScriptedNoise(0), ScriptedNoise(0)))
    result = split_client(silent).trainer.step(split_client().link, TEXTS, round=1, step=0)
    wanted = split_client().trainer.step(split_client().link, TEXTS, round=1, step=0)
    assert result.label_tokens == wanted.label_tokens == 4 + 7 + (T - 1) + 2
    assert result.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert (wanted.sent_tokens, result.sent_tokens) == (B * T, B * T)


def test_a_step_without_a_token_to_learn_has_loss_zero_and_moves_nothing() -> None:
    client = split_client()
    before = client.adapters()
    result = client.trainer.step(client.link, examples(4, 5, prompt=5), round=1, step=0)
    assert (result.loss, result.label_tokens) == (0.0, 0)
    assert_same_bits(client.adapters(), before)


# Micro-batches in flight


@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 8])
def test_no_more_micro_batches_are_under_way_than_the_run_allows(max_in_flight: int) -> None:
    training = TRAINING.model_copy(update={"micro_batch_size": 1, "max_in_flight": max_in_flight})
    client = split_client(training=training)
    client.trainer.step(client.link, TEXTS, round=1, step=0)
    under_way = [
        client.link.calls[: at + 1].count("forward") - client.link.calls[: at + 1].count("backward")
        for at in range(len(client.link.calls))
    ]
    assert max(under_way) == min(max_in_flight, B)
    assert client.link.calls[-1] == "step"
    assert client.link.calls.count("step") == 1
    for call in ("forward", "backward"):
        assert [sent.place for sent in client.link.sent if sent.call == call] == [Place(0, i) for i in range(B)]


def test_how_many_are_in_flight_does_not_change_a_bit() -> None:
    ends = []
    for max_in_flight in (1, 2, 4):
        training = TRAINING.model_copy(update={"micro_batch_size": 1, "max_in_flight": max_in_flight})
        client = split_client(training=training, parts=tiny_parts(dropout=0.3))
        run_steps(client)
        ends.append(client.adapters())
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


class LateLink(RecordingLink):
    """Answers backwards only when the step is applied, as a slow server may."""

    def __init__(self, inner: RecordingLink) -> None:
        super().__init__(inner)
        self.held: list[tuple[Future[Tensor | None], Future[Tensor | None]]] = []

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        late: Future[Tensor | None] = Future()
        self.held.append((late, super().backward(place, output_gradient_BTD)))
        return late

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        applied = super().step(step, squared_norm=squared_norm)
        for late, answer in self.held:
            late.set_result(answer.result())
        self.held.clear()
        return applied


def test_when_smashed_gradients_arrive_does_not_change_a_bit() -> None:
    training = TRAINING.model_copy(update={"micro_batch_size": 2, "max_in_flight": 2})
    prompt, late = split_client(training=training), split_client(training=training)
    late.link = LateLink(late.link)
    assert run_steps(prompt) == run_steps(late)
    assert_same_bits(prompt.adapters(), late.adapters())


def test_micro_batches_together_are_the_batch() -> None:
    """Gradients add up in another order, and rows are padded to another length: equal to rounding."""
    whole = split_client()
    parted = split_client(training=TRAINING.model_copy(update={"micro_batch_size": 1}))
    assert whole.trainer.step(whole.link, TEXTS, round=1, step=0).loss == pytest.approx(
        parted.trainer.step(parted.link, TEXTS, round=1, step=0).loss, rel=1e-6
    )
    (whole_BTD,) = whole.link.of("backward")
    for row, gradient_1TD in enumerate(parted.link.of("backward")):
        assert_equal_to_rounding(whole_BTD[row, : gradient_1TD.shape[1]], gradient_1TD[0], f"sequence {row}")


# Who has something to train


@pytest.mark.parametrize(
    ("bottom_blocks", "top_blocks", "is_training", "wants"),
    [(0, 0, False, False), (0, 1, True, False), (1, 0, True, True), (1, 1, True, True)],
)
def test_a_smashed_gradient_is_asked_for_where_the_bottom_has_something_to_train(
    bottom_blocks: int, top_blocks: int, is_training: bool, wants: bool
) -> None:
    client = split_client(parts=tiny_parts(bottom_blocks=bottom_blocks, top_blocks=top_blocks))
    before = client.adapters()
    run_steps(client)
    assert client.trainer.is_training is is_training
    assert {sent.wants_smashed_gradient for sent in client.link.sent if sent.call == "forward"} == {wants}
    after = client.adapters()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


# Rows that hold no example


class Operations(TorchDispatchMode):
    """Keeps the name and the shapes of everything that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.done.append((str(func), [tensor.shape for tensor in tensors]))
        return func(*args, **(kwargs or {}))


SECRET = TRAINING.model_copy(update={"batch_size": 6, "micro_batch_size": 4})
DRAWS: list[list[Example | None]] = [
    [None] * 6,
    [None, TEXTS[0], None, None, None, TEXTS[1]],
    [None, None, None, None, TEXTS[2], None],
    [TEXTS[3], TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[3], TEXTS[0]],
]


def secret_client(ledger: Ledger, *, noise: float | None = None, loss: Loss = causal_lm_loss) -> SplitClient:
    """A client under DP-SGD with noise on the cut; every sample of it is so many standard deviations, or random."""
    *cut, own = [None if noise is None else ScriptedNoise(noise) for _ in range(3)]
    gate = replace(
        noisy(ledger, streams=(cut[0], cut[1])),
        per_example=PerExampleMechanism(1.0, 1.0, own),
        sampling=StepSampling(0.1),
    )
    return split_client(gate, training=SECRET, loss=loss)


def test_what_crosses_the_link_has_the_same_shape_whoever_was_drawn(ledger: Ledger) -> None:
    crossed = []
    for draw in DRAWS:
        client = secret_client(ledger)
        result = client.trainer.step(client.link, draw, round=1, step=0)
        assert result.sent_tokens == 6 * T
        assert result.label_tokens == sum(len(text.input_ids) - 1 for text in draw if text is not None)
        crossed.append(
            [
                (sent.call, sent.place, sent.tensor_BTD.shape, sent.tensor_BTD.count_nonzero().item())
                for sent in client.link.sent
            ]
        )
    assert [call[:3] for call in crossed[0]] == [
        ("forward", Place(0, 0), (4, T, D)),
        ("forward", Place(0, 1), (2, T, D)),
        ("backward", Place(0, 0), (4, T, D)),
        ("backward", Place(0, 1), (2, T, D)),
    ]
    assert crossed == [crossed[0]] * len(DRAWS)  # and every element of every row has its noise


def test_a_row_without_an_example_is_noise_alone_and_changes_no_other_row(ledger: Ledger) -> None:
    sent = {}
    for noise in (0.0, 1.0):
        client = secret_client(ledger, noise=noise)
        client.trainer.step(client.link, DRAWS[1], round=1, step=0)
        sent[noise] = [torch.cat(client.link.of(call)) for call in ("forward", "backward")]
    full = secret_client(ledger, noise=0.0)
    full.trainer.step(full.link, [text or TEXTS[3] for text in DRAWS[1]], round=1, step=0)
    empty, held = [0, 2, 3, 4], [1, 5]
    for call, quiet_BTD, loud_BTD in zip(("forward", "backward"), sent[0.0], sent[1.0], strict=True):
        assert quiet_BTD[empty].count_nonzero() == 0
        assert len(loud_BTD[empty].unique()) == 1  # the script's only value
        assert_equal_to_rounding(quiet_BTD[held], torch.cat(full.link.of(call))[held], call)


def test_a_row_without_an_example_is_in_no_sum_and_no_record_though_noise_flows_through_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[set[int]] = []
    records: list[list[str]] = []
    clip, adapter_gradient = PerExampleMechanism.clip, LedgeredReleases.adapter_gradient

    def watched_clip(
        self: PerExampleMechanism, per_example: Mapping[str, Tensor], *, is_real_B: Tensor
    ) -> dict[str, Tensor]:
        clipped.append({len(gradients) for gradients in per_example.values()})
        total = clip(self, per_example, is_real_B=is_real_B)
        held = clip(self, {name: gradients[is_real_B] for name, gradients in per_example.items()})
        for name in held:
            assert_equal_to_rounding(total[name], held[name], name)
        return total

    def watched_gate(self: LedgeredReleases, sums: Mapping[str, Tensor], **beside: Any) -> dict[str, Tensor]:
        records.append(beside["records"])
        return adapter_gradient(self, sums, **beside)

    monkeypatch.setattr(PerExampleMechanism, "clip", watched_clip)
    monkeypatch.setattr(LedgeredReleases, "adapter_gradient", watched_gate)
    client = secret_client(ledger)
    for step, draw in enumerate(DRAWS[:2]):
        client.trainer.step(client.link, draw, round=1, step=step)
    assert clipped == [{4}, {2}] * 2  # all rows are clipped, so that the time does not tell how many were drawn
    assert records == [[], ["r0", "r1"]]


def test_a_step_does_the_same_work_whoever_was_drawn(ledger: Ledger) -> None:
    """Every operation of every step is on the same shapes: with all rows held, with some, and with none."""
    work = []
    for draw in DRAWS:
        client = secret_client(ledger)
        client.trainer.step(client.link, DRAWS[3], round=1, step=0)  # what is made once
        with Operations() as operations:
            client.trainer.step(client.link, draw, round=1, step=1)
        work.append(operations.done)
    assert len(work[0]) > 100
    assert [done == work[0] for done in work] == [True] * len(DRAWS)


def test_an_empty_draw_is_a_step_of_noise_alone(ledger: Ledger) -> None:
    client = secret_client(ledger, noise=0.0)
    before = client.adapters()
    assert client.trainer.step(client.link, DRAWS[0], round=1, step=0).loss == 0.0
    assert_same_bits(client.adapters(), before)
    client = secret_client(ledger, noise=1.0)
    client.trainer.step(client.link, DRAWS[0], round=1, step=0)
    after = client.trainer.adapter_state()
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []


def test_a_loss_that_heeds_no_labels_says_nothing_of_a_row_without_an_example(ledger: Ledger) -> None:
    def loss(logits_BTV: Tensor, labels_BT: Tensor, divisor: float) -> Tensor:
        return logits_BTV.sum() / divisor

    client = secret_client(ledger, noise=0.0, loss=loss)
    client.trainer.step(client.link, DRAWS[1], round=1, step=0)
    gradient_BTD = torch.cat(client.link.of("backward"))
    assert [row for row in range(6) if gradient_BTD[row].count_nonzero()] == [1, 5]


# Random streams


def test_a_step_neither_reads_nor_advances_torchs_generator() -> None:
    ends = []
    for seed in (1, 2):
        client = split_client(parts=tiny_parts(dropout=0.3))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run_steps(client)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(client.adapters())
    assert_same_bits(*ends)


def test_dropout_differs_between_rounds_steps_and_micro_batches() -> None:
    """Of one text, under one adapter, in every place of two rounds."""
    training = TRAINING.model_copy(update={"micro_batch_size": 1, "learning_rate": 1e-30})
    smashed = []
    for round in (1, 2):
        client = split_client(training=training, parts=tiny_parts(dropout=0.3))
        for step in range(2):
            client.trainer.step(client.link, [example("r", T)] * B, round=round, step=step)
        smashed += client.link.of("forward")
    assert len(torch.unique(torch.cat(smashed).flatten(1), dim=0)) == len(smashed) == 2 * 2 * B


# What is not finite does not leave


def ruin(parameter: Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_smashed_data_that_is_not_finite_stops_the_agent_before_it_leaves(releases: Releases, value: float) -> None:
    client = split_client(releases)
    *_, last = adapter_parameters(client.parts.bottom).values()  # of the feed-forward layer: attention may hide a NaN
    ruin(last, value)
    with pytest.raises((NonFiniteLoss, PrivacyError), match=r"it was not sent|smashed data .* cannot be sent"):
        client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.link.calls == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_agent_before_the_output_gradient_leaves(
    releases: Releases, value: float
) -> None:
    client = split_client(releases)
    ruin(client.parts.top.model.get_output_embeddings().weight, value)
    before = client.adapters()
    with pytest.raises(
        NonFiniteLoss, match=r"The loss of step 0 in round 1 is (nan|inf); nothing was sent back\. Lower"
    ):
        client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.link.calls == ["forward"]
    assert_same_bits(client.adapters(), before)


def test_a_gradient_that_is_not_finite_stops_the_agent_before_it_leaves_though_the_loss_is(releases: Releases) -> None:
    def loss(logits_BTV: Tensor, labels_BT: Tensor, divisor: float) -> Tensor:
        return (logits_BTV.sum() * 0).sqrt()  # zero, with an infinite slope

    client = split_client(releases, loss=loss)
    with pytest.raises((NonFiniteLoss, PrivacyError), match=r"it was not sent|output gradient .* cannot be sent"):
        client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.link.calls == ["forward"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_server_that_answers_nonsense_gets_nothing_back(releases: Releases, value: float) -> None:
    class Nonsense(RecordingLink):
        def forward(self, place: Place, smashed_BTD: Tensor, **beside: Any) -> Future[Tensor]:
            output = super().forward(place, smashed_BTD, **beside)
            ruin(output.result(), value)
            return output

    client = split_client(releases)
    client.link = Nonsense(client.link)
    with pytest.raises(NonFiniteLoss, match="nothing was sent back"):
        client.trainer.step(client.link, TEXTS, round=1, step=0)
    assert client.link.calls == ["forward"]


# A round that is lost


class Lossy(RecordingLink):
    """Loses the round at the second call of a kind, and answers nothing after it."""

    def __init__(self, inner: Link, lost_at: str) -> None:
        super().__init__(inner)
        self.lost_at = lost_at
        self.is_lost = False

    def forward(self, place: Place, smashed_BTD: Tensor, **beside: Any) -> Future[Tensor]:
        return self._lost("forward") or super().forward(place, smashed_BTD, **beside)

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        return self._lost("backward") or super().backward(place, output_gradient_BTD)

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        return self._lost("step") or super().step(step, squared_norm=squared_norm)

    def _lost(self, call: str) -> Future[Any] | None:
        self.is_lost = self.is_lost or (call == self.lost_at and call in self.calls)
        if not self.is_lost:
            return None
        lost: Future[Any] = Future()
        lost.set_exception(RoundLost("the server went away"))
        return lost


@pytest.mark.parametrize("lost_at", ["forward", "backward", "step"])
def test_a_round_that_was_lost_on_the_way_runs_again_to_the_same_bits(lost_at: str) -> None:
    training = TRAINING.model_copy(update={"micro_batch_size": 2})
    undisturbed = split_client(training=training, parts=tiny_parts(dropout=0.3))
    client = split_client(training=training, parts=tiny_parts(dropout=0.3))
    start, link = client.adapters(), client.link
    losses = run_steps(undisturbed)

    client.link = Lossy(link, lost_at)
    with pytest.raises(RoundLost, match="went away"):
        run_steps(client)
    for segment in (client.parts.bottom, client.parts.top):
        load_adapter_state(segment, start)
    client.trainer.optimiser.clear_gradients()
    client.trainer.optimiser.load({})
    client.trunk.open_round("a", 1, start, {})
    client.link = link
    assert run_steps(client) == losses
    assert_same_bits(client.adapters(), undisturbed.adapters())


# Clipping by a norm


class Norms(RecordingLink):
    """Keeps what a step says of the gradients on the device."""

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        self.said = squared_norm
        return super().step(step, squared_norm=squared_norm)


def test_one_norm_is_taken_over_all_segments_and_with_noise_on_each_has_its_own(ledger: Ledger) -> None:
    """AdamW's first moment after one step is a tenth of the gradient that it saw."""
    limit = 1e-4
    norms = {}
    for name, gate in (("off", OpenReleases()), ("on", noisy(ledger))):
        client = split_client(gate, training=TRAINING.model_copy(update={"max_grad_norm": limit}))
        link = Norms(client.link.inner)
        client.trainer.step(link, TEXTS, round=1, step=0)
        ends, trunk = client.trainer.optimiser.state(), client.trunk.result("a")[1]
        bottom = {
            key: m for key, m in ends.items() if key.rpartition("/")[0] in adapter_parameters(client.trainer.bottom)
        }
        top = {key: m for key, m in ends.items() if key not in bottom}
        moments = [
            torch.cat([m.flatten() for key, m in segment.items() if key.endswith("exp_avg")])
            for segment in (bottom, trunk, top)
        ]
        norms[name] = (link.said, *[10 * moment.norm().item() for moment in moments])
    said, *apart = norms["off"]
    assert said is not None
    assert said > limit**2
    assert math.hypot(*apart) == pytest.approx(limit, rel=0.02)
    assert norms["on"] == (None, *[pytest.approx(limit, rel=0.02)] * 3)


# Gradients that are merged at every step


def test_a_step_is_asked_for_once_the_mean_of_the_cohort_is_there() -> None:
    """One that waits for two things at once is out of step for others where a broken stream holds one of them back."""
    client, mean = split_client(), Future[dict[str, Tensor]]()
    trainer = ClientTrainer(
        client.parts.bottom,
        client.parts.top,
        TRAINING,
        OpenReleases(),
        client="a",
        seed=3,
        pad_token_id=0,
        exchanges=True,
    )

    class Exchanging(RecordingLink):
        def mean_gradient(self, *given: Any, **named: Any) -> Future[dict[str, Tensor]]:
            self.gradients = super().mean_gradient(*given, **named).result(0)
            return mean

    link = Exchanging(client.link.inner)
    work = trainer.step_work(link, TEXTS, round=1, step=0)
    while next(work) is not mean:
        pass
    assert link.calls == ["forward", "backward", "mean_gradient"]
    mean.set_result(link.gradients)
    assert next(work).done()
    assert link.calls[-1] == "step"
