"""Training of what reads tokens from smashed data, until it is no longer worth it.

Shapes: B sequences, T tokens, D hidden, N rows, W = V + 1 states (tokens and padding).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Final

import torch
from torch import Tensor, nn

from splitfed.privacy.leakage.tokens_public import PublicReleases

_STEPS_BETWEEN_LOOKS: Final = 50
_LEAST_GAIN: Final = 0.01  # of the held-out loss, between two looks
_SLOWER: Final = 0.2
_SLOWDOWNS: Final = 2
_LOGITS_AT_ONCE: Final = 2**25


def train(
    network: nn.Module,
    public: PublicReleases,
    *,
    rate: float,
    max_steps: int,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> int:
    """Train by Adam; go slower where held-out text shows no gain, and stop where that does not help either.

    Args:
        network: Smashed data [B, T, D] to logits of states [B, T, W]; left with the weights that were best on held-out
            text, those at the start included.
        public: What to train on.
        rate: First learning rate.
        max_steps: The most steps to take.
        batch_size: Sequences in a step.
        seed: For the batches.
        progress: Told the part of the steps that is done, from 0 to 1; 1 at the end.

    Returns:
        Steps taken.

    Guarantees:
        * The held-out loss at the end is not above that at the start.

    Source: Kingma and Ba, Adam: a method for stochastic optimization (2015).
    """
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    best_loss, best, slowdowns, step = held_out_loss(network, public), deepcopy(network.state_dict()), 0, 0
    while step < max_steps and slowdowns <= _SLOWDOWNS:
        for _ in range(min(_STEPS_BETWEEN_LOOKS, max_steps - step)):
            smashed_BTD, states_BT = public.batch(batch_size, draw)
            rows_N = _some_rows(states_BT, public.n_states, draw)
            loss = nn.functional.cross_entropy(network(smashed_BTD).flatten(0, 1)[rows_N], states_BT.flatten()[rows_N])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
        now = held_out_loss(network, public)
        if not now < (1 - _LEAST_GAIN) * best_loss:
            slowdowns += 1
            for group in optimiser.param_groups:
                group["lr"] *= _SLOWER
        if now < best_loss:
            best_loss, best = now, deepcopy(network.state_dict())
        if progress is not None:
            progress(step / max_steps)
    network.load_state_dict(best)
    if progress is not None and step < max_steps:
        progress(1.0)
    return step


@torch.no_grad()
def held_out_loss(network: nn.Module, public: PublicReleases) -> float:
    """Measure the mean cross-entropy of a row of held-out text, padding included."""
    losses = [
        nn.functional.cross_entropy(network(smashed_TD[None]).flatten(0, 1), states_T)
        for smashed_TD, states_T in zip(public.held_out_BTD, public.held_out_states_BT, strict=True)
    ]
    return float(torch.stack(losses).mean())


def _some_rows(states_BT: Tensor, n_states: int, draw: torch.Generator) -> Tensor:
    """Choose as many rows of a batch as logits are affordable for."""
    most = max(1, _LOGITS_AT_ONCE // n_states)
    if states_BT.numel() <= most:
        return torch.arange(states_BT.numel(), device=states_BT.device)
    return torch.randperm(states_BT.numel(), generator=draw)[:most].to(states_BT.device)
