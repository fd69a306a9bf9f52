"""What "equal to float32 rounding" means in these tests, once."""

import torch
from torch import Tensor

TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Largest difference, relative to the largest element (7.6e-6). Most families agree to the bit, the worst to 7 eps."""


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    assert torch.isfinite(expected).all(), f"{what}: the whole model's is not finite"
    largest = expected.abs().max().item() if expected.numel() else 0.0
    difference = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert difference <= TOLERANCE * largest, f"{what}: differs by {difference:.2g}, largest element {largest:.2g}"
