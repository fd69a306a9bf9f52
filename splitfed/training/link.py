"""What an agent asks of a server: the seam between the client step and wherever the trunk runs.

Two implementations pass one contract: `InProcessLink` here, and the gRPC link of `splitfed.transport`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeVar

from torch import Tensor

from splitfed.compress import Codec, get_codec
from splitfed.config import CodecSection
from splitfed.training.barrier import settle
from splitfed.training.together import TrunkCalls
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward

T = TypeVar("T")
R = TypeVar("R")


class Kind(Enum):
    """What a forward is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    GENERATE = "generate"


@dataclass(frozen=True)
class Place:
    """Where a micro-batch stands in a round: its local step, its index in the step, and what it is for."""

    step: int
    micro_batch: int
    kind: Kind = Kind.TRAIN


@dataclass
class Traffic:
    """What crossed the link, framing included, and how long it was waited for, as the agent counts it.

    Attributes:
        sent_bytes: From agent to server.
        received_bytes: From server to agent.
        waited_s: Seconds in which the agent did nothing but wait for an answer.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    waited_s: float = field(default=0.0, compare=False)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in which there is nothing to do but wait."""
        since_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - since_s


class Link(Protocol):
    """One client's side of one round.

    Calls are answered in their order; several may be open at once. A future raises `LinkError` when the round is lost.
    """

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""

    def forward(
        self,
        place: Place,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        wants_smashed_gradient: bool = False,
        step_tokens: int = 0,
    ) -> Future[Tensor]:
        """Ask for the trunk output, shape [B, T, D], of smashed data of that shape.

        ``step_tokens`` is what the loss of the whole step is divided by: what this client counts for in a joint step.
        """

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        """Send the output gradient back; the future holds the smashed gradient if the forward asked for it."""

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        """Apply the gradients that the trunk has gathered for this local step.

        Args:
            step: The local step.
            squared_norm: Squared L2 norm of the gradients on the agent, where one norm is taken over all segments.

        Returns:
            The squared norm of the step's gradients, with the given one.
        """

    def mean_gradient(self, step: int, gradients: Mapping[str, Tensor], *, tokens: int) -> Future[dict[str, Tensor]]:
        """Ask for the mean of the cohort's gradients of bottom and top, where they are merged at every step.

        Args:
            step: The local step.
            gradients: The client's own, by whole-model name.
            tokens: What they count for.
        """


@dataclass(frozen=True)
class LinkCodecs:
    """A codec for each direction of a link.

    Attributes:
        smashed: Smashed data, agent to server.
        trunk_output: Trunk output, server to agent.
        output_gradient: Output gradient, agent to server.
        smashed_gradient: Smashed gradient, server to agent.
    """

    smashed: Codec
    trunk_output: Codec
    output_gradient: Codec
    smashed_gradient: Codec


def cross(tensor: Tensor, codec: Codec) -> tuple[Tensor, int]:
    """Encode and decode a tensor as a wire would.

    Returns:
        The tensor as the other side has it, and the bytes of its payload.
    """
    payload = codec.encode(tensor)
    return codec.decode(payload, tuple(tensor.shape), tensor.dtype), len(payload)


@dataclass
class InProcessLink:
    """The link without a wire: the trunk is in this process, the codecs are the real ones.

    Attributes:
        calls: What runs the trunk.
        slot: The slot that is used; it must be open.
        codecs: A codec for each direction.
        traffic: Payload bytes, with no framing.
    """

    calls: TrunkCalls
    slot: str
    codecs: LinkCodecs
    traffic: Traffic = field(default_factory=Traffic)

    def forward(
        self,
        place: Place,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        wants_smashed_gradient: bool = False,
        step_tokens: int = 0,
    ) -> Future[Tensor]:
        """Run the trunk, or wait for those that it is run together with."""
        call = TrunkForward(
            self.slot,
            place.step,
            place.micro_batch,
            self._send(smashed_BTD, self.codecs.smashed),
            attention_mask_BT=attention_mask_BT,
            position_ids_BT=position_ids_BT,
            trains=place.kind is Kind.TRAIN,
            wants_smashed_gradient=wants_smashed_gradient,
        )
        output = self.calls.forward(call, tokens=step_tokens)
        return _then(output, lambda output_BTD: self._receive(output_BTD, self.codecs.trunk_output))

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        """Run the trunk's backward, or wait as above."""
        sent_BTD = self._send(output_gradient_BTD, self.codecs.output_gradient)
        gradient = self.calls.backward(TrunkBackward(self.slot, place.step, place.micro_batch, sent_BTD))
        return _then(
            gradient,
            lambda gradient_BTD: (
                None if gradient_BTD is None else self._receive(gradient_BTD, self.codecs.smashed_gradient)
            ),
        )

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        """Apply the trunk's gradients, or wait as above."""
        return _then(self.calls.step(self.slot, step, squared_norm=squared_norm), lambda applied: applied.squared_norm)

    def mean_gradient(self, step: int, gradients: Mapping[str, Tensor], *, tokens: int) -> Future[dict[str, Tensor]]:
        """Wait for the cohort's gradients."""
        return self.calls.mean_gradient(self.slot, step, gradients, tokens=tokens)

    def _send(self, tensor: Tensor, codec: Codec) -> Tensor:
        decoded, payload_bytes = cross(tensor, codec)
        self.traffic.sent_bytes += payload_bytes
        return decoded

    def _receive(self, tensor: Tensor, codec: Codec) -> Tensor:
        decoded, payload_bytes = cross(tensor, codec)
        self.traffic.received_bytes += payload_bytes
        return decoded


def link_codecs(codecs: CodecSection) -> LinkCodecs:
    """Look the run's codecs up, one for each direction of a link."""
    return LinkCodecs(
        smashed=get_codec(codecs.smashed),
        trunk_output=get_codec(codecs.trunk_output),
        output_gradient=get_codec(codecs.output_gradient),
        smashed_gradient=get_codec(codecs.smashed_gradient),
    )


def _then(asked: Future[T], change: Callable[[T], R]) -> Future[R]:
    """Give what becomes of an answer, once it is there; an error stays what it is."""
    changed: Future[R] = Future()
    asked.add_done_callback(lambda done: settle(changed, lambda: change(done.result())))
    return changed
