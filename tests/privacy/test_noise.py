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
from scipy.special import ndtr

from splitfed.privacy import NoiseStream

KEY = bytes(range(32))
N = 1_000_000
SIGMAS = 5.0  # a test fails by chance with probability 6e-7; with a fixed key it passes or fails for good
ALPHA = 1e-6

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


def test_mean_variance_skewness_and_kurtosis_are_those_of_a_standard_normal(samples):
    centred = samples - samples.mean()
    assert abs(samples.mean()) < SIGMAS / math.sqrt(N)
    assert abs(samples.var() - 1) < SIGMAS * math.sqrt(2 / N)
    assert abs((centred**3).mean()) < SIGMAS * math.sqrt(6 / N)
    assert abs((centred**4).mean() - 3) < SIGMAS * math.sqrt(96 / N)


@pytest.mark.parametrize("std", [1.0, 1e-3, 250.0])
def test_kolmogorov_and_smirnov_find_the_stated_distribution(std):
    cdf = ndtr(np.sort(NoiseStream(KEY).gaussian((N,), std).double().numpy()) / std)
    steps = np.arange(N + 1) / N
    distance = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance < math.sqrt(math.log(2 / ALPHA) / (2 * N))  # Massart's bound


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


def test_no_other_generator_is_read_or_advanced():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = NoiseStream().gaussian((100,))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.manual_seed(1)
    assert not torch.equal(first, NoiseStream().gaussian((100,)))


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
