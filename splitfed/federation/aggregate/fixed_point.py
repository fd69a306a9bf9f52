"""A weighted mean of adapters that does not depend on the order in which they arrive, to the bit.

Source: the weights are those of FederatedAveraging, McMahan et al. 2017, Algorithm 1: a client counts for its examples.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from splitfed.federation.aggregate.refusal import UpdateRefused

HIGH_BITS: Final = 20
"""Binary digits after the point that the upper limb holds."""
LOW_BITS: Final = 24
"""Binary digits that the lower limb adds: the resolution is 2⁻⁴⁴."""
MAX_MAGNITUDE: Final = 2048.0
"""Values must be smaller than this, so that an upper limb has 31 bits and a sign."""
MAX_TOTAL_WEIGHT: Final = 2**31 - 1


class FixedPointMean:
    """Adds up states times weights in integers, and divides once at the end.

    Updates need not hold the same tensors: each tensor's mean is over the updates that hold it, with their weights.

    A value x becomes two integers, hi = round(x · 2²⁰) and lo = round((x · 2²⁰ - hi) · 2²⁴), and each is summed times
    the weight in an int64: |hi| ≤ 2³¹ and |lo| ≤ 2²³, with a total weight under 2³¹, leave no sum above 2⁶². Integer
    sums have no order, so updates are added as they arrive, and only the two sums (16 bytes an element) are kept.

    Guarantees:
        * The result is the same to the bit for every order of the updates.
        * Any number of updates with the same values, whatever their weights, gives these values back to the bit if they
          are multiples of 2⁻⁴⁴: zero (as +0) and every float32 of magnitude 2⁻²¹ ≈ 4.8e-7 and more are.
        * The result differs from the exact weighted mean by at most 2⁻⁴⁵ and one rounding to float32.
        * An update that is refused leaves the sums as they were.
    """

    def __init__(self) -> None:
        self._high: dict[str, Tensor] = {}
        self._low: dict[str, Tensor] = {}
        self._weights: dict[str, int] = {}
        self._total_weight = 0

    @property
    def total_weight(self) -> int:
        """Sum of the weights of all updates so far."""
        return self._total_weight

    def add(self, state: Mapping[str, Tensor], weight: int) -> None:
        """Add an update.

        Args:
            state: Floating-point tensors by name, of any shape, with values in -2048 to 2048, both excluded; on any
                device.
            weight: What the update counts for, such as its number of examples; 1 or more.

        Raises:
            UpdateRefused: If the total weight passes 2³¹ - 1, or a value is NaN, infinite or out of range.
            ValueError: If the weight is not a positive integer, a shape differs from an earlier update's, or a tensor
                is empty or not floating point.
        """
        check_update(state, weight)
        self._check_fit(state, weight)
        for name, tensor in state.items():
            scaled = tensor.detach().cpu().to(torch.float64).mul_(2.0**HIGH_BITS)
            high = scaled.round()
            low = scaled.sub_(high).mul_(2.0**LOW_BITS).round_()
            if name not in self._high:
                self._high[name] = torch.zeros(tensor.shape, dtype=torch.int64)
                self._low[name] = torch.zeros(tensor.shape, dtype=torch.int64)
                self._weights[name] = 0
            self._high[name].add_(high.to(torch.int64), alpha=weight)
            self._low[name].add_(low.to(torch.int64), alpha=weight)
            self._weights[name] += weight
        self._total_weight += weight

    def result(self) -> dict[str, Tensor]:
        """Give the weighted mean of all updates so far, of every tensor that one of them holds, float32, on the CPU.

        Raises:
            ValueError: If there was no update.
        """
        if not self._total_weight:
            raise ValueError("There is no mean of no updates; add one first.")
        return {name: self._divide(name) for name in self._high}

    def _divide(self, name: str) -> Tensor:
        """Divide a pair of sums by the total weight, limb by limb, so that nothing is lost before the last step."""
        weight = self._weights[name]
        high = self._high[name].div(weight, rounding_mode="floor")
        carried = (self._high[name] - high * weight) * 2**LOW_BITS + self._low[name]  # under 2⁵⁶
        low = carried.div(weight, rounding_mode="floor")
        rest = (carried - low * weight).to(torch.float64).div_(weight)
        mean = high.to(torch.float64) * 2.0**-HIGH_BITS + (low + rest) * 2.0 ** -(HIGH_BITS + LOW_BITS)
        return mean.to(torch.float32)

    def _check_fit(self, state: Mapping[str, Tensor], weight: int) -> None:
        if self._total_weight + weight > MAX_TOTAL_WEIGHT:
            raise UpdateRefused(
                f"A weight of {weight} takes the total from {self._total_weight} past {MAX_TOTAL_WEIGHT}; "
                "divide all weights by a common number."
            )
        for name, tensor in state.items():
            if name in self._high and tensor.shape != self._high[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} and not {tuple(self._high[name].shape)}, as in an "
                    "earlier update."
                )


def check_update(state: Mapping[str, Tensor], weight: int) -> None:
    """Refuse what no mean can be taken of.

    Args:
        state: Tensors by name.
        weight: What the update counts for.

    Raises:
        UpdateRefused: If a value is NaN, infinite or out of range.
        ValueError: If the weight is not a positive integer, there is no tensor, or a tensor is empty or not floating
            point.
    """
    if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
        raise ValueError(f"The weight of an update is a positive integer, not {weight!r}.")
    if not state:
        raise ValueError("The update holds no tensor.")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            raise ValueError(f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; no mean is taken of that.")
        low, high = (bound.item() for bound in torch.aminmax(tensor.detach()))
        if not (low > -MAX_MAGNITUDE and high < MAX_MAGNITUDE):  # a NaN fails every comparison
            raise UpdateRefused(
                f"{name!r} has values from {low:g} to {high:g}; they must be between -{MAX_MAGNITUDE:g} and "
                f"{MAX_MAGNITUDE:g}."
            )
