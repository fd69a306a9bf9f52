"""What has been spent: charges, and how they add up for the record that is worst off."""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from splitfed.privacy.accounting import Composition, squared_signal
from splitfed.privacy.figures import format_epsilon
from splitfed.privacy.mechanisms import RELATION, UNIT, Unit

Channel = Literal["smashed", "output_gradient", "adapter", "loss"]
"""What leaves the device and carries information."""

CHANNELS: Final[tuple[Channel, ...]] = ("smashed", "output_gradient", "adapter", "loss")

WORDS: Final[dict[Channel, str]] = {
    "smashed": "the smashed data",
    "output_gradient": "the output gradient",
    "adapter": "the adapter update",
    "loss": "the shared loss",
}

NoiseMultiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Charge(BaseModel):
    """Some releases that leave together, each with the same noise.

    Raises:
        ValueError: If a field is missing, unknown, of another type or outside its range, or more records are named than
            sequences are released.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    channel: Literal["smashed", "output_gradient", "adapter", "loss", "step"]
    """What leaves; "step" = everything of one local step whose examples were drawn in secret."""
    noise_multiplier: NoiseMultiplier
    """Standard deviation of the noise ÷ sensitivity for one unit; 0 = no epsilon is guaranteed."""
    unit: Unit = UNIT
    """Who is protected by it."""
    units: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Squared signal of a sequence ÷ that of one unit: above 1 where the unit is a token."""
    eta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Metric privacy: a release guarantees eta · distance, and no epsilon."""
    records: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...]
    """The record of each sequence, by its salted hash; a record of k sequences stands here k times."""
    sequences: Annotated[int, Field(ge=1, lt=2**31)]
    """Releases; more than ``records`` where some of them hold no record."""
    run: str
    round: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    kind: Literal["train", "evaluate", "generate"] = "train"
    coupled: bool = True
    """Whether what is released may depend on every record: it does as soon as adapters were trained on raw records."""
    sample_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of a "step": the probability with which each example was drawn."""
    overflow: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of a "step": the probability that more were drawn than fit."""
    channels: dict[Channel, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Of a "step": the noise multiplier of each channel; ``noise_multiplier`` is that of all together."""

    @model_validator(mode="after")
    def _is_one_kind_of_charge(self) -> Self:
        if len(self.records) > self.sequences:
            raise ValueError(
                f"{self.sequences} sequences hold {len(self.records)} records; a sequence holds one at most."
            )
        is_step = self.channel == "step"
        if is_step != (self.sample_rate is not None) or is_step != bool(self.channels):
            raise ValueError("A charge with a sample rate is a step with a noise multiplier for each of its channels.")
        if is_step and (self.coupled or not self.noise_multiplier or self.unit != UNIT):
            raise ValueError("Only a step under noise that depends on nothing but its own examples is a sampled one.")
        return self

    def signal(self, *, per_token: bool = False) -> float:
        """Give 1/z² of one release for a sequence, or for one of its tokens; infinite if no epsilon is guaranteed."""
        if self.noise_multiplier == 0:
            return math.inf
        is_token = per_token and self.unit == "token"
        return squared_signal([(self.noise_multiplier, 1)]) * (1.0 if is_token else self.units)


@dataclass
class _Account:
    """What releases have cost, for the record that is worst off.

    A coupled release may depend on every record, so it counts for every record, those included that were not used yet.
    An uncoupled one counts for its own records only; of a sampled step each record may be one.
    """

    shared: Counter[float] = field(default_factory=Counter)
    """Releases by squared signal."""
    own: dict[str, float] = field(default_factory=dict)
    heaviest: float = 0.0
    sampled: Counter[tuple[float, float]] = field(default_factory=Counter)
    overflow: float = 0.0

    def add(self, charge: Charge, signal: float) -> None:
        if charge.sample_rate is not None:
            self.sampled[charge.sample_rate, signal] += 1
            self.overflow += charge.overflow
        elif charge.coupled:
            self.shared[signal] += charge.sequences
        else:
            for record in charge.records:
                self.own[record] = self.own.get(record, 0.0) + signal
                self.heaviest = max(self.heaviest, self.own[record])

    def after(self, charges: Iterable[tuple[Charge, float]]) -> Composition:
        """Compose with charges added."""
        shared, sampled, overflow = self.shared.copy(), self.sampled.copy(), self.overflow
        added: dict[str, float] = {}
        for charge, signal in charges:
            if charge.sample_rate is not None:
                sampled[charge.sample_rate, signal] += 1
                overflow += charge.overflow
            elif charge.coupled:
                shared[signal] += charge.sequences
            else:
                for record in charge.records:
                    added[record] = added.get(record, 0.0) + signal
        heaviest = max((self.own.get(record, 0.0) + signal for record, signal in added.items()), default=0.0)
        return Composition(
            max(self.heaviest, heaviest),
            sampled,
            min(overflow, 1.0),
            math.fsum(signal * count for signal, count in shared.items()),
        )


