"""The noise follows its distribution, cannot be predicted without the key, and is never repeated."""

import copy
import math
import os
import pickle
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtr

from splitfed.privacy import NoiseStream

KEY = bytes(range(32))
N = 1_000_000
SIGMAS = 5.0  # a test fails by chance with probability 6e-7; with a fixed key it passes or fails for good
ALPHA = 1e-6
VECTORS = 200_000
DRAWS = [
    pytest.param(lambda stream: stream.gaussian((100,)), id="gaussian"),
    pytest.param(lambda stream: stream.radial((10, 10), 1.0), id="radial"),
]

# RFC 8439, appendix A.1, test vector 1: key, nonce and block counter all zero.
ZERO_KEY_STREAM = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


@pytest.fixture(scope="module")
def samples():
    return NoiseStream(KEY).gaussian((N,)).double().numpy()


def test_samples_are_the_box_muller_transform_of_the_chacha20_key_stream():
    pairs = 5
    radius_bits = struct.unpack(f"<{pairs}Q", ZERO_KEY_STREAM[: 8 * pairs])
    angle_bits = struct.unpack(f"<{pairs}i", ZERO_KEY_STREAM[8 * pairs : 12 * pairs])
    radii = [math.sqrt(-2 * math.log(((bits >> 11) + 0.5) / 2**53)) for bits in radius_bits]
    angles = [bits * math.pi / 2**31 for bits in angle_bits]
    cosines = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
    sines = [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    drawn = NoiseStream(bytes(32)).gaussian((2, pairs), std=3.0)
    torch.testing.assert_close(drawn, 3 * torch.tensor([cosines, sines]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("std", [1.0, 1e-3, 250.0])
def test_mean_variance_skewness_and_kurtosis_are_those_of_the_normal_distribution(std):
    samples = NoiseStream(KEY).gaussian((N,), std).double().numpy() / std
    centred = samples - samples.mean()
    assert abs(samples.mean()) < SIGMAS / math.sqrt(N)
    assert abs(samples.var() - 1) < SIGMAS * math.sqrt(2 / N)
    assert abs((centred**3).mean()) < SIGMAS * math.sqrt(6 / N)
    assert abs((centred**4).mean() - 3) < SIGMAS * math.sqrt(96 / N)


@pytest.mark.parametrize("std", [1.0, 1e-3, 250.0])
def test_kolmogorov_and_smirnov_find_the_stated_distribution(std):
    samples = NoiseStream(KEY).gaussian((N,), std).double().numpy()
    assert stats.kstest(samples, stats.norm(scale=std).cdf).pvalue > ALPHA
    assert stats.kstest(samples, stats.norm(scale=1.02 * std).cdf).pvalue < ALPHA  # so it would see two percent


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.5])
def test_the_tails_are_as_heavy_as_they_should_be(samples, bound):
    expected = 2 * ndtr(-bound) * N
    assert abs((np.abs(samples) > bound).sum() - expected) < SIGMAS * math.sqrt(expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 2**15, 2**16])
def test_samples_are_not_correlated_with_those_after_them_nor_their_squares(samples, lag):
    """2¹⁵ apart lie the cosine and the sine of one angle, 2¹⁶ apart two pieces of one call."""
    first, second = samples[:-lag], samples[lag:]
    for f, variance in ((lambda x: x, 1.0), (lambda x: x**2 - 1, 2.0)):
        assert abs((f(first) * f(second)).mean()) < SIGMAS * variance / math.sqrt(len(first))


