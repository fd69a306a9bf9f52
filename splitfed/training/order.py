"""Which examples a local step trains on: a function of the seed and of where the step stands, never of what ran before.

An agent that lost a round, or a daemon that was restarted, therefore draws the same examples again.
"""

import hashlib
import json

import numpy as np


def step_examples(
    n_examples: int, *, seed: int, client: str, round: int, step: int, batch_size: int, local_steps: int
) -> list[int]:
    """Draw the examples of one local step.

    A client goes through its examples in one endless sequence: a permutation of all of them, then the next
    permutation, and so on. Every step takes the next ``batch_size`` of it, across the borders of permutations and of
    rounds, so that each example is used once before any is used again.

    Args:
        n_examples: Examples that the client has, at least 1.
        seed: The run's seed.
        client: Name of the client, so that two clients differ.
        round: Round of the run, from 1.
        step: Local step of the round, from 0 to ``local_steps - 1``.
        batch_size: Examples per step, at least 1; may exceed ``n_examples``.
        local_steps: Steps per round, at least 1.

    Returns:
        Indices below ``n_examples``, ``batch_size`` of them.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if n_examples < 1 or batch_size < 1 or local_steps < 1:
        sizes = {"n_examples": n_examples, "batch_size": batch_size, "local_steps": local_steps}
        raise ValueError(f"every size must be 1 or more, but they are {sizes}")
    if round < 1 or not 0 <= step < local_steps:
        raise ValueError(f"round {round}, step {step}: rounds start at 1, and steps go from 0 to {local_steps - 1}")
    start = ((round - 1) * local_steps + step) * batch_size
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(start + len(indices), n_examples)
        permutation = epoch_permutation(n_examples, seed=seed, client=client, epoch=epoch)
        indices += permutation[offset : offset + batch_size - len(indices)].tolist()
    return indices


def epoch_permutation(n_examples: int, *, seed: int, client: str, epoch: int) -> np.ndarray:
    """Permute the examples for one pass over them.

    Args:
        n_examples: Examples that the client has.
        seed: The run's seed.
        client: Name of the client.
        epoch: Pass over the examples, from 0.

    Returns:
        The indices below ``n_examples``, each once, shape [n_examples].
    """
    key = hashlib.sha256(json.dumps(["data order", seed, client, epoch]).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key))).permutation(n_examples)
