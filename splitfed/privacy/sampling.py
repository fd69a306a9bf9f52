"""How a step draws its examples in secret: what the accounting has to know of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSampling:
    """Poisson sampling of every step's examples, in secret.

    Attributes:
        sample_rate: Probability with which each example is drawn, between 0 and 1.
        overflow: Probability that a step draws more than its batch holds.

    Raises:
        ValueError: If one of them is outside its range.
    """

    sample_rate: float
    overflow: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate < 1:
            raise ValueError(f"A sample rate lies between 0 and 1, both excluded, not {self.sample_rate}.")
        if not 0 <= self.overflow <= 1:
            raise ValueError(f"A probability lies between 0 and 1, not {self.overflow}.")
