"""The agent's unary calls and adapter streams, with errors already translated."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from torch import Tensor

from splitfed.compress import Codec
from splitfed.config import RunConfig, TlsSection
from splitfed.errors import JoinRefused, LinkError, ProtocolError, ServerUnreachable
from splitfed.models import TensorIdentity
from splitfed.proto.v1 import federation_pb2, joining_pb2
from splitfed.proto.v1.federation_pb2_grpc import FederationStub
from splitfed.proto.v1.joining_pb2_grpc import JoiningStub
from splitfed.proto.v1.training_pb2_grpc import TrainingStub
from splitfed.training.link import Traffic
from splitfed.transport.adapters import IncomingAdapter, adapter_messages
from splitfed.transport.channel import open_channel
from splitfed.transport.counting import counting_received, counting_sent
from splitfed.transport.hang_up import explain_hang_up
from splitfed.transport.status import error_of_call
from splitfed.transport.tensors import codecs_on_wire
from splitfed.transport.version import PROTOCOL_VERSION

_SHORT_CALL_S = 30.0
_JOIN_S = 600.0  # the server may hash its whole checkpoint first
_LEAVE_S = 5.0


@dataclass(frozen=True)
class RoundReport:
    """What goes with an update.

    Attributes:
        tokens: Rows that crossed the link in one direction.
        training_loss: Mean training loss; None unless the owner shares it.
        held_out_loss: Held-out loss; None unless the owner shares it.
    """

    tokens: int
    training_loss: float | None
    held_out_loss: float | None


class ServerCalls:
    """One agent's connection to a main server and a fed server.

    Args:
        server: Address of the main server.
        fed_server: Address of the fed server; none: the same.
        tls: Certificates; none: plain text.
        client: Name of the agent.
        agent_id: The agent's own id.
    """

    def __init__(
        self, server: str, fed_server: str | None, tls: TlsSection | None, *, client: str, agent_id: bytes
    ) -> None:
        self._server, self._tls = server, tls
        self._channels = [open_channel(server, tls)]
        if fed_server is not None and fed_server != server:
            self._channels.append(open_channel(fed_server, tls))
        self.joining = JoiningStub(self._channels[0])
        self.training = TrainingStub(self._channels[0])
        self._federation = FederationStub(self._channels[-1])
        self._client = client
        self._agent_id = agent_id

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def describe(self) -> RunConfig:
        """Ask what is to be run.

        Raises:
            ServerUnreachable: If no server answers.
            LinkError: If one does, but not with these certificates.
            JoinRefused: If the two do not speak the same protocol.
        """
        request = joining_pb2.DescribeRequest(protocol_version=PROTOCOL_VERSION, client=self._client)
        try:
            with translated():
                reply = self.joining.Describe(request, timeout=_SHORT_CALL_S)
        except ServerUnreachable as error:
            reason = explain_hang_up(self._server, self._tls)
            if reason is None:
                raise
            raise LinkError(reason) from error
        if reply.protocol_version != PROTOCOL_VERSION:
            raise JoinRefused(
                f"The server speaks version {reply.protocol_version} of the protocol, this agent {PROTOCOL_VERSION}; "
                "install the same splitfed."
            )
        try:
            return RunConfig.model_validate_json(reply.run_config)
        except ValueError as error:
            raise ProtocolError("The server sent a run configuration that this agent cannot read.") from error

    def join(
        self,
        run_id: str,
        config_sha256: str,
        tensors: Mapping[str, TensorIdentity],
        *,
        weight: int,
        own: RunConfig | None = None,
        personal: Collection[str] = (),
    ) -> tuple[int, int]:
        """Join the run.

        Args:
            run_id: The run.
            config_sha256: Hash of the base model's configuration.
            tensors: Identity of each tensor of the agent's segments.
            weight: The agent's weight in every mean.
            own: The run as this agent takes part in it; None: as the server has it.
            personal: Names of the tensors of its adapter that it keeps to itself.

        Returns:
            How many agents the run waits for, and how many have joined.

        Raises:
            FingerprintMismatch: If the base models differ.
            JoinRefused: If the server refuses this agent.
        """
        request = joining_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            run_id=run_id,
            client=self._client,
            agent_id=self._agent_id,
            config_sha256=bytes.fromhex(config_sha256),
            tensors=[
                joining_pb2.TensorIdentity(
                    name=name, dtype=identity.dtype, shape=identity.shape, sha256=bytes.fromhex(identity.sha256)
                )
                for name, identity in tensors.items()
            ],
            codecs=codecs_on_wire(),
            weight=weight,
            bottom_blocks=None if own is None else own.model.bottom_blocks,
            top_blocks=None if own is None else own.model.top_blocks,
            rank=None if own is None else own.lora.rank,
            personal=sorted(personal),
        )
        with translated():
            reply = self.joining.Join(request, timeout=_JOIN_S)
        return reply.agents, reply.joined

    def watch(self, run_id: str) -> Iterator[federation_pb2.RoundEvent]:
        """Follow the run's events, from its present state on."""
        request = federation_pb2.WatchRequest(run_id=run_id, client=self._client, agent_id=self._agent_id)
        with translated():
            yield from self._federation.Watch(request)

    def fetch_adapter(
        self, run_id: str, round: int, shapes: Mapping[str, Any], codec: Codec, traffic: Traffic
    ) -> dict[str, Tensor]:
        """Fetch the adapters that a round starts from.

        Raises:
            RoundLost: If that round is over.
            ProtocolError: If what comes is not this run's adapter.
        """
        request = federation_pb2.FetchAdapterRequest(
            run_id=run_id, client=self._client, agent_id=self._agent_id, round=round
        )
        incoming = IncomingAdapter(shapes, codec)
        with translated():
            messages = self._federation.FetchAdapter(request)
            for index, message in enumerate(counting_received(messages, traffic)):
                if index:
                    incoming.add(message)
        return incoming.state()

    def submit_adapter(
        self, run_id: str, round: int, state: Mapping[str, Tensor], codec: Codec, report: RoundReport, traffic: Traffic
    ) -> str | None:
        """Send the adapters after local training.

        Returns:
            Why the round goes on without them; None: they are counted.

        Raises:
            RoundLost: If that round is over.
        """
        header = federation_pb2.AdapterHeader(
            run_id=run_id,
            client=self._client,
            agent_id=self._agent_id,
            round=round,
            tokens=report.tokens,
            training_loss=report.training_loss,
            held_out_loss=report.held_out_loss,
        )
        with translated():
            messages = counting_sent(adapter_messages(header, state, codec), traffic)
            return self._federation.SubmitAdapter(messages).refused or None

    def mean_gradient(
        self,
        run_id: str,
        round: int,
        step: int,
        gradients: Mapping[str, Tensor],
        codec: Codec,
        *,
        tokens: int,
        traffic: Traffic,
    ) -> dict[str, Tensor]:
        """Send the gradients of bottom and top, and wait for the mean of the cohort's.

        Raises:
            RoundLost: If the round goes on without this agent.
            ProtocolError: If what comes is not of this run's adapter.
        """
        header = federation_pb2.AdapterHeader(
            run_id=run_id, client=self._client, agent_id=self._agent_id, round=round, step=step, tokens=tokens
        )
        incoming = IncomingAdapter({name: tuple(tensor.shape) for name, tensor in gradients.items()}, codec)
        with translated():
            sent = counting_sent(adapter_messages(header, gradients, codec), traffic)
            for index, message in enumerate(counting_received(self._federation.MeanGradient(sent), traffic)):
                if index:
                    incoming.add(message)
        return incoming.state()

    def leave(self, run_id: str, *, for_good: bool) -> None:
        """Say that this agent stops; an answer is not waited for long.

        Raises:
            LinkError: If the server did not confirm it.
        """
        request = federation_pb2.LeaveRequest(
            run_id=run_id, client=self._client, agent_id=self._agent_id, for_good=for_good
        )
        with translated():
            self._federation.Leave(request, timeout=_LEAVE_S)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what a gRPC call raises into splitfed's own errors.

    Raises:
        LinkError: In place of a `grpc.RpcError`.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise error_of_call(error) from error
