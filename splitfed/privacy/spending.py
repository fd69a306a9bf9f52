"""What has been spent: charges, and how they add up for the record that is worst off."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from splitfed.privacy.accounting import MAX_SQUARED_SIGNAL, epsilon, squared_signal

Channel = Literal["smashed", "output_gradient", "adapter", "loss"]
"""What leaves the device and carries information."""

CHANNELS: Final[tuple[Channel, ...]] = ("smashed", "output_gradient", "adapter", "loss")

_WORDS: Final[dict[Channel, str]] = {
    "smashed": "the smashed data",
    "output_gradient": "the output gradient",
    "adapter": "the adapter update",
    "loss": "the shared loss",
}


class Charge(BaseModel):
    """Some releases of one channel that leave together, each with the same noise.

    Raises:
        ValueError: If a field is missing, unknown, of another type or outside its range, or more records are named than
            sequences are released.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    channel: Channel
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Standard deviation of the noise ÷ sensitivity; 0 = unprotected."""
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

    @model_validator(mode="after")
    def _one_record_a_sequence(self) -> "Charge":
        if len(self.records) > self.sequences:
            raise ValueError(
                f"{self.sequences} sequences hold {len(self.records)} records; a sequence holds one at most."
            )
        return self


class Spending:
    """Adds charges up, for the record that is worst off.

    A coupled release may depend on every record, so it counts for every record, those included that were not used yet.
    An uncoupled one counts for its own records only.

    Guarantees:
        * No record's releases cost more than ``epsilon`` says.
        * The figure never falls when a charge is added, and does not depend on the order of charges.
        * Its cost does not grow with the number of charges, only with that of distinct noise multipliers.
    """

    def __init__(self) -> None:
        self._shared: dict[Channel, Counter[float]] = {channel: Counter() for channel in CHANNELS}
        self._own: dict[Channel, dict[str, Counter[float]]] = {channel: {} for channel in CHANNELS}
        self._heaviest: dict[Channel, Counter[float]] = {channel: Counter() for channel in CHANNELS}

    def add(self, charge: Charge) -> None:
        """Count a charge."""
        if charge.coupled:
            self._shared[charge.channel][charge.noise_multiplier] += charge.sequences
            return
        own = self._own[charge.channel]
        for record in charge.records:
            counts = own.setdefault(record, Counter())
            counts[charge.noise_multiplier] += 1
            if squared_signal(counts.items()) > squared_signal(self._heaviest[charge.channel].items()):
                self._heaviest[charge.channel] = counts

    def epsilon(self, channel: str, delta: float) -> float | None:
        """Give what the releases of a channel cost the record that is worst off.

        Args:
            channel: The channel.
            delta: The delta to state epsilon at.

        Returns:
            Epsilon under replace-one of a record; 0 before the first release; None if nothing is guaranteed.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        return epsilon(self._counts(channel).items(), delta)

    def epsilon_after(self, charges: Iterable[Charge], channel: str, delta: float) -> float | None:
        """Give what it would cost if some charges were added: exactly for coupled ones, at least that for others.

        Uncoupled charges are taken to fall on the record that is worst off.

        Args:
            charges: What would be added; charges of other channels do not count.
            channel: The channel.
            delta: The delta to state epsilon at.

        Returns:
            As ``epsilon``.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        counts = self._counts(channel)
        for charge in charges:
            if charge.channel == channel:
                most = max(Counter(charge.records).values(), default=0)
                counts[charge.noise_multiplier] += charge.sequences if charge.coupled else most
        return epsilon(counts.items(), delta)

    def unprotected(self) -> tuple[Channel, ...]:
        """Name the channels with nothing guaranteed; the adapter update has no mechanism and is always among them."""
        return tuple(
            channel
            for channel in CHANNELS
            if channel == "adapter" or squared_signal(self._counts(channel).items()) > MAX_SQUARED_SIGNAL
        )

    def _counts(self, channel: str) -> Counter[float]:
        """Give releases by noise multiplier, for the record that is worst off."""
        for known in CHANNELS:
            if channel == known:
                return self._shared[known] + self._heaviest[known]
        raise ValueError(f"There is no channel {channel!r}; choose one of {', '.join(CHANNELS)}.")


def total_statement(unprotected: Iterable[Channel]) -> str:
    """Say what is guaranteed over all channels together, given those with no guarantee of their own."""
    words = [_WORDS[channel] for channel in CHANNELS if channel in set(unprotected)]
    if not words:
        raise ValueError("No channel is unprotected, and epsilon over several channels is not stated.")
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"none: {listed} {'is' if len(words) == 1 else 'are'} not protected"
