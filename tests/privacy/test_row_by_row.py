import math

import pytest
import torch

from splitfed.errors import PrivacyError
from splitfed.privacy import GaussianSequenceMechanism, NoiseStream
from splitfed.privacy.row_by_row import RowByRowMechanism

C, Z, T, D = 3.0, 0.5, 16, 8


def mechanism(noise_multiplier: float = Z, tokens: int = T, key: int = 0) -> RowByRowMechanism:
    return RowByRowMechanism(C, noise_multiplier, tokens=tokens, stream=NoiseStream(bytes([key]) * 32))


def test_the_noise_is_that_of_a_whole_sequence_from_the_first_row_on() -> None:
    whole = GaussianSequenceMechanism(C, Z, "token")
    assert mechanism().sensitivity == whole.sensitivity(T) == 2 * C * math.sqrt(T)
    assert mechanism().noise_std == whole.noise_std(T)
    many = RowByRowMechanism(C, Z, tokens=4000, stream=NoiseStream(b"k" * 32))
    rows = [many.release(torch.zeros(1, rows, D)) for rows in (1, 1, 500, 1, 1000)]
    noise = torch.cat(rows, dim=1)
    assert noise.std().item() == pytest.approx(Z * 2 * C * math.sqrt(4000), rel=0.02)
    assert noise[0, :2].std().item() > many.noise_std / 3


def test_each_row_is_clipped_by_itself() -> None:
    rows_1TD = torch.randn(1, T, D, generator=torch.Generator().manual_seed(0)) * 5
    rows_1TD[0, 0] *= 1e-3
    noise_1TD = mechanism().release(torch.zeros(1, T, D))
    clipped_1TD = mechanism().release(rows_1TD) - noise_1TD
    norms = clipped_1TD.norm(dim=-1)
    assert norms.max() <= C * (1 + 1e-4)
    assert torch.allclose(clipped_1TD[0, 0], rows_1TD[0, 0], atol=1e-4)
    directions = torch.cosine_similarity(clipped_1TD[0, 1:], rows_1TD[0, 1:], dim=-1)
    assert directions.min() > 0.999


def test_no_more_rows_leave_than_were_declared() -> None:
    released = mechanism(tokens=3)
    released.release(torch.zeros(1, 2, D))
    with pytest.raises(PrivacyError, match="a sequence of 3 rows, and one more would leave; declare more"):
        released.release(torch.zeros(1, 2, D))
    released.release(torch.zeros(1, 1, D))
    with pytest.raises(PrivacyError, match="declare more"):
        released.release(torch.zeros(1, 1, D))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_leaves_as_noise_alone(value: float) -> None:
    rows_1TD = torch.ones(1, 3, D)
    rows_1TD[0, 1, 2] = value
    released = mechanism()
    assert released.was_finite
    noise_1TD = mechanism().release(torch.zeros(1, 3, D))
    sent_1TD = released.release(rows_1TD)
    assert not released.was_finite
    assert torch.equal(sent_1TD[0, 1], noise_1TD[0, 1])
    assert torch.allclose(sent_1TD[0, 0] - noise_1TD[0, 0], torch.ones(D), atol=1e-4)
    released.release(torch.ones(1, 1, D))
    assert not released.was_finite


def test_rows_that_are_as_far_apart_as_can_be_add_up_to_the_signal_of_one_release() -> None:
    """However later rows are chosen, each pair is two clipped vectors: at most opposite ones, whatever was answered."""
    one_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)) * 100
    signal = 0.0
    ones, others = mechanism(), mechanism()
    for row_D in one_TD:
        apart_D = ones.release(row_D.view(1, 1, D)) - others.release(-row_D.view(1, 1, D))
        signal += (apart_D.norm().item() / ones.noise_std) ** 2
    assert signal == pytest.approx(1 / Z**2, rel=1e-3)
    assert signal <= 1 / Z**2 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.zeros(2, 1, D), "not torch.float32"),
        (torch.zeros(1, D), "hidden vectors"),
        (torch.zeros(1, 1, D, dtype=torch.int64), "not torch.int64"),
        (torch.zeros(1, 0, D), "hidden vectors"),
    ],
)
def test_what_is_not_one_sequence_of_vectors_is_refused(rows: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mechanism().release(rows)


@pytest.mark.parametrize(
    ("norm", "noise_multiplier", "tokens"), [(0.0, Z, T), (C, 0.0, T), (C, math.inf, T), (C, Z, 0)]
)
def test_figures_outside_their_range_are_refused(norm: float, noise_multiplier: float, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"clipping norm|noise multiplier|at least one row"):
        RowByRowMechanism(norm, noise_multiplier, tokens=tokens)
