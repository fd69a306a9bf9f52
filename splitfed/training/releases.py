"""What may leave a device, and in which form: the one gate that smashed data, output gradients and adapters pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from splitfed.privacy import (
    Charge,
    Ledger,
    Mechanism,
    MetricMechanism,
    PerExampleMechanism,
    StepSampling,
    UpdateMechanism,
)
from splitfed.training.link import Kind, Place


class Releases(Protocol):
    """Turns what a device computed into what it sends."""

    @property
    def is_noisy(self) -> bool:
        """Noise is on: shapes, masks and weights must then say nothing about the text either."""

    @property
    def per_example(self) -> PerExampleMechanism | None:
        """What clips each example's gradient of the device's own adapters, before they are added up; None = nothing."""

    @property
    def sampling(self) -> StepSampling | None:
        """How each step draws its examples in secret; None = they come in their order."""

    def smashed(
        self,
        smashed_BTD: Tensor,
        *,
        records: Sequence[str],
        round: int,
        place: Place,
        is_real_B: Tensor | None = None,
    ) -> Tensor:
        """Give the form of the smashed data that leaves, differentiable with respect to its input.

        Args:
            smashed_BTD: The bottom's output, shape [B, T, D].
            records: The record of each sequence that is one.
            round: The round, from 1.
            place: Local step and micro-batch.
            is_real_B: False for a sequence that is to be noise alone, shape [B]; None = all are real.
        """

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Give the form of the output gradient that leaves.

        Args:
            gradient_BTD: Gradient of the sum of per-sequence losses, shape [B, T, D].
            records: The record of each sequence that is one.
            round: The round, from 1.
            place: Local step and micro-batch.
        """

    def adapter_gradient(
        self, sums: Mapping[str, Tensor], *, records: Sequence[str], round: int, step: int
    ) -> dict[str, Tensor]:
        """Give the form of a step's clipped and summed gradients that may change the device's adapters.

        Args:
            sums: Sum over examples of their clipped gradients, by whole-model name.
            records: The record of each example.
            round: The round, from 1.
            step: The local step.
        """

    def adapter_update(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, round: int
    ) -> dict[str, Tensor]:
        """Give the form of the device's adapters that leaves at a round's end.

        Args:
            before: The adapters that the round started from, by whole-model name.
            after: The adapters after local training.
            round: The round, from 1.
        """


