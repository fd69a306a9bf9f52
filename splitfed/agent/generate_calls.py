"""The calls of an agent that generates: the adapters of a whole round, and a link for each sequence."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
from torch import Tensor

from splitfed.agent.generate_setup import Generator
from splitfed.agent.no_server import gave_up, goes_on
from splitfed.agent.segments import fetch_segments
from splitfed.agent.server_calls import ServerCalls, translated
from splitfed.compress import get_codec
from splitfed.config import AgentConfig, RunConfig
from splitfed.errors import JoinRefused, LinkError, ProtocolError, ServerUnreachable
from splitfed.models import resolve_base
from splitfed.proto.v1 import generation_pb2, joining_pb2
from splitfed.proto.v1.generation_pb2_grpc import GenerationStub
from splitfed.training.link import link_codecs
from splitfed.transport.adapters import IncomingAdapter
from splitfed.transport.backoff import Backoff
from splitfed.transport.channel import open_channel
from splitfed.transport.generation import GrpcGenerationLink

R = TypeVar("R")


@dataclass(frozen=True)
class LastRound:
    """The adapters of bottom and top after the last whole round.

    Attributes:
        number: The round.
        state: Tensors by whole-model name, those that are frozen with a prefix.
    """

    number: int
    state: dict[str, Tensor]


class GenerateCalls:
    """One agent's calls to a server that generates.

    Args:
        config: The agent's configuration.
        agent_id: The agent's own id.
    """

    def __init__(self, config: AgentConfig, agent_id: bytes) -> None:
        self._config = config
        self._agent_id = agent_id
        self._channel = open_channel(config.agent.server, config.tls)
        self._stub = GenerationStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def base_folder(self, cache: Path, *, own: Callable[[RunConfig], RunConfig]) -> tuple[RunConfig, Path]:
        """Ask about the run, and find or fetch this agent's side of the base model.

        Args:
            cache: Where segments that come from a server are kept.
            own: Gives the run as this device takes part in it.

        Returns:
            The run as the server has it, and the folder.

        Raises:
            LinkError: If the server cannot be asked.
        """
        agent = self._config.agent
        calls = ServerCalls(agent.server, None, self._config.tls, client=agent.name, agent_id=self._agent_id)
        with closing(calls):
            run = self.persistently(calls.describe)
            if agent.base is not None:
                return run, resolve_base(agent.base, run.model.revision)
            return run, self.persistently(lambda: _segments(calls, own(run), cache))

    def last_round(self, generator: Generator) -> LastRound:
        """Fetch the adapters after the last whole round.

        Raises:
            JoinRefused: If the server does not generate for this agent.
            FingerprintMismatch: If the base models differ.
            ProtocolError: If what comes is not this run's adapter.
        """
        model = generator.run.model
        request = generation_pb2.FetchLastRoundRequest(
            run_id=generator.run_id,
            client=self._config.agent.name,
            agent_id=self._agent_id,
            bottom_blocks=model.bottom_blocks,
            top_blocks=model.top_blocks,
            rank=generator.run.lora.rank,
            config_sha256=bytes.fromhex(generator.config_sha256),
            tensors=[
                joining_pb2.TensorIdentity(
                    name=name, dtype=identity.dtype, shape=identity.shape, sha256=bytes.fromhex(identity.sha256)
                )
                for name, identity in generator.tensors.items()
            ],
        )
        return self.persistently(lambda: self._fetch(request, generator))

    def link(self, generator: Generator, round: int, *, max_tokens: int) -> GrpcGenerationLink:
        """Give the link of one sequence, which opens where it is entered."""
        opening = generation_pb2.OpenSequence(
            run_id=generator.run_id,
            client=self._config.agent.name,
            agent_id=self._agent_id,
            round=round,
            first_block=generator.blocks.start,
            end_block=generator.blocks.stop,
            max_tokens=max_tokens,
        )
        return GrpcGenerationLink(
            self._stub,
            opening,
            link_codecs(generator.run.codecs),
            retry_for_s=self._config.agent.retry_for_s,
            silence_s=generator.run.federation.agent_timeout_s,
        )

    def persistently(self, call: Callable[[], R]) -> R:
        """Make a call that may be made twice until it is answered.

        Raises:
            ServerUnreachable: If no server answers for long enough.
        """
        agent = self._config.agent
        backoff = Backoff(agent.retry_for_s)
        while True:
            try:
                return call()
            except ServerUnreachable as error:
                goes_on(agent, backoff.tries, error)
                if not backoff.pause():
                    raise gave_up(agent, backoff.tries + 1, error) from error

    def _fetch(self, request: generation_pb2.FetchLastRoundRequest, generator: Generator) -> LastRound:
        incoming = IncomingAdapter(generator.shapes, get_codec(generator.run.codecs.adapter))
        number: int | None = None
        try:
            with translated():
                for message in self._stub.FetchLastRound(request):
                    if number is not None:
                        incoming.add(message)
                    elif message.WhichOneof("body") == "header":
                        number = message.header.round
                    else:
                        raise ProtocolError("The server sent an adapter without saying of which round.")
        except LinkError as error:
            cause = error.__cause__
            if isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise JoinRefused(
                    f"The server at {self._config.agent.server} cannot generate text; it needs a newer splitfed."
                ) from error
            raise
        if number is None:
            raise ServerUnreachable("The server ended the stream before the adapter came.")
        return LastRound(number, incoming.state())


def _segments(calls: ServerCalls, run: RunConfig, cache: Path) -> Path:
    with translated():
        return fetch_segments(calls.joining, run.run.name, run.model, cache)
