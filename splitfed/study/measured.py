"""What was measured on a run's result from outside, with stock libraries, and handed to the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BeforeAfter:
    """What was measured on the base model, and on the base model with an exported adapter. None = not measured."""

    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    prompt: str = ""
    sample_before: str | None = None
    """What the base model wrote after the prompt."""
    sample_after: str | None = None
    """What it wrote with the adapter."""
    held_out_loss_by_round: Mapping[int, float] = field(default_factory=dict)
    """Held-out loss with each round's adapter; shown in place of what the agents say of their own held-out text."""
