"""A gate whose noise can be drawn again: the same clip, noise and ledger as the real one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitfed.privacy import (
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Ledger,
    Mechanism,
    MetricMechanism,
    NoMechanism,
    PerExampleMechanism,
    UpdateMechanism,
)
from splitfed.study.sweep.noise import with_repeatable_noise
from splitfed.training.link import Place
from splitfed.training.releases import LedgeredReleases

ZEROS_BTD = torch.zeros(4, 16, 64)
MECHANISMS: list[Mechanism] = [
    GaussianSequenceMechanism(2.0, 0.5),
    GaussianSequenceMechanism(2.0, 0.5, "sequence"),
    GaussianTokenMechanism(2.0, 0.5, rows=2),
    MetricMechanism(3.0),
    NoMechanism(),
]


def released(gate: LedgeredReleases) -> Tensor:
    return gate.smashed(ZEROS_BTD, records=["a"] * 4, round=1, place=Place(0, 0))


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: type(mechanism).__name__)
def test_noise_is_that_of_the_mechanism_and_the_same_for_the_same_names(tmp_path: Path, mechanism: Mechanism) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        gate = LedgeredReleases(mechanism, mechanism, ledger, "run")
        one, again, other = (released(with_repeatable_noise(gate, "cell", name)) for name in ("a", "a", "b"))
        assert torch.equal(one, again)
        real = released(gate)
        assert one.std().item() == pytest.approx(real.std().item(), rel=0.1)
        if not isinstance(mechanism, NoMechanism):
            assert not torch.equal(one, other)
            assert not torch.equal(one, real)
            twin = with_repeatable_noise(gate, "cell", "a")
            gradient_BTD = twin.output_gradient(ZEROS_BTD, records=["a"] * 4, round=1, place=Place(0, 0))
            assert not torch.equal(one, gradient_BTD)


def test_every_release_is_charged_as_by_the_real_gate(tmp_path: Path) -> None:
    spent = []
    for name in ("real", "repeatable"):
        with Ledger(tmp_path / name / "ledger.jsonl") as ledger:
            gate = LedgeredReleases(MECHANISMS[2], MECHANISMS[0], ledger, "run", PerExampleMechanism(0.1, 0.5))
            gate = gate if name == "real" else with_repeatable_noise(gate, "a")
            assert gate.per_example is not None
            assert (gate.per_example.clipping_norm, gate.per_example.noise_multiplier) == (0.1, 0.5)
            released(gate)
            gate.adapter_gradient({"x": torch.zeros(3)}, records=["a"], round=1, step=0)
            spent.append((ledger.spent("smashed"), ledger.spent("adapter"), ledger.spent(None)))
    assert spent[0] == spent[1]
    assert spent[0][2] is not None
    assert spent[0][2] > 0


def test_an_update_gets_the_same_noise_again(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        gate = LedgeredReleases(NoMechanism(), NoMechanism(), ledger, "run", update=UpdateMechanism(0.1, 0.5))
        before = {"x": torch.zeros(1000)}
        one, again = (with_repeatable_noise(gate, "a").adapter_update(before, before, round=1)["x"] for _ in range(2))
    assert torch.equal(one, again)
    assert one.std().item() == pytest.approx(0.5 * 0.2, rel=0.1)
