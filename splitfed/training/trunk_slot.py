"""A client's place in a round on the trunk's side: what it may ask next, and what waits for its backward."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from splitfed.errors import ProtocolError
from splitfed.models import Segment
from splitfed.privacy.denoise import Denoiser
from splitfed.training.trunk_adapter import TrunkAdapter


@dataclass(frozen=True)
class TrunkForward:
    """What a client asks of the trunk's forward.

    Attributes:
        slot: Name of its slot.
        step: Local step, from 0.
        micro_batch: Index in the step, from 0.
        smashed_BTD: Smashed data, shape [B, T, D].
        attention_mask_BT: 1 for real positions, shape [B, T]; none: all are.
        position_ids_BT: Positions, shape [B, T]; none: counted from 0.
        trains: A backward is to follow.
        wants_smashed_gradient: The backward is to return the smashed gradient.
    """

    slot: str
    step: int
    micro_batch: int
    smashed_BTD: Tensor
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    trains: bool = True
    wants_smashed_gradient: bool = False


@dataclass(frozen=True)
class TrunkBackward:
    """What a client asks of the trunk's backward.

    Attributes:
        slot: Name of its slot.
        step: Local step of the forward.
        micro_batch: Micro-batch of the forward.
        output_gradient_BTD: Gradient of the client's loss at the trunk output, shape [B, T, D].
        share: What the client's gradient counts for in a joint step; its smashed gradient is that of its own loss.
    """

    slot: str
    step: int
    micro_batch: int
    output_gradient_BTD: Tensor
    share: float = 1.0


@dataclass
class Pending:
    """A forward that waits for its backward.

    Attributes:
        tensors: The adapter that it was computed with.
        smashed_BTD: What entered the trunk.
        output_BTD: What came out, with its graph.
        together: Number of the pass that it was computed in, with others or alone.
    """

    tensors: dict[str, Tensor]
    smashed_BTD: Tensor
    output_BTD: Tensor
    together: int


@dataclass
class Slot:
    """One client's place in a round.

    Attributes:
        client: Name of the client.
        round: The round, from 1.
        trunk: The blocks that it asks for.
        adapter: The adapter that it trains, its own or a shared one.
        gradients: Where its backwards are gathered, by whole-model name.
        local_steps: Steps of a round.
        max_in_flight: Most forwards that may wait for their backward.
        denoiser: What takes noise away at the trunk's entrance.
        residual: The frozen adapter under that, by the trunk's own names; empty: what the trunk holds.
        steps: Local steps that were applied.
        version: The adapter's at the first forward of the step that is on its way.
        pending: Forwards that wait, by step and micro-batch.
    """

    client: str
    round: int
    trunk: Segment
    adapter: TrunkAdapter
    gradients: dict[str, Tensor]
    local_steps: int
    max_in_flight: int
    denoiser: Denoiser | None = None
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    version: int = 0
    pending: dict[tuple[int, int], Pending] = field(default_factory=dict)

    @property
    def is_amid_step(self) -> bool:
        """The next step has begun."""
        return bool(self.pending or self.gradients)

    @property
    def step_in_run(self) -> int:
        """Local steps before the next one, in all rounds."""
        return (self.round - 1) * self.local_steps + self.steps

    def check_forward(self, call: TrunkForward) -> None:
        """Refuse a forward for training that is not due.

        Raises:
            ProtocolError: If the step is not the next one, the micro-batch is already in flight, or too many are.
        """
        if call.step != self.steps:
            raise ProtocolError(f"Client {self.client!r} sent step {call.step}; the next one is {self.steps}.")
        if call.step >= self.local_steps:
            raise ProtocolError(f"Client {self.client!r} sent step {call.step} of a round of {self.local_steps} steps.")
        if (call.step, call.micro_batch) in self.pending:
            raise ProtocolError(
                f"Client {self.client!r} sent micro-batch {call.micro_batch} of step {call.step} twice."
            )
        if len(self.pending) >= self.max_in_flight:
            raise ProtocolError(
                f"Client {self.client!r} has {len(self.pending)} micro-batches in flight; the run allows "
                f"{self.max_in_flight}."
            )

    def check_backward(self, call: TrunkBackward) -> None:
        """Refuse a backward that does not belong to a forward.

        Raises:
            ProtocolError: If there is no such forward, or its shape differs.
        """
        pending = self.pending.get((call.step, call.micro_batch))
        if pending is None:
            raise ProtocolError(
                f"A backward of step {call.step}, micro-batch {call.micro_batch}, came from {self.client!r} without "
                "its forward."
            )
        if call.output_gradient_BTD.shape != pending.output_BTD.shape:
            raise ProtocolError(
                f"The output gradient has shape {list(call.output_gradient_BTD.shape)}, the trunk output "
                f"{list(pending.output_BTD.shape)}."
            )

    def check_step(self, step: int) -> None:
        """Refuse a step that is not due.

        Raises:
            ProtocolError: If it is not the next step, or forwards wait for their backwards.
        """
        if step != self.steps or self.pending:
            raise ProtocolError(
                f"{self.client!r} asked to apply step {step}; the next is {self.steps}, with {len(self.pending)} "
                "micro-batches still waiting for their backward."
            )
