"""A denoiser gives the posterior mean: compared with brute force, and with what it must do at either end."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

from splitfed.privacy import denoise
from splitfed.privacy.clip import clip
from splitfed.privacy.denoise import Table
from splitfed.privacy.mixture import Mixture, fit_mixture
from splitfed.privacy.noise import NoiseStream
from splitfed.privacy.output_denoise import OutputDenoiser, fit_output_denoiser

B, T, D, V = 3, 5, 4, 11


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(*, positions=False, clipping_norm=None):
    return Table(normal(V, D), normal(V, seed=1), normal(T, D, seed=2) if positions else None, clipping_norm)


def mixture(*, offsets=False):
    root = normal(D, D, seed=3) / 3
    return Mixture(normal(V, D), normal(V, seed=1), root @ root.T, normal(T, D, seed=2) if offsets else None)


def expected_of_table(known, y, log_likelihood):
    """E[x | y] row by row in float64, from its definition; `log_likelihood` of a difference."""
    result = torch.empty_like(y, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            rows = known.rows_VD + (known.positions_TD[t] if known.positions_TD is not None else 0)
            if known.clipping_norm is not None:
                rows = clip(rows[None], known.clipping_norm, per="token")[0]
            rows = rows.double()
            log_posterior = known.log_prior_V.double() + log_likelihood(y[b, t].double() - rows)
            result[b, t] = log_posterior.softmax(0) @ rows
    return result


DENOISERS = [
    pytest.param(lambda: table().denoiser(std=0.7), id="table"),
    pytest.param(lambda: table().denoiser(eta=2.0), id="table, radial"),
    pytest.param(lambda: table(positions=True, clipping_norm=1.5).denoiser(std=0.7), id="table with positions"),
    pytest.param(lambda: mixture().denoiser(std=0.7), id="mixture"),
    pytest.param(lambda: mixture(offsets=True).denoiser(std=0.7), id="mixture with offsets"),
]


# Every denoiser


@pytest.mark.parametrize("make", DENOISERS)
def test_a_row_depends_on_itself_alone(make):
    denoiser, y = make(), normal(B, T, D, seed=5)
    together = denoiser(y)
    other = normal(B, T, D, seed=6)
    other[1, 2] = y[1, 2]
    torch.testing.assert_close(denoiser(other)[1, 2], together[1, 2])
    assert (denoiser(other) - together).abs().sum() > 1
    torch.testing.assert_close(denoiser(y[:, :3]), together[:, :3])


@pytest.mark.parametrize("make", DENOISERS)
def test_rows_are_worked_on_in_pieces_and_the_result_is_the_same(make, monkeypatch):
    denoiser, y = make(), normal(B, T, D, seed=5).requires_grad_()
    whole = denoiser(y)
    (gradient,) = torch.autograd.grad(whole.sin().sum(), y)
    monkeypatch.setattr(denoise, "_WEIGHTS_AT_ONCE", 2 * V)
    pieces = denoiser(y)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces.sin().sum(), y)[0], gradient)


@pytest.mark.parametrize("make", DENOISERS)
def test_gradients_are_those_of_the_function(make):
    denoiser, y = make(), normal(B, T, D, seed=5).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser(y).sin().sum(), y)
    step = 1e-2 * normal(B, T, D, seed=7)
    with torch.no_grad():
        slope = (denoiser(y + step).double().sin().sum() - denoiser(y - step).double().sin().sum()) / 2
    assert (gradient * step).sum().item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("make", DENOISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_dtype_are_kept_and_the_input_is_not_written_to(make, dtype):
    y = normal(B, T, D, seed=5).to(dtype)
    before = y.clone()
    estimate = make()(y)
    assert (estimate.shape, estimate.dtype) == (y.shape, dtype)
    assert torch.equal(y, before)
    torch.testing.assert_close(estimate.float(), make()(y.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("make", DENOISERS)
def test_memory_is_bounded_in_the_backward_too(make, monkeypatch):
    """What autograd keeps for a long batch is its rows, not a weight for each row and token."""
    monkeypatch.setattr(denoise, "_WEIGHTS_AT_ONCE", 64 * V)
    kept = []
    y = normal(400, T, D, seed=5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        result = make()(y).sum()
    assert sum(kept) < 2 * y.numel()
    result.backward()


@pytest.mark.parametrize("make", DENOISERS)
@pytest.mark.parametrize("y", [torch.zeros(T, D), torch.zeros(B, T, D + 1), torch.zeros(B, T, D, dtype=torch.int64)])
def test_what_is_not_a_batch_of_hidden_vectors_of_the_size_is_refused(make, y):
    with pytest.raises(ValueError, match=r"takes hidden vectors \[B, T, 4\], not torch"):
        make()(y)


@pytest.mark.parametrize("make", [DENOISERS[2], DENOISERS[4]])
def test_more_rows_than_positions_are_refused(make):
    with pytest.raises(ValueError, match="made for 5 rows a sequence, not 6"):
        make()(torch.zeros(B, T + 1, D))


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_no_noise_is_refused(noise):
    for make in (lambda: table().denoiser(std=noise), lambda: table().denoiser(eta=noise)):
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            make()
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        mixture().denoiser(std=noise)


# A table


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("clipping_norm", [None, 1.2])
@pytest.mark.parametrize("std", [0.05, 0.7, 5.0])
def test_a_table_gives_the_posterior_mean_under_gaussian_noise(positions, clipping_norm, std):
    known = table(positions=positions, clipping_norm=clipping_norm)
    y = normal(B, T, D, seed=5)
    expected = expected_of_table(known, y, lambda rest: -rest.pow(2).sum(1) / (2 * std**2))
    torch.testing.assert_close(known.denoiser(std=std)(y).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.2, 2.0, 30.0])
def test_a_table_gives_the_posterior_mean_under_radial_noise(eta):
    known, y = table(), normal(B, T, D, seed=5)
    expected = expected_of_table(known, y, lambda rest: -eta * rest.norm(dim=1))
    torch.testing.assert_close(known.denoiser(eta=eta)(y).double(), expected, rtol=1e-3, atol=1e-4)


def test_little_noise_gives_the_nearest_row_and_much_the_priors_mean():
    known = table()
    y = known.rows_VD[:9].view(3, 3, D) + 0.01 * normal(3, 3, D, seed=5)
    torch.testing.assert_close(known.denoiser(std=0.01)(y), known.rows_VD[:9].view(3, 3, D))
    mean = known.log_prior_V.softmax(0) @ known.rows_VD
    torch.testing.assert_close(known.denoiser(std=1e4)(y), mean.expand(3, 3, D), rtol=1e-3, atol=1e-4)


def test_no_other_estimate_has_a_smaller_error():
    known, std = table(), 0.7
    x = known.rows_VD[torch.multinomial(known.log_prior_V.softmax(0), 20_000, replacement=True)][None]
    y = x + std * normal(*x.shape, seed=8)
    estimate = known.denoiser(std=std)(y)
    nearest = known.rows_VD[torch.cdist(y[0], known.rows_VD).argmin(dim=1)]
    wiener = Mixture(x[0].mean(0)[None], torch.zeros(1), x[0].T.cov()).denoiser(std=std)(y)
    mismatched = [known.denoiser(std=factor * std)(y) for factor in (0.5, 2.0)]
    errors = [(other - x).pow(2).mean() for other in (y, nearest, wiener, *mismatched)]
    assert (estimate - x).pow(2).mean() < 0.95 * min(errors)


def test_the_slope_is_the_posteriors_covariance_over_the_noises_variance():
    """Tweedie's formula once more differentiated: ∂E[x|y]/∂y = Cov[x|y] / std²."""
    known, std, y = table(), 0.7, normal(1, 1, D, seed=5)
    slope = torch.autograd.functional.jacobian(known.denoiser(std=std), y).view(D, D)
    weights = (known.log_prior_V - (y[0] - known.rows_VD).pow(2).sum(1) / (2 * std**2)).softmax(0)
    centred = known.rows_VD - weights @ known.rows_VD
    torch.testing.assert_close(slope, (centred.T * weights) @ centred / std**2, rtol=1e-3, atol=1e-4)


