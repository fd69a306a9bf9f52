"""Posteriors by adding up over every text there is: what forward and backward have to give."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def posterior_by_enumeration(log_likelihood_TW: Tensor, probability: Callable[[tuple[int, ...]], float]) -> Tensor:
    """Give the probability of each state of each row, given a text's probability; float64, shape [T, W]."""
    T, W = log_likelihood_TW.shape
    likelihood_TW = log_likelihood_TW.double().exp()
    total_TW = torch.zeros(T, W, dtype=torch.float64)
    for text in product(range(W), repeat=T):
        weight = probability(text)
        for t, state in enumerate(text):
            weight *= likelihood_TW[t, state].item()
        for t, state in enumerate(text):
            total_TW[t, state] += weight
    return total_TW / total_TW.sum(-1, keepdim=True)
