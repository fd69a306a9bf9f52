"""DP-SGD's clip and noise: what an agent's own adapter may learn from one example."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from splitfed.errors import PrivacyError
from splitfed.privacy.mechanisms import RELATION, UNIT, check_clipping_norm, check_noise_multiplier
from splitfed.privacy.noise import NoiseStream

_SLACK: Final = 1 - 2.0**-22  # room for rounding: norms, products and sums in float64 err by far less


class PerExampleMechanism:
    """Clips each example's gradient over all tensors together, and adds Gaussian noise to the sum over examples.

    The unit of privacy is the sequence, the neighbouring relation replace-one: an example is a sequence, and its
    gradient is that of its own loss.

    Shape legend: B examples.

    Args:
        clipping_norm: Largest L2 norm of an example's gradient, C, in 1e-20 to 1e20; opacus's ``max_grad_norm``.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0; opacus's ``noise_multiplier`` is
            standard deviation ÷ C under add/remove, hence 2·z.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If the clipping norm or the noise multiplier is outside its range.

    Guarantees:
        * The clipped gradients of one example, over all its tensors together, have an L2 norm of at most C; the sum is
          gathered in float64, so that rounding adds less than the clip leaves free.
        * An example moves no other example's share of the sum: replacing one moves the sum by at most
          ``sensitivity()`` = 2·C, dropping one by at most C.
        * A row that holds no example adds nothing, and costs the same work and the same refusals as any other: neither
          the time nor the failing of a step tells how many were drawn.
        * The noise has standard deviation ``noise_multiplier * sensitivity()`` on every element of every tensor, a
          tensor of zeros included.
        * A release is the Gaussian mechanism with noise multiplier z: (α, α / (2·z²))-RDP for every α > 1.

        ==================== ==========================================
        norm of an example   its share of the sum
        ==================== ==========================================
        zero                 zero
        up to C              its gradient, or 2⁻²² shorter in the last 2⁻²²
        above C              same direction, norm C · (1 − 2⁻²²)
        infinite, NaN        refused, nothing is drawn
        ==================== ==========================================

    Source: Abadi et al., Deep learning with differential privacy (2016), Algorithm 1; Mironov, Rényi differential
    privacy (2017), Corollary 3, for the RDP of the Gaussian mechanism.
    """

    unit: Final = UNIT
    relation: Final = RELATION

    def __init__(self, clipping_norm: float, noise_multiplier: float, stream: NoiseStream | None = None) -> None:
        check_clipping_norm(clipping_norm)
        check_noise_multiplier(noise_multiplier)
        self.clipping_norm = clipping_norm
        self.noise_multiplier = noise_multiplier
        self._stream = NoiseStream() if stream is None else stream

    def sensitivity(self) -> float:
        """Bound how far apart the sums of two neighbours can be, under replace-one: 2·C."""
        return 2 * self.clipping_norm

    def rdp(self, order: float) -> float:
        """Bound the Rényi divergence of one release between neighbours.

        Args:
            order: α, above 1.

        Returns:
            α / (2·z²).
        """
        return order / (2 * self.noise_multiplier**2)

    def clip_factors(self, norms_B: Tensor) -> Tensor:
        """Give what each example's gradient is multiplied by.

        Args:
            norms_B: L2 norm of each example's gradient over all its tensors, float64, shape [B].

        Returns:
            Factors above 0 and at most 1, float64, shape [B].

        Raises:
            PrivacyError: If a norm is NaN or infinite: there is nothing to scale such a gradient to.
        """
        if not torch.isfinite(norms_B).all():
            raise PrivacyError(
                "The gradient of an example holds a NaN or an infinite value; nothing was applied. "
                "Lower the learning rate, or load the adapter of an earlier round."
            )
        target = self.clipping_norm * _SLACK
        return target / norms_B.clamp(min=target)

    def clip(self, per_example: Mapping[str, Tensor], *, is_real_B: Tensor | None = None) -> dict[str, Tensor]:
        """Clip each example's gradient and add them up.

        Args:
            per_example: Gradients by the name of their parameter, shape [B, ...] each, of the same B examples.
            is_real_B: False for rows that hold no example and are to add nothing, shape [B]; None = all hold one.

        Returns:
            The sum over the examples, by the same names, shape [...] each, float64.

        Raises:
            PrivacyError: If an example's norm is NaN or infinite.
        """
        if not per_example:
            return {}
        factors_B = self.clip_factors(_norms(per_example))
        if is_real_B is not None:
            factors_B = factors_B * is_real_B
        return {
            name: (factors_B @ gradients.flatten(1).double()).view(gradients.shape[1:])
            for name, gradients in per_example.items()
        }

    def release(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add noise to the sum over a step's examples.

        Args:
            sums: The sum by the name of its parameter, of all micro-batches of the step.

        Returns:
            The sum and its noise, by the same names, in the shape and dtype of the input; on its device.
        """
        std = self.noise_multiplier * self.sensitivity()
        return {name: total + self._stream.gaussian(total.shape, std).to(total) for name, total in sums.items()}


def _norms(per_example: Mapping[str, Tensor]) -> Tensor:
    """Take one norm an example, over all its tensors: float64, shape [B]."""
    norms_NB = [
        torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64) for gradients in per_example.values()
    ]
    return torch.linalg.vector_norm(torch.stack(norms_NB), dim=0)