class OpenReleases:
    """Everything leaves as it is. Nothing is guaranteed."""

    is_noisy = False
    per_example = None
    sampling = None

    def smashed(
        self,
        smashed_BTD: Tensor,
        *,
        records: Sequence[str],
        round: int,
        place: Place,
        is_real_B: Tensor | None = None,
    ) -> Tensor:
        """Return the input."""
        return smashed_BTD

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Return the input."""
        return gradient_BTD

    def adapter_gradient(
        self, sums: Mapping[str, Tensor], *, records: Sequence[str], round: int, step: int
    ) -> dict[str, Tensor]:
        """Return the sums."""
        return dict(sums)

    def adapter_update(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, round: int
    ) -> dict[str, Tensor]:
        """Return the adapters after training."""
        return dict(after)


@dataclass(frozen=True)
class LedgeredReleases:
    """Clip, charge, add noise; the ledger has the charge on disk before a caller has the tensor.

    Without noise a charge says that nothing is guaranteed; once a round and channel says it all.

    What is released depends on a record that is not in it as soon as the segment that computes it has an adapter that
    was trained on raw records: smashed data through the bottom's, output gradients through the top's. Adapters under
    DP-SGD depend on records through noised gradients alone, which are charged themselves.

    Attributes:
        smashed_mechanism: For smashed data.
        output_gradient_mechanism: For output gradients.
        ledger: Where each release is charged.
        run: Name of the run, for the ledger.
        per_example: DP-SGD for the device's adapters.
        update: For the adapter update as a whole.
        bottom_trains: The bottom has an adapter.
        top_trains: The top has an adapter.
        sampling: How each step draws its examples in secret.
    """

    smashed_mechanism: Mechanism
    output_gradient_mechanism: Mechanism
    ledger: Ledger
    run: str
    per_example: PerExampleMechanism | None = None
    update: UpdateMechanism | None = None
    bottom_trains: bool = True
    top_trains: bool = True
    sampling: StepSampling | None = None
    _unprotected: set[tuple[str, int]] = field(default_factory=set)

    @property
    def is_noisy(self) -> bool:
        """Noise is on, on one channel at least."""
        return any(_is_noisy(mechanism) for mechanism in (self.smashed_mechanism, self.output_gradient_mechanism))

    def smashed(
        self,
        smashed_BTD: Tensor,
        *,
        records: Sequence[str],
        round: int,
        place: Place,
        is_real_B: Tensor | None = None,
    ) -> Tensor:
        """Release smashed data.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        if is_real_B is not None:
            smashed_BTD = smashed_BTD * is_real_B[:, None, None].to(smashed_BTD.dtype)
        if self.sampling is None or place.kind is not Kind.TRAIN:
            self._charge("smashed", self.smashed_mechanism, smashed_BTD, records, round, place, self.bottom_trains)
        elif place.micro_batch == 0:
            self._charge_step(smashed_BTD.shape[1], round, place.step)
        return self.smashed_mechanism.release(smashed_BTD)

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Release an output gradient.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        mechanism = self.output_gradient_mechanism
        if self.sampling is None:
            self._charge("output_gradient", mechanism, gradient_BTD, records, round, place, self.top_trains)
        return mechanism.release(gradient_BTD)

    def adapter_gradient(
        self, sums: Mapping[str, Tensor], *, records: Sequence[str], round: int, step: int
    ) -> dict[str, Tensor]:
        """Release a step's gradient of the device's own adapters.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has changed then.
            LedgerError: If the charge cannot be written.
        """
        assert self.per_example is not None
        if self.sampling is None:
            self.ledger.charge(
                "adapter",
                noise_multiplier=self.per_example.noise_multiplier,
                records=records,
                sequences=len(records),
                run=self.run,
                round=round,
                step=step,
                coupled=False,
            )
        return self.per_example.release(sums)

    def adapter_update(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, round: int
    ) -> dict[str, Tensor]:
        """Release the device's adapters at a round's end.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        if self.per_example is not None or not (self.bottom_trains or self.top_trains):
            return dict(after)  # made of releases that are charged, or of nothing that was trained here
        noise_multiplier = self.update.noise_multiplier if self.update is not None else 0.0
        self.ledger.charge(
            "adapter",
            noise_multiplier=noise_multiplier,
            unit="client" if self.update is not None else "sequence",
            records=[],
            sequences=1,
            run=self.run,
            round=round,
            step=0,
        )
        return dict(after) if self.update is None else self.update.release(before, after)

    def _charge(
        self,
        channel: str,
        mechanism: Mechanism,
        x_BTD: Tensor,
        records: Sequence[str],
        round: int,
        place: Place,
        segment_trains: bool,
    ) -> None:
        if not _is_noisy(mechanism):
            if (channel, round) in self._unprotected:
                return
            self._unprotected.add((channel, round))
        self.ledger.charge(
            channel,
            noise_multiplier=mechanism.noise_multiplier,
            records=records,
            sequences=len(x_BTD),
            run=self.run,
            round=round,
            step=place.step,
            kind=place.kind.value,
            coupled=segment_trains and self.per_example is None,
            unit=mechanism.unit,
            units=mechanism.units(x_BTD.shape[1]),
            eta=getattr(mechanism, "eta", None),
        )

    def _charge_step(self, tokens: int, round: int, step: int) -> None:
        """Charge all channels of a step at once, before the first of it leaves."""
        assert self.sampling is not None
        mechanisms = {"smashed": self.smashed_mechanism, "output_gradient": self.output_gradient_mechanism}
        signals = {
            channel: mechanism.units(tokens) / mechanism.noise_multiplier**2
            for channel, mechanism in mechanisms.items()
        }
        if self.per_example is not None and (self.bottom_trains or self.top_trains):
            signals["adapter"] = 1 / self.per_example.noise_multiplier**2
        self.ledger.charge_all(
            [
                Charge(
                    channel="step",
                    noise_multiplier=sum(signals.values()) ** -0.5,
                    channels={channel: signal**-0.5 for channel, signal in signals.items()},  # type: ignore[misc]
                    records=(),
                    sequences=1,
                    run=self.run,
                    round=round,
                    step=step,
                    coupled=False,
                    sample_rate=self.sampling.sample_rate,
                    overflow=self.sampling.overflow,
                )
            ]
        )


def _is_noisy(mechanism: Mechanism) -> bool:
    return mechanism.noise_multiplier > 0 or isinstance(mechanism, MetricMechanism)
