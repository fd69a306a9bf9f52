"""What came of a simulated run."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from splitfed.config import LoraSection
from splitfed.models import export_adapter
from splitfed.training.link import Traffic
from splitfed.training.setup import lora_settings


@dataclass
class Simulation:
    """What came of a run.

    Attributes:
        lora: Size and place of the adapter.
        adapter: The whole model's adapter, by whole-model name.
        losses: Mean loss per token of every local step, by client, over all rounds it took part in.
        traffic: What crossed each client's link, without the adapters.
        personal: What clients kept to themselves of their adapters, by client.
        refused: Whose update a round went on without and why, by round and client; only rounds with one.
        notes: Figures of each round's aggregation.
        oldest_step: Largest number of others' steps between the forward of a step and itself ("async").
    """

    lora: LoraSection
    adapter: dict[str, Tensor]
    losses: dict[str, list[float]] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    personal: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[int, dict[str, str]] = field(default_factory=dict)
    notes: list[dict[str, float]] = field(default_factory=list)
    oldest_step: int = 0

    def export(self, folder: str | Path, *, base: str | Path) -> None:
        """Write the adapter as one that ``PeftModel.from_pretrained(base, folder)`` loads.

        Args:
            folder: Where to write it; it may exist.
            base: Folder of the base model.
        """
        export_adapter(
            Path(folder), self.adapter, lora_settings(self.lora), base_folder=Path(base), base_name=str(base)
        )
