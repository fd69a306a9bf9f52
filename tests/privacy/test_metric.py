"""Metric privacy: the noise fits eta, the loss fits the distance, and nothing is called an epsilon."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from splitfed.errors import PrivacyError
from splitfed.privacy.metric import MetricMechanism
from splitfed.privacy.noise import NoiseStream

KEY = bytes(range(32))
N = 100_000
SIGMAS = 5.0
ALPHA = 1e-6


def mechanism(eta=1.0):
    return MetricMechanism(eta, NoiseStream(KEY))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_release_is_the_input_plus_radial_noise_of_the_stream():
    x = 5 * normal(3, 4, 8)
    assert torch.equal(mechanism(2.5).release(x), x + NoiseStream(KEY).radial((3, 4, 8), 2.5))


@pytest.mark.parametrize("eta", [0.1, 1.0, 40.0])
def test_the_noise_of_a_release_has_the_radius_that_eta_says(eta):
    tokens, hidden = 20_000, 12
    x = normal(1, tokens, hidden)
    radius = (mechanism(eta).release(x.double()) - x.double()).norm(dim=-1)[0].numpy()
    assert abs(radius.mean() - hidden / eta) < SIGMAS * math.sqrt(hidden) / eta / math.sqrt(tokens)
    assert stats.kstest(radius, stats.gamma(hidden, scale=1 / eta).cdf).pvalue > ALPHA


@pytest.mark.parametrize(("eta", "distance"), [(1.0, 0.5), (0.2, 10.0), (5.0, 0.3)])
def test_no_half_line_is_likelier_by_more_than_the_stated_factor_and_one_reaches_it(eta, distance):
    """In one dimension the noise is Laplace's: P(y > x) = 1/2 from x, and exp(-eta d) / 2 from a distance d below."""
    tested = mechanism(eta)
    here = tested.release(torch.full((N, 1, 1), distance)).flatten().numpy()
    there = tested.release(torch.zeros(N, 1, 1)).flatten().numpy()
    bound = math.exp(tested.loss(distance))
    for edge in np.linspace(-2 * distance, 3 * distance, 26):
        near, far = (here > edge).mean(), (there > edge).mean()
        slack = SIGMAS * (math.sqrt(near / N) + bound * math.sqrt(far / N))
        assert near <= bound * far + slack
        assert far <= bound * near + SIGMAS * (math.sqrt(far / N) + bound * math.sqrt(near / N))
    near, far = (here > distance).mean(), (there > distance).mean()
    assert near / far == pytest.approx(bound, rel=SIGMAS * math.sqrt(2 * bound / N + 2 / N))


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_loss_of_an_output_is_at_most_eta_times_the_distances_of_its_rows(tokens):
    """ln p(y|x) - ln p(y|x') = eta Σ (‖y_t - x'_t‖ - ‖y_t - x_t‖), and the rows' noises are independent."""
    eta, x, other = 3.0, normal(1, tokens, 3).double(), normal(1, tokens, 3, seed=1).double()
    y = mechanism(eta).release(x.expand(100_000, tokens, 3))
    loss = eta * ((y - other).norm(dim=-1) - (y - x).norm(dim=-1)).sum(dim=-1)
    bound = mechanism(eta).loss((x - other).norm(dim=-1).sum().item())
    assert loss.max().item() <= bound * (1 + 1e-6)
    assert loss.max().item() > 0.9 * bound
    assert loss.mean().item() < 0.9 * bound


def test_the_guarantee_is_stated_as_eta_times_distance_and_never_as_an_epsilon():
    tested = mechanism(17.5)
    assert tested.eta == 17.5
    assert tested.loss(2.0) == 35.0
    assert tested.loss(0.0) == 0.0
    assert "17.5 · distance for each token" in tested.statement
    assert "no epsilon" in tested.statement
    assert (tested.unit, tested.relation, tested.noise_multiplier) == ("token", "metric", 0)
    assert tested.rdp(2.0) == math.inf
    assert tested.units(7) == 7.0


@pytest.mark.parametrize("distance", [-1.0, math.nan])
def test_a_distance_that_is_none_is_refused(distance):
    with pytest.raises(ValueError, match="A distance is 0 or more"):
        mechanism().loss(distance)


def test_every_row_gets_noise_of_its_own_padding_and_zeros_included():
    x = normal(4, 10, 16)
    x[:, 6:] = 0
    released = mechanism().release(x)
    assert len({tuple(row) for row in (released - x).view(-1, 16).tolist()}) == 40
    assert released.count_nonzero() == released.numel()


def test_two_mechanisms_without_a_stream_of_the_caller_draw_different_noise():
    first, second = (MetricMechanism(1.0).release(torch.zeros(1, 2, 3)) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_noise_is_added_in_float32_or_wider(dtype):
    released = mechanism().release(torch.zeros(1, 8, 64, dtype=dtype))
    assert released.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not torch.equal(released, released.to(torch.bfloat16).to(released.dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_refused_and_draws_no_noise(value):
    tested, x = mechanism(), torch.ones(1, 2, 3)
    x[0, 1, 2] = value
    with pytest.raises(PrivacyError, match="it was not sent"):
        tested.release(x)
    assert torch.equal(tested.release(torch.zeros(1, 2, 3)), mechanism().release(torch.zeros(1, 2, 3)))


def test_gradients_pass_through_and_the_input_is_not_written_to():
    x = normal(2, 3, 4).requires_grad_()
    before, weights = x.detach().clone(), normal(2, 3, 4, seed=1)
    (gradient,) = torch.autograd.grad((mechanism().release(x) * weights).sum(), x)
    assert torch.equal(gradient, weights)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 3), torch.ones(1, 2, 3, 4), torch.ones(1, 0, 4), torch.ones(1, 1, 1).long()]
)
def test_what_is_not_a_batch_of_hidden_vectors_is_refused(x):
    with pytest.raises(ValueError, match=r"A release takes hidden vectors \[B, T, D\], not torch"):
        mechanism().release(x)


@pytest.mark.parametrize("eta", [0.0, -1.0, math.nan, math.inf, 1e-26, 1e26])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta of metric privacy must be from"):
        mechanism(eta)
