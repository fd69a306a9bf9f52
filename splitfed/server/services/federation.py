"""Rounds, and the adapters of bottom and top."""

import math
from collections.abc import AsyncIterator
from typing import Any

from torch import Tensor

from splitfed.compress import get_codec
from splitfed.errors import ProtocolError, RoundLost
from splitfed.federation import Phase, UpdateRefused
from splitfed.proto.v1 import federation_pb2, federation_pb2_grpc
from splitfed.server.contribution import Contribution
from splitfed.server.coordinator import Coordinator
from splitfed.server.services.identity import Identity
from splitfed.transport.adapters import IncomingAdapter, adapter_messages
from splitfed.transport.counting import framed_bytes


class FederationService(federation_pb2_grpc.FederationServicer):
    """Rounds, and the adapters of bottom and top."""

    def __init__(self, coordinator: Coordinator, identity: Identity) -> None:
        self._coordinator = coordinator
        self._identity = identity
        self._codec = get_codec(coordinator.config.codecs.adapter)

    async def Watch(
        self, request: federation_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[federation_pb2.RoundEvent]:
        """Stream the run's events to a member."""
        self._check(context, request)
        rounds = self._coordinator.rounds
        async for phase, round, is_submitted in self._coordinator.watch(request.client):
            if phase is Phase.FINISHED:
                yield federation_pb2.RoundEvent(run_finished=federation_pb2.RunFinished(rounds=rounds.rounds))
            elif self._coordinator.is_draining:
                yield federation_pb2.RoundEvent(draining=federation_pb2.Draining())
            elif phase is Phase.WAITING:
                waiting = federation_pb2.Waiting(agents=rounds.agents, joined=rounds.joined)
                yield federation_pb2.RoundEvent(waiting=waiting)
            else:
                yield federation_pb2.RoundEvent(
                    round_opened=federation_pb2.RoundOpened(
                        round=round,
                        rounds=rounds.rounds,
                        is_submitted=is_submitted,
                        is_selected=rounds.may_start(request.client),
                        last_counted=self._coordinator.last_counted(request.client),
                    )
                )

    async def FetchAdapter(
        self, request: federation_pb2.FetchAdapterRequest, context: Any
    ) -> AsyncIterator[federation_pb2.AdapterChunk]:
        """Stream the adapters that a round starts from."""
        self._check(context, request)
        if request.round != self._coordinator.rounds.current:
            raise RoundLost(f"Round {request.round} is not open; {self._coordinator.rounds.standing}.")
        self._coordinator.note_progress(request.client)
        header = federation_pb2.AdapterHeader(run_id=request.run_id, client=request.client, round=request.round)
        for message in adapter_messages(header, self._coordinator.start_of_round(request.client), self._codec):
            self._coordinator.figures.count_bytes(request.client, down=framed_bytes(message))
            yield message

    async def SubmitAdapter(
        self, request_iterator: AsyncIterator[federation_pb2.AdapterChunk], context: Any
    ) -> federation_pb2.SubmitReply:
        """Take a client's update, or say why the round goes on without it."""
        header, state = await self._receive(request_iterator, context)
        contribution = Contribution(
            tokens=header.tokens,
            training_loss=_finite(header.training_loss) if header.HasField("training_loss") else None,
            held_out_loss=_finite(header.held_out_loss) if header.HasField("held_out_loss") else None,
        )
        try:
            is_new = await self._coordinator.submit(header.client, header.round, state, contribution)
        except UpdateRefused as error:
            return federation_pb2.SubmitReply(refused=str(error))
        return federation_pb2.SubmitReply(is_new=is_new)

    async def MeanGradient(
        self, request_iterator: AsyncIterator[federation_pb2.AdapterChunk], context: Any
    ) -> AsyncIterator[federation_pb2.AdapterChunk]:
        """Take a client's gradients of a local step, and give the cohort's mean once all are there."""
        header, gradients = await self._receive(request_iterator, context)
        mean = await self._coordinator.mean_gradient(
            header.client, header.round, header.step, gradients, tokens=header.tokens
        )
        reply = federation_pb2.AdapterHeader(
            run_id=header.run_id, client=header.client, round=header.round, step=header.step
        )
        for message in adapter_messages(reply, mean, self._codec):
            self._coordinator.figures.count_bytes(header.client, down=framed_bytes(message))
            yield message

    async def _receive(
        self, messages: AsyncIterator[federation_pb2.AdapterChunk], context: Any
    ) -> tuple[federation_pb2.AdapterHeader, dict[str, Tensor]]:
        """Take a header, and a tensor for each factor that its round trains."""
        first = await anext(aiter(messages), None)
        if first is None or first.WhichOneof("body") != "header":
            raise ProtocolError("An update starts with its header.")
        header = first.header
        self._check(context, header)
        incoming = IncomingAdapter(self._coordinator.update_shapes(header.client, header.round), self._codec)
        received_bytes = framed_bytes(first)
        async for message in messages:
            received_bytes += framed_bytes(message)
            incoming.add(message)
            self._coordinator.note_progress(header.client)
        self._coordinator.figures.count_bytes(header.client, up=received_bytes)
        return header, incoming.state()

    async def Leave(self, request: federation_pb2.LeaveRequest, context: Any) -> federation_pb2.LeaveReply:
        """Let a member go."""
        self._identity.check(context, request.client, request.run_id)
        self._coordinator.check_member(request.client, request.agent_id)
        await self._coordinator.leave(request.client, for_good=request.for_good)
        return federation_pb2.LeaveReply()

    def _check(self, context: Any, request: Any) -> None:
        self._identity.check(context, request.client, request.run_id)
        self._coordinator.check_joined(request.client, request.agent_id)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
