"""What may leave a device, and in which form: the one gate that smashed data, output gradients and adapters pass."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from torch import Tensor

from splitfed.errors import PrivacyError
from splitfed.privacy import (
    Channel,
    Charge,
    Ledger,
    Mechanism,
    MetricMechanism,
    PerExampleMechanism,
    StepSampling,
    UpdateMechanism,
)
from splitfed.training.link import Kind, Place

_Vectors = Literal["smashed", "output_gradient"]
_VECTORS: Final[tuple[_Vectors, ...]] = ("smashed", "output_gradient")


class Releases(Protocol):
    """Turns what a device computed into what it sends."""

    @property
    def is_noisy(self) -> bool:
        """Noise is on: shapes, masks and weights must then say nothing about the text either."""

    @property
    def noises_adapter(self) -> bool:
        """Adapters of bottom and top leave with noise, on every step's gradient or on the update."""

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

    def step_gradient(self, gradients: Mapping[str, Tensor], *, round: int) -> dict[str, Tensor]:
        """Give the form of a step's gradients that leaves where bottom and top are merged at every step.

        Args:
            gradients: What the optimiser would apply, by whole-model name.
            round: The round, from 1.
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
    noises_adapter = False
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

    def step_gradient(self, gradients: Mapping[str, Tensor], *, round: int) -> dict[str, Tensor]:
        """Return the gradients."""
        return dict(gradients)

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
    def noises_adapter(self) -> bool:
        """Adapters of bottom and top leave with noise, on every step's gradient or on the update."""
        return self.per_example is not None or self.update is not None

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
        B, T, _ = smashed_BTD.shape
        if self.sampling is None or place.kind is not Kind.TRAIN:
            self._charge_vectors("smashed", records, B, T, round, place)
        elif place.micro_batch == 0:
            self.ledger.charge_all([self._sampled_step(T, round, place.step)])  # all that it releases, before the first
        return self.smashed_mechanism.release(smashed_BTD)

    def output_gradient(self, gradient_BTD: Tensor, *, records: Sequence[str], round: int, place: Place) -> Tensor:
        """Release an output gradient.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        if self.sampling is None:
            B, T, _ = gradient_BTD.shape
            self._charge_vectors("output_gradient", records, B, T, round, place)
        return self.output_gradient_mechanism.release(gradient_BTD)

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
            self.ledger.charge_all([self._gradient_step(records, round, step)])
        return self.per_example.release(sums)

    def step_gradient(self, gradients: Mapping[str, Tensor], *, round: int) -> dict[str, Tensor]:
        """Release a step's gradients to be merged with others': under DP-SGD they have been charged, and hold noise.

        Raises:
            PrivacyError: If noise is to come on the update as a whole: it would come too late.
            LedgerError: If the charge cannot be written.
        """
        if self.update is not None:
            raise PrivacyError(
                "A step's gradient would leave without noise: privacy.adapter = \"update\" protects a whole round's "
                'update; set adapter = "dp-sgd", or federation.merge_ends = "round".'
            )
        self._charge_update(round)
        return dict(gradients)

    def adapter_update(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, round: int
    ) -> dict[str, Tensor]:
        """Release the device's adapters at a round's end.

        Raises:
            BudgetExhausted: If the release would cross the budget; nothing has left then.
            LedgerError: If the charge cannot be written.
        """
        self._charge_update(round)
        return dict(after) if self.update is None else self.update.release(before, after)

    def planned_round(
        self, steps: Sequence[Sequence[str]], held_out: Sequence[str], *, tokens: int, round: int
    ) -> list[Charge]:
        """Foresee what a round will charge.

        Args:
            steps: The records of each local step; where examples are drawn in secret only their number counts.
            held_out: The records of the evaluation.
            tokens: The run's T.
            round: The round, from 1.
        """
        planned = []
        for step, records in enumerate(steps):
            place = Place(step, 0)
            if self.sampling is not None:
                planned.append(self._sampled_step(tokens, round, step))
                continue
            for channel in _VECTORS:
                planned.append(self._vectors(channel, records, len(records), tokens, round, place))
            if self.per_example is not None:
                planned.append(self._gradient_step(records, round, step))
        if held_out:
            evaluation = Place(0, 0, Kind.EVALUATE)
            planned.append(self._vectors("smashed", held_out, len(held_out), tokens, round, evaluation))
        return planned + self._update(round)

    def _charge_vectors(
        self, channel: _Vectors, records: Sequence[str], sequences: int, tokens: int, round: int, place: Place
    ) -> None:
        if not _is_noisy(self._mechanism(channel)):
            if (channel, round) in self._unprotected:
                return
            self._unprotected.add((channel, round))
        self.ledger.charge_all([self._vectors(channel, records, sequences, tokens, round, place)])

    def _charge_update(self, round: int) -> None:
        if self.update is None:
            if ("adapter", round) in self._unprotected:
                return
            self._unprotected.add(("adapter", round))
        self.ledger.charge_all(self._update(round))

    def _mechanism(self, channel: _Vectors) -> Mechanism:
        return self.smashed_mechanism if channel == "smashed" else self.output_gradient_mechanism

    def _vectors(
        self, channel: _Vectors, records: Sequence[str], sequences: int, tokens: int, round: int, place: Place
    ) -> Charge:
        """Charge hidden vectors."""
        mechanism = self._mechanism(channel)
        segment_trains = self.bottom_trains if channel == "smashed" else self.top_trains
        return Charge(
            channel=channel,
            noise_multiplier=mechanism.noise_multiplier,
            unit=mechanism.unit,
            units=mechanism.units(tokens),
            eta=getattr(mechanism, "eta", None),
            records=tuple(records),
            sequences=sequences,
            run=self.run,
            round=round,
            step=place.step,
            kind=place.kind.value,
            coupled=segment_trains and self.per_example is None,
        )

    def _gradient_step(self, records: Sequence[str], round: int, step: int) -> Charge:
        """Charge a step of DP-SGD.

        Sequences of one record add up in the sum: k of them move it k times as far, which costs k² releases.
        """
        assert self.per_example is not None
        charged = tuple(record for record, k in Counter(records).items() for _ in range(k * k))
        return Charge(
            channel="adapter",
            noise_multiplier=self.per_example.noise_multiplier,
            records=charged,
            sequences=len(charged),
            run=self.run,
            round=round,
            step=step,
            coupled=False,
        )

    def _sampled_step(self, tokens: int, round: int, step: int) -> Charge:
        """Charge everything of a step whose examples are drawn in secret."""
        assert self.sampling is not None
        signals: dict[Channel, float] = {
            channel: self._mechanism(channel).units(tokens) / self._mechanism(channel).noise_multiplier ** 2
            for channel in _VECTORS
        }
        if self.per_example is not None:
            signals["adapter"] = 1 / self.per_example.noise_multiplier**2
        return Charge(
            channel="step",
            noise_multiplier=sum(signals.values()) ** -0.5,
            channels={channel: signal**-0.5 for channel, signal in signals.items()},
            records=(),
            sequences=1,
            run=self.run,
            round=round,
            step=step,
            coupled=False,
            sample_rate=self.sampling.sample_rate,
            overflow=self.sampling.overflow,
        )

    def _update(self, round: int) -> list[Charge]:
        """Charge the adapters that leave, unless they are made of what is charged, or of nothing trained here."""
        if self.per_example is not None or not (self.bottom_trains or self.top_trains):
            return []
        return [
            Charge(
                channel="adapter",
                noise_multiplier=0.0 if self.update is None else self.update.noise_multiplier,
                unit="sequence" if self.update is None else "client",
                records=(),
                sequences=1,
                run=self.run,
                round=round,
                step=0,
            )
        ]


def _is_noisy(mechanism: Mechanism) -> bool:
    return mechanism.noise_multiplier > 0 or isinstance(mechanism, MetricMechanism)
