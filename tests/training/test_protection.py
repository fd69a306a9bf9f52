"""What owner and run say decides what is clipped and noised, how much, and for whom."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.config import PrivacySection, TrainingSection
from splitfed.errors import ConfigError, WeightsError
from splitfed.models import Bottom, Partition, partition
from splitfed.privacy import (
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Ledger,
    MetricMechanism,
    NoMechanism,
    epsilon,
    read_ledger,
)
from splitfed.training.link import Kind, Place
from splitfed.training.order import step_examples
from splitfed.training.protection import (
    Workload,
    open_gate,
    output_gradient_mechanism,
    run_epsilon,
    settle_clip,
    settle_noise,
    smashed_mechanism,
)
from splitfed.training.releases import LedgeredReleases
from tests.equivalence.tiny_models import VOCABULARY, tiny_model
from tests.training.split_client import tiny_parts

B, T, D = 3, 10, 64
TRAINING = TrainingSection(rounds=3, local_steps=4, batch_size=5, max_tokens=16)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


@pytest.fixture
def bottom() -> Bottom:
    return partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1).bottom


def gate_of(privacy: PrivacySection, ledger: Ledger, parts: Partition | None = None) -> LedgeredReleases:
    parts = parts or tiny_parts()
    workload = Workload(TRAINING, train=[f"r{number}" for number in range(20)])
    return open_gate(
        settle_noise(privacy, workload), ledger, "r", bottom=parts.bottom, top=parts.top, workload=workload
    )


def test_noise_is_on_everywhere_unless_it_is_turned_off(ledger: Ledger) -> None:
    gate = gate_of(PrivacySection(clipping_norm_smashed=4.0), ledger)
    assert gate.is_noisy is True
    assert gate.per_example is not None
    gate = gate_of(PrivacySection(noise_multiplier=0, clipping_norm_smashed=4.0), ledger)
    assert (gate.is_noisy, gate.per_example, gate.update) == (False, None, None)


def test_each_channel_has_its_own_clip_and_noise_to_match(ledger: Ledger) -> None:
    """Zeros come out as noise of standard deviation z·2·C·√T, with another C and other noise for each channel."""
    z, norms = 0.5, {"smashed": 4.0, "output_gradient": 0.01}
    policy = PrivacySection(
        noise_multiplier=z,
        clipping_norm_smashed=norms["smashed"],
        clipping_norm_output_gradient=norms["output_gradient"],
    )
    gate = gate_of(policy, ledger)
    zeros_BTD = torch.zeros(B, T, D)
    released = {
        "smashed": gate.smashed(zeros_BTD, records=["x"] * B, round=1, place=Place(0, 0)),
        "output_gradient": gate.output_gradient(zeros_BTD, records=["x"] * B, round=1, place=Place(0, 0)),
    }
    for channel, noise_BTD in released.items():
        expected = z * 2 * norms[channel] * math.sqrt(T)
        assert noise_BTD.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * B * T * D))
    first, second = (noise_BTD.flatten() for noise_BTD in released.values())
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / math.sqrt(B * T * D)
    assert [(row.channel, row.noise_multiplier, row.run) for row in read_ledger(ledger.path).rows] == [
        ("smashed", z, "r"),
        ("output_gradient", z, "r"),
    ]


def test_without_noise_everything_passes_as_it_is_and_nothing_is_guaranteed(ledger: Ledger) -> None:
    gate = gate_of(PrivacySection(noise_multiplier=0, clipping_norm_smashed=4.0), ledger)
    x_BTD = 100 * torch.randn(B, T, D)
    assert torch.equal(gate.smashed(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert torch.equal(gate.output_gradient(x_BTD, records=["x"] * B, round=1, place=Place(0, 0)), x_BTD)
    assert ledger.spent("smashed") is None
    assert ledger.spent("output_gradient") is None


def test_the_owner_s_clip_is_kept(bottom: Bottom) -> None:
    policy = PrivacySection(clipping_norm_smashed=3.0)
    assert settle_clip(policy, bottom) == policy


def test_a_clip_that_is_left_out_is_usual_in_the_model_and_always_the_same(bottom: Bottom) -> None:
    settled = settle_clip(PrivacySection(), bottom)
    torch.manual_seed(1)
    assert settle_clip(PrivacySection(), bottom) == settled
    norm = settled.clipping_norm_smashed
    assert norm is not None
    norms_BT = bottom(torch.randint(VOCABULARY, (64, 16))).norm(dim=-1)
    assert 0.3 < (norms_BT < norm).float().mean().item() < 0.7


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, math.nan, math.inf])
def test_a_bottom_whose_output_has_no_norm_is_refused(bottom: Bottom, value: float) -> None:
    with torch.no_grad():
        bottom.model.get_input_embeddings().weight.fill_(value)
        for parameter in bottom.model.base_model.layers.parameters():
            parameter.zero_()
    with pytest.raises(WeightsError, match="norm"):
        settle_clip(PrivacySection(), bottom)


def test_a_clip_of_the_whole_sequence_is_as_much_longer_as_it_has_rows(bottom: Bottom) -> None:
    token, sequence = (
        settle_clip(PrivacySection(clip=clip), bottom).clipping_norm_smashed for clip in ("token", "sequence")
    )
    assert token is not None
    assert sequence == pytest.approx(token * math.sqrt(32), rel=0.01)


# Mechanisms


def test_each_unit_has_its_mechanism() -> None:
    section = PrivacySection(noise_multiplier=0.5, clipping_norm_smashed=2.0, clipping_norm_output_gradient=0.1)
    assert isinstance(smashed_mechanism(section), GaussianSequenceMechanism)
    per_token = section.model_copy(update={"smashed": "token", "output_gradient": "token"})
    smashed, gradient = smashed_mechanism(per_token), output_gradient_mechanism(per_token)
    assert isinstance(smashed, GaussianTokenMechanism)
    assert isinstance(gradient, GaussianTokenMechanism)
    assert smashed.noise_std(T) == pytest.approx(0.5 * 2 * 2.0)
    assert gradient.noise_std(T) == pytest.approx(0.5 * 2 * 0.1 * math.sqrt(2))
    whole = smashed_mechanism(section.model_copy(update={"clip": "sequence"}))
    assert isinstance(whole, GaussianSequenceMechanism)
    assert whole.noise_std(T) == pytest.approx(0.5 * 2 * 2.0)
    metric = smashed_mechanism(section.model_copy(update={"smashed": "metric", "eta": 3.0}))
    assert isinstance(metric, MetricMechanism)
    silent = section.model_copy(update={"noise_multiplier": 0.0})
    assert isinstance(smashed_mechanism(silent), NoMechanism)
    assert isinstance(output_gradient_mechanism(silent), NoMechanism)


@pytest.mark.parametrize(("adapter", "noise"), [("dp-sgd", None), ("update", None), ("dp-sgd", 3.0)])
def test_the_adapter_has_noise_of_its_own_where_it_is_said(ledger: Ledger, adapter: str, noise: float | None) -> None:
    section = PrivacySection(
        noise_multiplier=0.5,
        clipping_norm_smashed=2.0,
        adapter=adapter,
        noise_multiplier_adapter=noise,  # type: ignore[arg-type]
    )
    gate = gate_of(section, ledger)
    mechanism = gate.per_example if adapter == "dp-sgd" else gate.update
    assert mechanism is not None
    assert mechanism.noise_multiplier == (noise or 0.5)
    assert (gate.per_example is None) == (adapter == "update")


@pytest.mark.parametrize(
    ("bottom_blocks", "top_blocks", "adapter", "coupled"),
    [
        (1, 1, "none", (True, True)),
        (1, 1, "update", (True, True)),
        (0, 1, "none", (False, True)),
        (1, 0, "none", (True, False)),
        (0, 0, "none", (False, False)),
        (1, 1, "dp-sgd", (False, False)),
    ],
)
def test_a_release_is_coupled_where_its_segment_was_trained_on_raw_records(
    ledger: Ledger, bottom_blocks: int, top_blocks: int, adapter: str, coupled: tuple[bool, bool]
) -> None:
    parts = tiny_parts(bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    gate = gate_of(PrivacySection(clipping_norm_smashed=4.0, adapter=adapter), ledger, parts)  # type: ignore[arg-type]
    x_BTD = torch.zeros(B, T, D)
    gate.smashed(x_BTD, records=["x"] * B, round=1, place=Place(0, 0))
    gate.output_gradient(x_BTD, records=["x"] * B, round=1, place=Place(0, 0))
    assert tuple(row.coupled for row in read_ledger(ledger.path).rows) == coupled


# Calibration: the epsilon that was asked for is what the ledger says at the run's end


def spend(gate: LedgeredReleases, workload: Workload, *, evaluates: bool) -> None:
    """Make every charge of a run, without its arithmetic."""
    x_BTD, factor = torch.zeros(5, 16, 8), {"w": torch.zeros(3)}
    for round in range(1, workload.training.rounds + 1):
        for step in range(workload.training.local_steps):
            chosen = step_examples(
                len(workload.train), seed=0, client="a", round=round, step=step, batch_size=5, local_steps=4
            )
            records = [workload.train[index] for index in chosen]
            gate.smashed(x_BTD, records=records, round=round, place=Place(step, 0))
            gate.output_gradient(x_BTD, records=records, round=round, place=Place(step, 0))
            if gate.per_example is not None:
                gate.adapter_gradient(factor, records=records, round=round, step=step)
        if evaluates:
            held_out_BTD = torch.zeros(len(workload.held_out), 16, 8)
            place = Place(0, 0, Kind.EVALUATE)
            gate.smashed(held_out_BTD, records=workload.held_out, round=round, place=place)
        gate.adapter_update(factor, factor, round=round)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": "update"},
        {"noise_multiplier_adapter": 50.0},
        {"relation": "zero-out"},
        {"clip": "sequence"},
        {"adapter": "update", "noise_multiplier_adapter": 20.0, "relation": "zero-out"},
        {"smashed": "token", "output_gradient": "token"},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_examples", [7, 60, 200])
def test_a_calibrated_run_costs_what_was_asked_for_and_hardly_less(
    ledger: Ledger, changes: dict[str, object], n_examples: int
) -> None:
    blocks = 0 if "smashed" in changes else 1
    parts = tiny_parts(bottom_blocks=blocks, top_blocks=blocks)
    workload = Workload(
        TRAINING,
        [f"r{n}" for n in range(n_examples)],
        ["h0", "h1"],
        bottom_trains=bool(blocks),
        top_trains=bool(blocks),
        client="a",
    )
    asked = PrivacySection(epsilon=8.0, clipping_norm_smashed=4.0, **changes)  # type: ignore[arg-type]
    settled = settle_noise(asked, workload)
    assert settled.epsilon is None
    gate = open_gate(settled, ledger, "r", bottom=parts.bottom, top=parts.top, workload=workload)
    ledger.set_policy(relation=settled.relation)
    spend(gate, workload, evaluates=True)
    spent = ledger.spent(None)
    assert spent is not None
    assert 7.9 < spent <= run_epsilon(settled, workload) <= 8.0


@pytest.mark.parametrize(
    "changes", [{"noise_multiplier": 0.0}, {"adapter": "none"}, {"smashed": "metric", "eta": 1.0}], ids=str
)
def test_a_run_with_a_channel_that_guarantees_nothing_has_an_infinite_epsilon(changes: dict[str, object]) -> None:
    section = PrivacySection.model_validate({"noise_multiplier": 1.0, **changes})
    assert run_epsilon(section, Workload(TRAINING, ["a"])) == math.inf


def test_nothing_is_spent_on_an_adapter_that_is_not_there() -> None:
    section = PrivacySection(noise_multiplier=0.5, adapter="none")
    workload = Workload(TRAINING, [f"r{n}" for n in range(200)], bottom_trains=False, top_trains=False)
    assert run_epsilon(section, workload) == epsilon([(0.5, 2)], section.delta)


@pytest.mark.parametrize("changes", [{"smashed": "metric", "eta": 1.0}, {"adapter": "none"}])
def test_an_epsilon_that_a_channel_cannot_keep_is_refused(changes: dict[str, object]) -> None:
    section = PrivacySection(epsilon=8.0, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epsilon = 8 cannot be kept with"):
        settle_noise(section, Workload(TRAINING, ["a"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": 1e300}, r"epsilon = 1e\+300 takes a noise multiplier of .*, outside 1e-06 to 1e\+06; lower"),
        ({"epsilon": 1e-9, "delta": 1e-9}, r"epsilon = 1e-09 takes a noise multiplier of .*; raise epsilon"),
        ({"epsilon": 1e-300, "delta": 1e-300}, "no noise is enough for epsilon = 1e-300; raise epsilon, or delta"),
        (
            {"epsilon": 1e-300, "delta": 1e-300, "relation": "zero-out", "sample_rate": 1e-90},
            "No noise is enough for epsilon 1e-300; choose",
        ),
    ],
    ids=str,
)
def test_an_epsilon_that_takes_no_noise_or_too_much_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settle_noise(PrivacySection(**changes), Workload(TRAINING, train=["a", "b", "c"]))


def test_an_epsilon_that_the_adapter_alone_spends_is_refused() -> None:
    section = PrivacySection(epsilon=1.0, noise_multiplier_adapter=0.01)
    with pytest.raises(ConfigError, match=r"spent by the adapter update alone at noise_multiplier_adapter = 0\.01"):
        settle_noise(section, Workload(TRAINING, ["a"]))


def test_a_secret_sample_is_calibrated_and_charged_as_one_release_a_step(ledger: Ledger) -> None:
    parts = tiny_parts()
    workload = Workload(TRAINING, [f"r{n}" for n in range(200)])
    asked = PrivacySection(epsilon=4.0, clipping_norm_smashed=4.0, relation="zero-out", sample_rate=0.0005)
    gate = open_gate(settle_noise(asked, workload), ledger, "r", bottom=parts.bottom, top=parts.top, workload=workload)
    assert gate.sampling is not None
    assert 0 < gate.sampling.overflow < 1e-6  # more than 5 of 200 at rate 0.0005
    ledger.set_policy(relation="zero-out", delta=1e-5)
    spend(gate, workload, evaluates=False)
    spent = ledger.spent(None)
    assert spent is not None
    assert 3.8 < spent <= 4.0
    assert run_epsilon(settle_noise(asked, workload), workload) == pytest.approx(spent, rel=1e-9)
    rows = read_ledger(ledger.path).rows
    assert [row.channel for row in rows] == ["step"] * 12
    assert set(rows[0].channels or ()) == {"smashed", "output_gradient", "adapter"}


def test_a_batch_that_a_secret_sample_outgrows_too_often_is_refused(ledger: Ledger) -> None:
    section = PrivacySection(relation="zero-out", sample_rate=0.02)
    workload = Workload(TRAINING, [f"r{n}" for n in range(200)])
    parts, settled = tiny_parts(), section.model_copy(update={"clipping_norm_smashed": 4.0, "noise_multiplier": 1.0})
    with pytest.raises(ConfigError, match=r"sample_rate = 0.02 draws more than batch_size = 5 of 200 examples"):
        open_gate(settled, ledger, "r", bottom=parts.bottom, top=parts.top, workload=workload)
    with pytest.raises(ConfigError, match="raise batch_size"):
        settle_noise(section.model_copy(update={"epsilon": 3.0}), workload)


@pytest.mark.parametrize(
    ("most_of_a_row", "said"),
    [
        (2, r"needs records of one sequence each, but one is cut into 2; raise training\.max_tokens"),
        (1, "needs each record once, but one stands in 2 rows of the data; remove duplicate rows"),
    ],
)
def test_a_record_of_several_sequences_is_not_sampled_in_secret(most_of_a_row: int, said: str) -> None:
    """Drawn one by one they would take several places, and the argument is for one."""
    workload = Workload(TRAINING, train=["a", "a", "b"], most_of_a_row=most_of_a_row)
    policy = PrivacySection(epsilon=8.0, relation="zero-out", sample_rate=0.1)
    with pytest.raises(ConfigError, match=said):
        settle_noise(policy, workload)


def test_sequences_of_one_record_in_one_step_cost_the_square_of_their_number(ledger: Ledger) -> None:
    """Their clipped gradients add up: three of them move the sum three times as far."""
    gate = gate_of(PrivacySection(noise_multiplier=0.5, clipping_norm_smashed=4.0), ledger)
    gate.adapter_gradient({"w": torch.zeros(3)}, records=["a", "b", "b", "b"], round=1, step=0)
    assert ledger.spent("adapter", 1e-5) == epsilon([(0.5, 9)], 1e-5)


def test_calibration_allows_for_sequences_of_one_record_in_one_step(ledger: Ledger) -> None:
    parts, workload = tiny_parts(), Workload(TRAINING, [f"r{n // 3}" for n in range(30)], client="a")
    settled = settle_noise(PrivacySection(epsilon=8.0, clipping_norm_smashed=4.0), workload)
    spend(open_gate(settled, ledger, "r", bottom=parts.bottom, top=parts.top), workload, evaluates=False)
    spent = ledger.spent(None)
    assert spent is not None
    assert 7.9 < spent <= 8.0