def test_calls_streams_and_keys_are_not_correlated():
    stream = NoiseStream(KEY)
    draws = [stream.gaussian((N // 4,)), stream.gaussian((N // 4,)), NoiseStream().gaussian((N // 4,))]
    draws.append(NoiseStream().gaussian((N // 4,)))
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs((first * second).mean().item()) < SIGMAS / math.sqrt(N // 4)


def test_the_same_key_and_calls_give_the_same_samples():
    streams = [NoiseStream(KEY), NoiseStream(KEY)]
    for shape in [(3,), (2, 65_537), (4, 5, 6)]:
        first, second = (stream.gaussian(shape, 0.5) for stream in streams)
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 11), (2**16 - 1,), (2**16 + 1,), (3, 2**16 + 5), (), (0,)])
def test_every_shape_is_filled_with_finite_float32(shape):
    drawn = NoiseStream(KEY).gaussian(shape)
    assert drawn.shape == torch.Size(shape)
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    assert drawn.count_nonzero() == drawn.numel()


@pytest.mark.parametrize("draw", DRAWS)
def test_no_other_generator_is_read_or_advanced(draw):
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        drawn.append(draw(NoiseStream(KEY)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert torch.equal(*drawn)  # under other seeds
    torch.manual_seed(1)
    first = draw(NoiseStream())
    torch.manual_seed(1)
    assert not torch.equal(first, draw(NoiseStream()))


def test_a_child_process_does_not_repeat_its_parents_noise(monkeypatch):
    stream = NoiseStream()
    key = stream._key
    stream.gaussian((1,))
    assert stream._key == key
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    stream.gaussian((1,))
    assert stream._key != key


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_cannot_be_duplicated(duplicate):
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        duplicate(NoiseStream())


def test_threads_draw_what_one_thread_would():
    one, shared = NoiseStream(KEY), NoiseStream(KEY)
    expected = {tuple(one.gaussian((4,)).tolist()) for _ in range(200)}
    with ThreadPoolExecutor(8) as pool:
        drawn = {tuple(values) for values in pool.map(lambda _: shared.gaussian((4,)).tolist(), range(200))}
    assert drawn == expected
    assert len(expected) == 200


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 1e31])
def test_a_standard_deviation_out_of_range_is_refused(std):
    with pytest.raises(ValueError, match="standard deviation of noise must be above 0"):
        NoiseStream().gaussian((1,), std)


def test_too_many_samples_are_refused_before_they_are_allocated():
    with pytest.raises(ValueError, match="At most 4294967296 samples"):
        NoiseStream().gaussian((2**20, 2**20))


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_is_refused(key):
    with pytest.raises(ValueError, match=f"has 32 bytes, not {len(key)}"):
        NoiseStream(key)


# Radial noise


def radial(hidden, rate=1.0, vectors=VECTORS):
    return NoiseStream(KEY).radial((vectors, hidden), rate).double().numpy()


@pytest.mark.parametrize(("hidden", "rate"), [(1, 1.0), (2, 0.01), (16, 1.0), (17, 1e3), (40, 3.0)])
def test_the_radius_follows_the_gamma_distribution(hidden, rate):
    """17 and 40 terms are not a multiple of the factors that are taken at once."""
    radius = rate * np.linalg.norm(radial(hidden, rate, N // hidden), axis=1)
    n = len(radius)
    assert abs(radius.mean() - hidden) < SIGMAS * math.sqrt(hidden / n)
    kurtosis = 3 + 6 / hidden  # of Gamma(D, 1), whose variance is D
    assert abs(radius.var() - hidden) < SIGMAS * hidden * math.sqrt((kurtosis - 1) / n)
    assert stats.kstest(radius, stats.gamma(hidden).cdf).pvalue > ALPHA
    assert stats.kstest(radius, stats.gamma(hidden, scale=1.05).cdf).pvalue < ALPHA


def test_a_radius_of_many_dimensions_is_spread_as_little_as_it_should_be():
    radius = np.linalg.norm(radial(1024, vectors=1000), axis=1)
    assert stats.kstest(radius, stats.gamma(1024).cdf).pvalue > ALPHA


@pytest.mark.parametrize("hidden", [2, 3, 8])
def test_the_direction_is_uniform_on_the_sphere(hidden):
    """Along any axis, the square of a uniform direction follows Beta(1/2, (D - 1)/2), and its sign is a coin's."""
    drawn = radial(hidden)
    direction = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    tilted = np.random.RandomState(0).randn(hidden)
    for axis in [*np.eye(hidden), tilted / np.linalg.norm(tilted)]:
        along = direction @ axis
        assert stats.kstest(along**2, stats.beta(0.5, (hidden - 1) / 2).cdf).pvalue > ALPHA
        assert abs(np.sign(along).mean()) < SIGMAS / math.sqrt(VECTORS)
    assert np.abs(direction.mean(axis=0)).max() < SIGMAS / math.sqrt(VECTORS * hidden)
    moments = direction.T @ direction / VECTORS - np.eye(hidden) / hidden
    assert np.abs(moments).max() < SIGMAS * math.sqrt(2 / VECTORS) / hidden


def test_in_one_dimension_both_signs_are_as_likely():
    assert abs(np.sign(radial(1)).mean()) < SIGMAS / math.sqrt(VECTORS)


def test_the_radius_depends_neither_on_the_direction_nor_on_the_vectors_beside_it():
    drawn = radial(8)
    radius = np.linalg.norm(drawn, axis=1)
    direction = drawn / radius[:, None]
    centred = (radius - 8) / math.sqrt(8)
    assert np.abs(centred @ direction).max() / VECTORS < SIGMAS / math.sqrt(8 * VECTORS)
    assert np.abs(centred @ (direction**2 - 1 / 8)).max() / VECTORS < SIGMAS * math.sqrt(2 / VECTORS) / 8
    for lag in (1, 2, 2**13):  # 2¹³ vectors apart lie two pieces of one draw
        assert abs((centred[lag:] * centred[:-lag]).mean()) < SIGMAS / math.sqrt(VECTORS - lag)


def test_radial_draws_differ_from_each_other_and_repeat_under_the_same_key():
    streams = [NoiseStream(KEY), NoiseStream(KEY)]
    first, again = ([stream.radial((5, 3), 1.0) for _ in range(2)] for stream in streams)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(*first)
    radii = [[drawn.norm(dim=-1)] for drawn in first]
    assert not torch.equal(radii[0][0], radii[1][0])


def test_radius_and_direction_do_not_share_bits():
    stream = NoiseStream(KEY)
    stream.radial((5, 3), 1.0)
    fresh = NoiseStream(KEY)
    fresh.gaussian((5, 3))
    fresh.gaussian((1,))
    assert torch.equal(stream.gaussian((4,)), fresh.gaussian((4,)))  # a radial call has read two nonces


@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 3, 4), (70_000, 2), (0, 3)])
def test_every_shape_is_filled_with_finite_radial_noise(shape):
    drawn = NoiseStream(KEY).radial(shape, 1e-3)
    assert drawn.shape == torch.Size(shape)
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    assert drawn.count_nonzero() == drawn.numel()


def test_a_vector_without_a_direction_is_given_one(monkeypatch):
    monkeypatch.setattr(NoiseStream, "gaussian", lambda self, shape: torch.zeros(tuple(shape)))
    drawn = NoiseStream(KEY).radial((100, 3), 1.0)
    assert (drawn[:, 0] > 0).all()
    assert drawn[:, 1:].count_nonzero() == 0


@pytest.mark.parametrize("rate", [1e-25, 1e25])
def test_the_ends_of_the_range_of_rates_neither_vanish_nor_overflow(rate):
    radius = NoiseStream(KEY).radial((1000, 4), rate).double().norm(dim=-1) * rate
    assert radius.mean().item() == pytest.approx(4, abs=SIGMAS * math.sqrt(4 / 1000))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, 1e-26, 1e26])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="rate of radial noise must be from"):
        NoiseStream().radial((1,), rate)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_radial_noise_without_a_vector_is_refused(shape):
    with pytest.raises(ValueError, match="vectors of one element or more"):
        NoiseStream().radial(shape, 1.0)
