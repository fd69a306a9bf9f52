"""Clip and noise for a whole adapter update, so that a client with these data cannot be told from one with others."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from splitfed.errors import PrivacyError
from splitfed.privacy.mechanisms import RELATION, Unit
from splitfed.privacy.noise import NoiseStream
from splitfed.privacy.per_example import PerExampleMechanism


class UpdateMechanism:
    """Clips what a round changed in a client's adapter, and adds Gaussian noise to it.

    The unit of privacy is the client, the neighbouring relation replace-one: all of the client's data become any
    others. Whatever protects a client protects each of its sequences. The adapter before the round is known to whoever
    sees the result, and is not protected.

    Args:
        clipping_norm: Largest L2 norm of the update, all tensors together, C, in 1e-20 to 1e20.
        noise_multiplier: Standard deviation of the noise ÷ sensitivity, z, above 0.
        stream: Where the noise comes from; left out = a stream of its own.

    Raises:
        ValueError: If the clipping norm or the noise multiplier is outside its range.

    Guarantees:
        * The clipped update has an L2 norm of at most C, so two of them are at most ``sensitivity()`` = 2·C apart.
        * The noise has standard deviation ``noise_multiplier * sensitivity()`` on every element of every tensor, one
          that did not change included.
        * A release is the Gaussian mechanism with noise multiplier z: (α, α / (2·z²))-RDP for every α > 1.

        ==================== ==================================
        norm of the update   release
        ==================== ==================================
        zero                 before + noise
        up to C              after + noise
        above C              before + the update scaled to C + noise
        infinite, NaN        refused, nothing is drawn
        ==================== ==================================

    Source: McMahan, Ramage, Talwar & Zhang, Learning differentially private recurrent language models (2018), for the
    clip of a whole update; here the noise is added by the client itself.
    """

    unit: Final[Unit] = "client"
    relation: Final = RELATION

    def __init__(self, clipping_norm: float, noise_multiplier: float, stream: NoiseStream | None = None) -> None:
        self._of_one = PerExampleMechanism(clipping_norm, noise_multiplier, stream)  # the update is its one example

    @property
    def clipping_norm(self) -> float:
        """Largest L2 norm of the update, C."""
        return self._of_one.clipping_norm

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise ÷ sensitivity, z."""
        return self._of_one.noise_multiplier

    def sensitivity(self) -> float:
        """Bound how far apart two clipped updates can be, under replace-one: 2·C."""
        return self._of_one.sensitivity()

    def rdp(self, order: float) -> float:
        """Bound the Rényi divergence of one release between neighbours.

        Args:
            order: α, above 1.

        Returns:
            α / (2·z²).
        """
        return self._of_one.rdp(order)

    def release(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clip the update, add noise, and put it on the adapter before the round.

        Args:
            before: The adapter at the round's start, by name.
            after: The adapter at the round's end, same names and shapes.

        Returns:
            What may leave, by the same names, in the dtype of ``before``.

        Raises:
            PrivacyError: If the update holds a NaN or an infinity.
            ValueError: If the two are not of one adapter.
        """
        shapes_before = {name: tensor.shape for name, tensor in before.items()}
        shapes_after = {name: tensor.shape for name, tensor in after.items()}
        if shapes_before != shapes_after:
            name = min(name for name in {**before, **after} if shapes_before.get(name) != shapes_after.get(name))
            raise ValueError(
                f"The adapter's tensor {name!r} is on one side of the round only or differs in shape; "
                "give the same adapter before and after."
            )
        update = {name: (after[name].double() - before[name].double()).unsqueeze(0) for name in before}
        if not all(torch.isfinite(change).all() for change in update.values()):
            raise PrivacyError(
                "The adapter update holds a NaN or an infinite value; it was not sent. "
                "Lower the learning rate, or load the adapter of an earlier round."
            )
        released = self._of_one.release(self._of_one.clip(update))
        return {name: (tensor.double() + released[name]).to(tensor.dtype) for name, tensor in before.items()}