def test_rows_that_metric_privacy_has_noised_are_found_again():
    known = table()
    tokens = torch.arange(V).repeat(20)[None]
    y = known.rows_VD[tokens] + NoiseStream(bytes(32)).radial((1, 20 * V, D), 30.0)
    found = torch.cdist(known.denoiser(eta=30.0)(y)[0], known.rows_VD).argmin(dim=1)
    assert (found == tokens[0]).float().mean() > 0.99


@pytest.mark.parametrize("given", [{}, {"std": 1.0, "eta": 1.0}])
def test_one_kind_of_noise_is_asked_for(given):
    with pytest.raises(ValueError, match="Give one of std"):
        table().denoiser(**given)


def test_a_table_whose_parts_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"go with a prior \[V\]"):
        Table(normal(V, D), normal(V + 1))
    with pytest.raises(ValueError, match=r"Positions \[T, 4\]"):
        Table(normal(V, D), normal(V), normal(T, D + 1))


# A mixture


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("std", [0.1, 0.7, 4.0])
def test_a_mixture_gives_the_posterior_mean(offsets, std):
    """Each component's own posterior mean, weighed by its density at the input."""
    known, y = mixture(offsets=offsets), normal(B, T, D, seed=5)
    rest = (y - (known.offsets_TD if offsets else 0)).double()
    covariance, means = known.covariance_DD.double(), known.means_VD.double()
    total = covariance + std**2 * torch.eye(D)
    gain = covariance @ torch.linalg.inv(total)
    density = MultivariateNormal(means, total).log_prob(rest[..., None, :]) + known.log_prior_V
    each = means + (rest[..., None, :] - means) @ gain.T
    expected = (density.softmax(-1)[..., None] * each).sum(-2) + (known.offsets_TD if offsets else 0)
    torch.testing.assert_close(known.denoiser(std=std)(y).double(), expected, rtol=1e-3, atol=1e-4)


