"""Where a model is cut and what a step on it consists of: the questions that a cost is the answer to."""

from dataclasses import dataclass, field
from typing import Self

from splitfed.config import CodecSection, RunConfig
from splitfed.federation import trained_factors
from splitfed.models import LoraSettings
from splitfed.training.setup import lora_settings

_BOTH = frozenset({"A", "B"})


@dataclass(frozen=True)
class SplitPoint:
    """How many blocks an agent holds at each end."""

    bottom_blocks: int
    top_blocks: int


@dataclass(frozen=True)
class Workload:
    """What a local step consists of.

    Attributes:
        batch_size: Sequences of a local step.
        micro_batch_size: Sequences that cross the wire at once; None: all of them.
        tokens: T; every sequence is taken to be this long.
        max_in_flight: Micro-batches on their way at the same time.
        local_steps: Steps of a round.
        lora: Size and place of the adapter.
        codecs: A codec for each direction.
        is_noisy: Whether noise comes on what crosses the wire.
        is_per_example: Whether the agent clips each example's own gradient (DP-SGD).
        trained_factors: Factors of the adapter that are trained: "A", "B".
    """

    batch_size: int = 8
    micro_batch_size: int | None = None
    tokens: int = 128
    max_in_flight: int = 2
    local_steps: int = 20
    lora: LoraSettings = field(default_factory=LoraSettings)
    codecs: CodecSection = field(default_factory=CodecSection)
    is_noisy: bool = False
    is_per_example: bool = False
    trained_factors: frozenset[str] = _BOTH

    def __post_init__(self) -> None:
        numbers = {
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "max_in_flight": self.max_in_flight,
            "local_steps": self.local_steps,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} is {number}; give 1 or more.")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, which does not divide batch_size = {self.batch_size}; "
                "choose a divisor."
            )

    @classmethod
    def of(cls, run: RunConfig) -> Self:
        """Give what a run asks for, in its first round.

        Args:
            run: The run's configuration, or what a server's file gives as ``shared()``.
        """
        training = run.training
        return cls(
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size,
            tokens=training.max_tokens,
            max_in_flight=training.max_in_flight,
            local_steps=training.local_steps,
            lora=lora_settings(run.lora),
            codecs=run.codecs,
            is_noisy=run.privacy.is_on,
            is_per_example=run.privacy.is_on and run.privacy.adapter == "dp-sgd",
            trained_factors=frozenset(trained_factors(run.rule.lora or "factors", 1)),
        )

    @property
    def sequences(self) -> int:
        """B, sequences of a micro-batch."""
        return self.micro_batch_size or self.batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.batch_size // self.sequences
