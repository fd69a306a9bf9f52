"""What may leave a device, and in which form: the one gate that smashed data and output gradients pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from splitfed.privacy import Ledger, Mechanism
from splitfed.training.link import Place


class Releases(Protocol):
    """Turns what a device computed into what it sends."""

    @property
    def is_noisy(self) -> bool:
        """Noise is on: shapes, masks and weights must then say nothing about the text either."""

    def smashed(self, smashed_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Give the form of the smashed data that leaves, differentiable with respect to its input."""

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Give the form of the output gradient that leaves.

        Args:
            gradient_BTD: Gradient of the sum of per-sequence losses, shape [B, T, D].
            records: The record of each sequence, B of them.
            round: The round, from 1.
            place: Local step and micro-batch.
        """


class OpenReleases:
    """Everything leaves as it is. Nothing is guaranteed."""

    is_noisy = False

    def smashed(self, smashed_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Return the input."""
        return smashed_BTD

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Return the input."""
        return gradient_BTD


@dataclass(frozen=True)
class LedgeredReleases:
    """Clip, charge, add noise; the ledger has the charge on disk before a caller has the tensor.

    Without noise a charge says that nothing is guaranteed; once a round and channel says it all.

    Attributes:
        smashed_mechanism: For smashed data.
        output_gradient_mechanism: For output gradients.
        ledger: Where each release is charged.
        run: Name of the run, for the ledger.
    """

    smashed_mechanism: Mechanism
    output_gradient_mechanism: Mechanism
    ledger: Ledger
    run: str
    _unprotected: set[tuple[str, int]] = field(default_factory=set)

    @property
    def is_noisy(self) -> bool:
        """Noise is on, on one channel at least."""
        return max(self.smashed_mechanism.noise_multiplier, self.output_gradient_mechanism.noise_multiplier) > 0

    def smashed(self, smashed_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Release smashed data.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        return self._release("smashed", self.smashed_mechanism, smashed_BTD, records, round, place)

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Release an output gradient.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        return self._release("output_gradient", self.output_gradient_mechanism, gradient_BTD, records, round, place)

    def _release(
        self, channel: str, mechanism: Mechanism, x_BTD: Tensor, records: Sequence[str], round: int, place: Place
    ) -> Tensor:
        if mechanism.noise_multiplier > 0 or (channel, round) not in self._unprotected:
            self.ledger.charge(
                channel,
                noise_multiplier=mechanism.noise_multiplier,
                records=records,
                sequences=len(records),
                run=self.run,
                round=round,
                step=place.step,
                kind=place.kind.value,
            )
        if mechanism.noise_multiplier == 0:
            self._unprotected.add((channel, round))
        return mechanism.release(x_BTD)