def test_draws_that_are_weighed_by_their_likelihood_have_the_same_mean():
    known, std, n = mixture(), 0.9, 400_000
    y = normal(1, 1, D, seed=5)
    tokens = torch.multinomial(known.log_prior_V.softmax(0), n, replacement=True)
    x = known.means_VD[tokens] + normal(n, D, seed=9) @ torch.linalg.cholesky(known.covariance_DD).T
    weights = (-(y[0] - x).pow(2).sum(1) / (2 * std**2)).softmax(0)
    error = (weights[:, None] * (x - weights @ x)).norm(dim=0).max().item()
    torch.testing.assert_close(known.denoiser(std=std)(y)[0, 0], weights @ x, rtol=0, atol=5 * error)


def test_a_mixture_of_one_token_is_the_wiener_filter():
    known = mixture()
    one = Mixture(known.means_VD[:1], known.log_prior_V[:1], known.covariance_DD)
    y, mean = normal(B, T, D, seed=5), known.means_VD[0]
    gain = known.covariance_DD @ torch.linalg.inv(known.covariance_DD + 0.25 * torch.eye(D))
    torch.testing.assert_close(one.denoiser(std=0.5)(y), mean + (y - mean) @ gain.T, rtol=1e-4, atol=1e-5)


def test_little_noise_gives_the_input_back():
    y = normal(B, T, D, seed=5)
    torch.testing.assert_close(mixture().denoiser(std=1e-3)(y), y, rtol=1e-2, atol=1e-2)


