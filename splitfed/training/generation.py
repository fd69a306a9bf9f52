"""What an agent asks of a server to generate a sequence: the seam, the trunk behind it, and the link without a wire.

The other implementation of the seam is the gRPC link of `splitfed.transport`; both pass one contract.

Shapes: T tokens, D hidden.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from splitfed.errors import ProtocolError
from splitfed.models import Trunk, adapter_parameters, fitted_residual, own_names, residual_parameters
from splitfed.training.barrier import settle
from splitfed.training.link import LinkCodecs, Traffic, cross


class GenerationLink(Protocol):
    """One sequence's way through the trunk, which keeps a cache of it; calls are made one after the other."""

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""

    def forward(self, smashed_1TD: Tensor) -> Future[Tensor]:
        """Ask for the trunk output of the sequence's next rows.

        The future raises `LinkError` when the sequence is lost, or has more rows than were declared.

        Args:
            smashed_1TD: Smashed data, shape [1, T, D]; T may differ from call to call.

        Returns:
            The trunk output, of the same shape.
        """


class TrunkSequence:
    """One sequence on its way through the trunk, with a cache of its own and the adapter of a whole round.

    Not thread-safe: the worker that owns the trunk owns it.

    Args:
        trunk: The trunk, or a slice of it, with places for an adapter; what is in these does not count.
        adapter: The adapter, by whole-model name; keys of other segments are left aside.
        residual: The frozen adapter beside it, by whole-model name; empty: none.
        max_tokens: Most rows.

    Guarantees:
        * Nothing of the trunk is changed but its mode, which every forward sets.
        * Rows that would be too many are refused, and change nothing.
    """

    def __init__(
        self, trunk: Trunk, adapter: Mapping[str, Tensor], residual: Mapping[str, Tensor], *, max_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        self.rows = 0
        self._trunk = trunk
        self._parameter = next(trunk.parameters())
        self._cache = trunk.new_cache()
        fitted = fitted_residual(trunk, residual)
        self._tensors = {
            own: adapter[name].to(self._parameter.device)
            for name, own in own_names(trunk, adapter_parameters(trunk)).items()
        } | {own: fitted[name] for name, own in own_names(trunk, residual_parameters(trunk)).items()}

    @torch.no_grad()
    def forward(self, smashed_1TD: Tensor) -> Tensor:
        """Run the next rows.

        Args:
            smashed_1TD: Smashed data, shape [1, T, D].

        Returns:
            The trunk output, shape [1, T, D].

        Raises:
            ProtocolError: If there are more rows than the sequence may have.
        """
        rows = self.rows + smashed_1TD.shape[1]
        if rows > self.max_tokens:
            raise ProtocolError(f"A sequence of {self.max_tokens} rows was declared, and {rows} came.")
        self._trunk.eval()
        output_1TD: Tensor = functional_call(
            self._trunk,
            self._tensors,
            (smashed_1TD.to(self._parameter.device, self._parameter.dtype),),
            {"past_key_values": self._cache},
        )
        self.rows = rows
        return output_1TD


@dataclass
class InProcessGenerationLink:
    """The link without a wire: the trunk is in this process, the codecs are the real ones.

    Attributes:
        sequence: The sequence in the trunk.
        codecs: A codec for each direction.
        traffic: Payload bytes, with no framing.
    """

    sequence: TrunkSequence
    codecs: LinkCodecs
    traffic: Traffic = field(default_factory=Traffic)

    def forward(self, smashed_1TD: Tensor) -> Future[Tensor]:
        """Run the trunk."""
        answer: Future[Tensor] = Future()
        settle(answer, lambda: self._forward(smashed_1TD))
        return answer

    def _forward(self, smashed_1TD: Tensor) -> Tensor:
        came_1TD, sent_bytes = cross(smashed_1TD, self.codecs.smashed)
        self.traffic.sent_bytes += sent_bytes
        output_1TD, received_bytes = cross(self.sequence.forward(came_1TD), self.codecs.trunk_output)
        self.traffic.received_bytes += received_bytes
        return output_1TD
