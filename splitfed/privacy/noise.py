"""Gaussian and radial noise from a cryptographic stream.

The noise must be unknown to whoever sees the sum. A statistical generator does not promise that: ``torch.Generator``
keeps 32 bits of its seed on the CPU, so rows that hold nothing but noise (padding) would let a server search for the
seed and subtract the noise everywhere. Here the bits come from ChaCha20 under a key of the operating system.
"""

import math
import os
import threading
from collections.abc import Sequence
from typing import Final, NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

KEY_BYTES: Final = 32
MAX_SAMPLES: Final = 2**32
MAX_STD: Final = 1e30
MIN_RATE: Final = 1e-25
MAX_RATE: Final = 1e25

_PAIRS_AT_ONCE: Final = 2**15  # half a megabyte of scratch: stays in the second-level cache
_RADIUS_BYTES: Final = 8
_ANGLE_BYTES: Final = 4
_FACTORS_AT_ONCE: Final = 16  # a product of so many 54-bit uniforms is at least 2⁻⁸⁶⁴: float64 holds it
_UNIFORMS_AT_ONCE: Final = 2**16


class NoiseStream:
    """Draws samples that nobody without the key can predict, on any number of threads.

    The n-th draw reads the ChaCha20 key stream of nonce n, so no two draws share bits; a call of ``gaussian`` is one
    draw, a call of ``radial`` two. Uniform bits become Gaussian samples by the Box–Muller transform: a radius from 53
    bits in float64 and an angle from 32 bits in float32.

    A process that forks gets a fresh key in the child, and a stream can be neither copied nor pickled: the same noise
    under two tensors would let their difference through without any.

    Source: Box & Muller, A note on the generation of random normal deviates, Ann. Math. Statist. 29 (1958), 610; RFC
    8439 for ChaCha20.

    Args:
        key: 32 bytes for a stream that can be repeated, in tests only; left out = from the operating system.

    Raises:
        ValueError: If the key has another length.

    Guarantees:
        * Samples of ``gaussian`` follow N(0, std²), up to float32 rounding and a tail cut at 8.65 standard deviations,
          which a pair of exact samples passes with probability 2⁻⁵⁴.
        * Vectors of ``radial`` have the density ∝ exp(-rate · ‖z‖₂), up to float32 rounding and the same tails: the
          direction is uniform on the sphere, the radius follows Gamma(D, 1 / rate), and neither depends on the other.
        * Samples of one call, and of different calls, are independent of each other.
        * The same key, and the same calls in the same order, give the same samples.
        * Two streams without a given key differ; so do two calls on one stream.
        * No other random generator is read or advanced.
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise ValueError(f"The key of a noise stream has {KEY_BYTES} bytes, not {len(key)}.")
        self._is_given = key is not None
        self._key = os.urandom(KEY_BYTES) if key is None else key
        self._process_id = os.getpid()
        self._calls = 0
        self._lock = threading.Lock()

    def gaussian(self, shape: Sequence[int], std: float = 1.0) -> Tensor:
        """Draw independent samples of N(0, std²).

        Args:
            shape: Shape of the result, at most 2³² elements.
            std: Standard deviation, above 0 and at most 1e30.

        Returns:
            A float32 tensor on the CPU.

        Raises:
            ValueError: If the standard deviation is outside its range, or the shape has too many elements.
        """
        if not 0 < std <= MAX_STD:
            raise ValueError(f"The standard deviation of noise must be above 0 and at most {MAX_STD}, not {std}.")
        samples = math.prod(shape)
        if samples > MAX_SAMPLES:
            raise ValueError(f"At most {MAX_SAMPLES} samples are drawn at once, not {samples}; draw them in parts.")
        result = np.empty(samples, dtype=np.float32)
        _fill(result, self._next_cipher(), std)
        return torch.from_numpy(result).view(tuple(shape))

    def radial(self, shape: Sequence[int], rate: float) -> Tensor:
        """Draw independent vectors of the density ∝ exp(-rate · ‖z‖₂), the Laplace density of the L2 norm.

        The direction is a normalised Gaussian vector. The radius is a sum of D exponentials, each from 53 bits, which
        is Gamma(D, 1 / rate) exactly; it is computed in float64.

        Args:
            shape: Shape of the result, at most 2³² elements; the last dimension is a vector's, D.
            rate: Rate of the decay, in 1e-25 to 1e25; the mean radius is D / rate.

        Returns:
            A float32 tensor on the CPU.

        Raises:
            ValueError: If the rate is outside its range, there is no last dimension, or the shape has too many
                elements.

        Source: Feyisetan, Balle, Drake & Diethe, Privacy- and utility-preserving textual analysis via calibrated
        multivariate perturbations (2020), for direction and radius; Devroye, Non-uniform random variate generation
        (1986), section IX.3, for the sum.
        """
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"The rate of radial noise must be from {MIN_RATE} to {MAX_RATE}, not {rate}.")
        if not shape or shape[-1] < 1:
            raise ValueError(f"Radial noise is drawn for vectors of one element or more, not for shape {tuple(shape)}.")
        vectors = self.gaussian(shape).double().view(-1, shape[-1]).numpy()
        vectors[~vectors.any(axis=1), 0] = 1.0  # no direction: one element is zero with probability 2⁻³²
        scale = _erlang(len(vectors), shape[-1], self._next_cipher())
        scale /= rate
        scale /= np.linalg.norm(vectors, axis=1)
        vectors *= scale[:, None]
        return torch.from_numpy(vectors).to(torch.float32).view(tuple(shape))

    def __reduce__(self) -> NoReturn:
        raise TypeError("A noise stream can be neither copied nor pickled: the copy would repeat its noise.")

    def _next_cipher(self) -> Cipher[None]:
        """Give the cipher of the next call."""
        with self._lock:
            if self._process_id != os.getpid() and not self._is_given:
                self._key, self._process_id, self._calls = os.urandom(KEY_BYTES), os.getpid(), 0
            key, call = self._key, self._calls
            self._calls += 1
        block_counter = bytes(8)
        return Cipher(algorithms.ChaCha20(key, block_counter + call.to_bytes(8, "little")), mode=None)


def _fill(result: np.ndarray[tuple[int], np.dtype[np.float32]], cipher: Cipher[None], std: float) -> None:
    """Fill an array with samples, a cache-sized piece at a time."""
    pairs_left = (len(result) + 1) // 2
    pairs = min(pairs_left, _PAIRS_AT_ONCE)
    zeros = bytes(pairs * (_RADIUS_BYTES + _ANGLE_BYTES))
    key_stream = bytearray(len(zeros))
    encryptor = cipher.encryptor()
    for start in range(0, len(result), 2 * _PAIRS_AT_ONCE):
        piece = result[start : start + 2 * _PAIRS_AT_ONCE]
        encryptor.update_into(zeros, key_stream)
        radius_bits = np.frombuffer(key_stream, dtype="<u8", count=pairs)
        angle_bits = np.frombuffer(key_stream, dtype="<i4", offset=_RADIUS_BYTES * pairs)

        radius = (radius_bits >> np.uint64(11)).view(np.int64) + 0.5  # 53 bits, never 0
        radius *= 2.0**-53
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        radius *= std
        angle = angle_bits.astype(np.float32)
        angle *= np.float32(math.pi / 2**31)

        radius32 = radius.astype(np.float32)
        cosines = (len(piece) + 1) // 2
        np.multiply(np.cos(angle[:cosines]), radius32[:cosines], out=piece[:cosines])
        np.multiply(np.sin(angle[: len(piece) - cosines]), radius32[: len(piece) - cosines], out=piece[cosines:])


def _erlang(samples: int, terms: int, cipher: Cipher[None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Draw sums of standard exponentials: -ln of a product of uniforms, a few factors at a time."""
    result = np.zeros(samples)
    encryptor = cipher.encryptor()
    rows_at_once = max(_UNIFORMS_AT_ONCE // terms, 1)
    for start in range(0, samples, rows_at_once):
        piece = result[start : start + rows_at_once]
        bits = np.frombuffer(encryptor.update(bytes(_RADIUS_BYTES * terms * len(piece))), dtype="<u8")
        uniforms = (bits >> np.uint64(11)).view(np.int64) + 0.5  # 53 bits, never 0
        uniforms *= 2.0**-53
        products = np.multiply.reduceat(
            uniforms.reshape(len(piece), terms), np.arange(0, terms, _FACTORS_AT_ONCE), axis=1
        )
        np.negative(np.log(products).sum(axis=1), out=piece)
    return result
