"""Which examples a local step trains on when nobody may know: a Poisson sample in secret, at places in secret.

A server that cannot tell whether an example was drawn learns less about it. So the sample comes from the operating
system's randomness, never from the run's seed, and is drawn afresh when a round runs again; what crosses the link has
the same shape whatever was drawn.
"""

import os
from collections.abc import Callable

import numpy as np

RandomBytes = Callable[[int], bytes]


def poisson_sample(
    n_examples: int, *, sample_rate: float, capacity: int, random_bytes: RandomBytes = os.urandom
) -> list[int | None]:
    """Draw the examples of one local step, and the rows they stand in.

    Args:
        n_examples: Examples that the client has, at least 1.
        sample_rate: Probability with which each example is drawn, above 0 and at most 1.
        capacity: Rows of a step, at least 1.
        random_bytes: Gives as many independent uniform bytes as asked for.

    Returns:
        What stands in each of ``capacity`` rows: the index of an example, or None where there is nothing but noise.

    Raises:
        ValueError: If an argument is outside its range.

    Guarantees:
        * Each example is drawn independently of all others, with the sample rate rounded down to a multiple of 2⁻⁶⁴.
        * If more are drawn than there are rows, those that stay are a uniform choice; nothing else is left out.
        * The rows that hold an example are a uniform choice in a uniform order, but for ties among 64-bit keys, which
          occur with probability capacity² · 2⁻⁶⁵ at most.
        * No generator but ``random_bytes`` is read or advanced.
    """
    if n_examples < 1 or capacity < 1:
        raise ValueError(f"examples and rows must be 1 or more, but they are {n_examples} and {capacity}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"a sample rate is above 0 and at most 1, not {sample_rate}")
    drawn = np.arange(n_examples)
    if sample_rate < 1:
        drawn = np.flatnonzero(_words(n_examples, random_bytes) < np.uint64(int(sample_rate * 2.0**64)))
    kept = drawn[_shuffled(len(drawn), random_bytes)[:capacity]]
    rows: list[int | None] = [None] * capacity
    for row, index in zip(_shuffled(capacity, random_bytes)[: len(kept)].tolist(), kept.tolist(), strict=True):
        rows[row] = index
    return rows


def _words(count: int, random_bytes: RandomBytes) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(random_bytes(8 * count), dtype="<u8")


def _shuffled(count: int, random_bytes: RandomBytes) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Permute the numbers below ``count`` by a sort of random keys."""
    return np.argsort(_words(count, random_bytes))