def planted(rows, *, tokens=T, seed=10):
    """Rows of a known mixture, with the tokens and embeddings that they come from."""
    known = mixture(offsets=True)
    input_ids = torch.randint(V, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    rest = normal(rows, tokens, D, seed=seed + 1) @ torch.linalg.cholesky(known.covariance_DD).T
    return known, input_ids, known.means_VD[input_ids] + rest


def fit(x, input_ids, embeddings, **settings):
    """In three batches."""
    batches = list(zip(input_ids.tensor_split(3), x.tensor_split(3), strict=True)) if len(x) > 2 else [(input_ids, x)]
    return fit_mixture(lambda: iter(batches), embeddings, **settings)


def test_a_fit_finds_the_mixture_that_the_rows_come_from():
    known, input_ids, x = planted(4000)
    found = fit(x, input_ids, normal(V, 3, seed=20), log_prior_V=known.log_prior_V)
    torch.testing.assert_close(found.means_VD, known.means_VD, rtol=0, atol=0.1)
    torch.testing.assert_close(found.covariance_DD, known.covariance_DD, rtol=0.1, atol=0.05)
    assert torch.equal(found.log_prior_V, known.log_prior_V)
    assert found.offsets_TD is None


def test_a_fit_tells_what_a_place_adds_from_what_a_token_is():
    known, input_ids, x = planted(4000)
    x = x + known.offsets_TD
    embeddings = normal(V, 3, seed=20)
    found = fit(x, input_ids, embeddings, log_prior_V=known.log_prior_V, has_positions=True)
    assert found.offsets_TD is not None
    expected = known.means_VD[input_ids] + known.offsets_TD
    torch.testing.assert_close(found.means_VD[input_ids] + found.offsets_TD, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(found.covariance_DD, known.covariance_DD, rtol=0.1, atol=0.05)
    without = fit(x, input_ids, embeddings, log_prior_V=known.log_prior_V)
    assert without.covariance_DD.trace() > 2 * found.covariance_DD.trace()


def test_few_rows_of_a_token_do_not_look_like_little_variation():
    known, n_tokens = mixture(), 3000
    input_ids = torch.arange(n_tokens).repeat(2)[None]  # two rows of each
    rest = normal(1, 2 * n_tokens, D, seed=11) @ torch.linalg.cholesky(known.covariance_DD).T
    found = fit(rest, input_ids, torch.zeros(n_tokens, 1), log_prior_V=torch.zeros(n_tokens), pseudo_counts=0.01)
    ratio = found.covariance_DD.trace() / known.covariance_DD.trace()
    assert 1 < ratio < 2.2  # of a row about the one other row: twice the variance; about their mean it would be half


def test_a_token_that_the_rows_lack_has_the_mean_that_its_embedding_says():
    embeddings = normal(V, 3, seed=20)
    weights, bias = normal(3, D, seed=21), normal(D, seed=22)
    input_ids = torch.randint(V - 1, (400, T), generator=torch.Generator().manual_seed(0))
    x = (embeddings @ weights + bias)[input_ids]
    found = fit(x, input_ids, embeddings, log_prior_V=torch.zeros(V))
    torch.testing.assert_close(found.means_VD[V - 1], embeddings[V - 1] @ weights + bias, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("offsets", [False, True])
def test_a_mixture_is_its_state(offsets):
    known, y = mixture(offsets=offsets), normal(B, T, D, seed=5)
    state = known.state()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert torch.equal(Mixture.of_state(state).denoiser(std=0.5)(y), known.denoiser(std=0.5)(y))
    del state["means_VD"]
    with pytest.raises(ValueError, match="A mixture is made of"):
        Mixture.of_state(state)
    with pytest.raises(ValueError, match="A mixture is made of"):
        Mixture.of_state({**known.state(), "more": y})


def test_a_fit_to_what_does_not_fit_is_refused():
    known, input_ids, x = planted(4)
    embeddings = normal(V, 3)
    with pytest.raises(ValueError, match="do not fit tokens"):
        fit(x[:, 1:], input_ids, embeddings, log_prior_V=known.log_prior_V)
    with pytest.raises(ValueError, match="do not fit a prior"):
        fit(x, input_ids, embeddings, log_prior_V=known.log_prior_V[1:])
    with pytest.raises(ValueError, match="pseudo_counts must be above 0"):
        fit(x, input_ids, embeddings, log_prior_V=known.log_prior_V, pseudo_counts=0.0)
    with pytest.raises(ValueError, match="needs data"):
        fit_mixture(lambda: iter(()), embeddings, log_prior_V=known.log_prior_V)


# The trunk output, on the device


def pairs(n=3, *, rows=400, rest=0.0):
    """Batches whose clean output is an affine function of the inputs, and that function."""
    maps = [normal(D, D, seed=30 + index) for index in range(3)]
    bias = normal(D, seed=33)
    batches = []
    for index in range(n):
        inputs = [normal(rows, T, D, seed=40 + 3 * index + part) for part in range(3)]
        clean = sum((x @ m for x, m in zip(inputs, maps, strict=True)), bias)
        batches.append((*inputs, clean + rest * normal(rows, T, D, seed=90 + index)))
    return batches, maps, bias


def test_the_affine_map_is_found():
    batches, maps, bias = pairs()
    found = fit_output_denoiser(batches)
    for weight, expected in zip((found.of_output_DD, found.of_smashed_DD, found.of_noise_DD), maps, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bias_D, bias, rtol=0, atol=1e-4)
    *inputs, clean = batches[0]
    torch.testing.assert_close(found(*inputs), clean, rtol=0, atol=1e-3)


def test_what_it_leaves_has_nothing_to_do_with_its_inputs():
    """The normal equations: the rest is at right angles to every input, over all batches."""
    batches, *_ = pairs(rest=0.5)
    found = fit_output_denoiser(batches)
    inputs = [torch.cat([batch[part] for batch in batches]) for part in range(3)]
    rest = torch.cat([batch[3] for batch in batches]) - found(*inputs)
    for x in inputs:
        assert (x.flatten(0, 1).T @ rest.flatten(0, 1)).abs().max() / rest[..., 0].numel() < 1e-4
    assert rest.mean(dim=(0, 1)).abs().max() < 1e-4
    correlation = stats.pearsonr(rest[..., 0].flatten(), inputs[0][..., 0].flatten())
    assert abs(correlation.statistic) < 1e-3


def test_gradients_go_to_the_trunk_output_alone():
    found = fit_output_denoiser(pairs()[0])
    inputs = [normal(B, T, D, seed=50 + part).requires_grad_() for part in range(3)]
    found(*inputs).sum().backward()
    expected = found.of_output_DD.sum(dim=1).expand(B, T, D)
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad, expected)
    assert inputs[1].grad is None
    assert inputs[2].grad is None


def test_an_output_denoiser_is_its_state():
    found = fit_output_denoiser(pairs()[0])
    inputs = [normal(B, T, D, seed=50 + part) for part in range(3)]
    assert torch.equal(OutputDenoiser.of_state(found.state())(*inputs), found(*inputs))
    with pytest.raises(ValueError, match="An output denoiser is made of"):
        OutputDenoiser.of_state({"bias_D": found.bias_D})


def test_an_output_denoiser_refuses_what_does_not_fit():
    found = fit_output_denoiser(pairs()[0])
    x = normal(B, T, D)
    for inputs in ((x, x, x[:1]), (x, x[..., 1:], x), (x[..., 1:], x[..., 1:], x[..., 1:])):
        with pytest.raises(ValueError, match="are of one shape"):
            found(*inputs)
    with pytest.raises(ValueError, match="needs data"):
        fit_output_denoiser([])