_Accounts = dict[Channel | None, _Account]


class Spending:
    """Adds charges up, for the record that is worst off: by channel, and over all channels.

    The channels of a step are one Gaussian release together, so their squared signals add up, and so do those of steps,
    rounds and runs.

    Guarantees:
        * No record's releases cost more than ``epsilon`` says.
        * The figure never falls when a charge is added, and does not depend on the order of charges, up to float64
          rounding.
        * Its cost does not grow with the number of charges, only with that of records and distinct noise multipliers.
    """

    def __init__(self) -> None:
        self._sequences: _Accounts = {channel: _Account() for channel in (*CHANNELS, None)}
        self._tokens: _Accounts | None = None  # the same as for sequences until a mechanism protects tokens
        self._eta: dict[Channel, _Account] = {channel: _Account() for channel in CHANNELS}
        self._units: dict[Channel, set[Unit]] = {channel: set() for channel in CHANNELS}

    def add(self, charge: Charge) -> None:
        """Count a charge."""
        if charge.unit == "token" and self._tokens is None:
            self._tokens = copy.deepcopy(self._sequences)
        for accounts, per_token in ((self._sequences, False), (self._tokens, True)):
            for channel, signal in _signals(charge, per_token=per_token):
                if accounts is not None:
                    accounts[channel].add(charge, signal)
        for channel in _channels(charge):
            self._units[channel].add(charge.unit)
            if charge.eta is not None:
                self._eta[channel].add(charge, charge.eta)

    def epsilon(
        self, channel: str | None, delta: float, *, unit: Unit = UNIT, relation: str = RELATION
    ) -> float | None:
        """Give what is charged to a channel for the record that is worst off; what holds is that of all together.

        Args:
            channel: The channel; None = all of them together.
            delta: The delta to state epsilon at.
            unit: Whose epsilon: a sequence's, or that of one of its tokens.
            relation: The neighbouring relation.

        Returns:
            Epsilon; 0 before the first release; None if nothing is guaranteed.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        return self.epsilon_after((), channel, delta, unit=unit, relation=relation)

    def epsilon_after(
        self,
        charges: Iterable[Charge],
        channel: str | None,
        delta: float,
        *,
        unit: Unit = UNIT,
        relation: str = RELATION,
    ) -> float | None:
        """Give what it would cost if some charges were added.

        Args:
            charges: What would be added; charges of other channels do not count.
            channel: The channel; None = all of them together.
            delta: The delta to state epsilon at.
            unit: Whose epsilon.
            relation: The neighbouring relation.

        Returns:
            As ``epsilon``.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        if channel is not None and channel not in CHANNELS:
            raise ValueError(f"There is no channel {channel!r}; choose one of {', '.join(CHANNELS)}.")
        accounts = (self._tokens if unit == "token" else None) or self._sequences
        added = [
            (charge, signal)
            for charge in charges
            for key, signal in _signals(charge, per_token=unit == "token")
            if key == channel
        ]
        return accounts[channel].after(added).epsilon(delta, relation)

    def eta(self, channel: Channel) -> float | None:
        """Give the metric guarantee of a channel, eta summed over releases of the worst record; None without one."""
        account = self._eta[channel]
        spent = account.after(())
        return spent.signal + spent.coupled or None

    def units(self, channel: Channel) -> set[Unit]:
        """Say which units the mechanisms of a channel protected."""
        return self._units[channel]

    def unprotected(self) -> tuple[Channel, ...]:
        """Name the channels that have released something with no epsilon."""
        return tuple(channel for channel in CHANNELS if self._sequences[channel].after(()).epsilon(0.5) is None)

    def total_statement(self, delta: float, *, relation: str = RELATION) -> str:
        """Say what is guaranteed over all channels together.

        Args:
            delta: The delta to state epsilon at.
            relation: The neighbouring relation.
        """
        without = self.unprotected()
        if without:
            words = [
                WORDS[channel]
                if self.eta(channel) is None
                else f"{WORDS[channel]} (metric privacy only: {self.eta(channel):.4g} · distance)"
                for channel in without
            ]
            listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
            return f"none: {listed} {'is' if len(words) == 1 else 'are'} not protected"
        value = self.epsilon(None, delta, relation=relation)
        if value is None:
            return "none: too little noise"
        return f"epsilon {format_epsilon(value)} at delta {delta:g}, unit {UNIT}, relation {relation}"


def _channels(charge: Charge) -> Iterable[Channel]:
    return (charge.channels or {}) if charge.channel == "step" else (charge.channel,)


def _signals(charge: Charge, *, per_token: bool) -> list[tuple[Channel | None, float]]:
    """Give the squared signal that a charge adds to each channel, and to all together (None)."""
    together = charge.signal(per_token=per_token)
    if charge.channel == "step":
        each = {channel: squared_signal([(z, 1)]) for channel, z in (charge.channels or {}).items()}
        return [(None, together), *each.items()]
    return [(None, together), (charge.channel, together)]
