"""What comes over the wire to the generation service is hostile until it is checked."""

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch

from splitfed.agent.server_calls import ServerCalls
from splitfed.compress import get_codec
from splitfed.models import canonical_config, resolve_base
from splitfed.proto.v1 import generation_pb2, joining_pb2, tensor_pb2
from splitfed.proto.v1.generation_pb2_grpc import GenerationStub
from splitfed.transport.channel import open_channel
from splitfed.transport.tensors import to_messages
from tests.service.conftest import OPEN, server_config
from tests.service.local import LocalServer, serving, wait_until

MOST, D = 8, 128
AGENT_ID = b"0" * 16
Request = generation_pb2.GenerateRequest


@dataclass
class Served:
    """A server with the members a, b and c."""

    server: LocalServer
    stub: GenerationStub
    config: Any

    def opening(self, client: str = "a", **own: Any) -> generation_pb2.OpenSequence:
        blocks = self.server.daemon._blocks
        said = {"agent_id": AGENT_ID, "first_block": blocks.start, "end_block": blocks.stop, "max_tokens": MOST}
        return generation_pb2.OpenSequence(**{"run_id": "small", "client": client, **said, **own})

    def stream(self, *messages: Request) -> "Stream":
        stream = Stream(self.stub)
        for message in messages:
            stream.outgoing.put(message)
        return stream

    def refusal(self, *messages: Request) -> tuple[grpc.StatusCode, str]:
        with closing(self.stream(*messages)) as stream, pytest.raises(grpc.RpcError) as raised:
            for _ in stream.replies:
                pass
        return raised.value.code(), raised.value.details()


@dataclass
class Stream:
    """One stream, written by hand."""

    stub: GenerationStub
    outgoing: "SimpleQueue[Request | None]" = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.replies = self.stub.Generate(iter(self.outgoing.get, None), timeout=60)

    def close(self) -> None:
        self.outgoing.put(None)
        self.replies.cancel()


def serve(folder: Path, stack: ExitStack, **generation: Any) -> Served:
    config = server_config(
        folder,
        codecs=OPEN,
        model={"least_bottom_blocks": 0},
        federation={"agents": 4},
        generation={"enabled": True, "max_tokens": MOST, **generation},
    )
    server = stack.enter_context(serving(config))
    for client in ("a", "b", "c"):
        with closing(ServerCalls(server.address, None, None, client=client, agent_id=AGENT_ID)) as calls:
            calls.join("small", canonical_config(resolve_base("demo")), {}, weight=1)
    return Served(server, GenerationStub(stack.enter_context(closing(open_channel(server.address, None)))), config)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        yield serve(tmp_path_factory.mktemp("served"), stack)


def rows(tensor: torch.Tensor | None = None, **own: Any) -> Request:
    message, chunks = to_messages(torch.zeros(1, 1, D) if tensor is None else tensor.nan_to_num(), get_codec("none"))
    assert not chunks
    if tensor is not None:
        message.data = tensor.numpy().tobytes()
    for name, value in own.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return Request(smashed=message)


@pytest.mark.parametrize(
    ("own", "code", "said"),
    [
        ({"run_id": "other"}, "INVALID_ARGUMENT", "This server serves the run 'small', not 'other'"),
        ({"client": "../a"}, "INVALID_ARGUMENT", "cannot be an agent's name"),
        ({"client": "d"}, "PERMISSION_DENIED", "'d' is not a member of the run 'small'; only an agent that has"),
        ({"agent_id": b"1" * 16}, "PERMISSION_DENIED", "Another agent is called 'a'"),
        ({"round": 1}, "ABORTED", "The adapter of round 1 is no longer here, the run is at round 0; generate again"),
        ({"max_tokens": MOST + 1}, "PERMISSION_DENIED", "this server generates 8 at most"),
        ({"max_tokens": 2**32 - 1}, "PERMISSION_DENIED", "lower --max-tokens"),
        ({"max_tokens": 0}, "PERMISSION_DENIED", "A sequence of 0 tokens was asked for"),
        ({"first_block": 3, "end_block": 3}, "INVALID_ARGUMENT", "blocks 3 to 3; this run has no such trunk"),
        ({"first_block": 2, "end_block": 1}, "INVALID_ARGUMENT", "this run has no such trunk"),
        ({"first_block": 0, "end_block": 400}, "INVALID_ARGUMENT", "this run has no such trunk"),
        ({"first_block": 2**32 - 1, "end_block": 2**32 - 1}, "INVALID_ARGUMENT", "this run has no such trunk"),
    ],
    ids=str,
)
def test_an_opening_that_does_not_fit_the_run_is_refused(
    served: Served, own: dict[str, Any], code: str, said: str
) -> None:
    found, details = served.refusal(Request(open=served.opening(**own)))
    assert found.name == code
    assert said in details


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([Request(chunk=b"x")], "holds chunk where rows were due"),
        ([Request()], "holds nothing where rows were due"),
        ([Request(open=generation_pb2.OpenSequence())], "holds open where rows were due"),
        ([rows(torch.zeros(1, MOST + 1, D))], "came with shape"),
        ([rows(torch.zeros(2, 1, D))], "came with shape"),
        ([rows(torch.zeros(1, 1, D + 1))], "came with shape"),
        ([rows(torch.zeros(1, D))], "came with shape"),
        ([rows(shape=[1, 0, D])], "came with shape"),
        ([rows(codec=tensor_pb2.CODEC_INT8)], "the run agreed on 'none'"),
        ([rows(dtype=0)], "unknown dtype"),
        ([rows(payload_bytes=1 << 40)], f"{1 << 40} bytes"),
        ([rows(data=b"")], None),
        ([rows(torch.full((1, 1, D), float("nan")))], "NaN or an infinite"),
        ([rows(torch.full((1, 1, D), float("inf")))], "NaN or an infinite"),
        ([rows(torch.full((1, 1, D), -1e30))], "not finite, or beyond"),
        ([rows(torch.zeros(1, 5, D)), rows(torch.zeros(1, 4, D))], "came with shape"),
        ([rows(torch.zeros(1, 8, D)), rows()], "A sequence of 8 rows was declared, and one more came"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_rows_that_are_not_what_the_run_allows_end_the_stream(
    served: Served, messages: list[Request], said: str | None
) -> None:
    opening = Request(open=served.opening())
    if said is None:  # its payload is to come in chunks: an empty one is none
        messages, said = [*messages, Request(chunk=b"")], "A chunk of 0 bytes came"
    code, details = served.refusal(opening, *messages)
    assert (code, said in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
    assert not served.server.daemon._generations._open


def test_a_stream_that_does_not_begin_with_an_opening_is_refused(served: Served) -> None:
    assert "A stream starts with the sequence" in served.refusal(rows())[1]


def test_a_stream_that_ends_early_gives_its_place_up(served: Served) -> None:
    with closing(served.stream(Request(open=served.opening()), rows())) as stream:
        assert next(stream.replies).WhichOneof("body") == "opened"
        assert next(stream.replies).WhichOneof("body") == "trunk_output"
    wait_until(lambda: not served.server.daemon._generations._open)


def test_answers_that_are_known_are_computed_and_not_sent(served: Served) -> None:
    sent = [rows(torch.randn(1, n, D, generator=torch.Generator().manual_seed(n))) for n in (3, 1, 2)]
    answers = []
    for answered in (0, 2):
        with closing(
            served.stream(
                Request(open=served.opening(answered=answered)),
                *sent,
            )
        ) as stream:
            stream.outgoing.put(None)
            answers.append([reply.trunk_output.data for reply in stream.replies if reply.HasField("trunk_output")])
    assert len(answers[0]) == 3
    assert answers[1] == answers[0][2:]


def test_what_an_agent_of_another_cut_asks_for_is_served(served: Served) -> None:
    blocks = served.server.daemon._blocks
    with closing(served.stream(Request(open=served.opening(first_block=blocks.start + 1)), rows())) as stream:
        next(stream.replies)
        assert next(stream.replies).WhichOneof("body") == "trunk_output"


def test_a_client_has_one_sequence_and_its_next_one_ends_it(served: Served) -> None:
    with closing(served.stream(Request(open=served.opening()))) as first:
        next(first.replies)
        with closing(served.stream(Request(open=served.opening()), rows())) as second:
            next(second.replies)
            assert next(second.replies).WhichOneof("body") == "trunk_output"
            with pytest.raises(grpc.RpcError) as raised:
                next(first.replies)
            assert "'a' has begun another sequence" in raised.value.details()
            assert list(served.server.daemon._generations._open) == ["a"]


def fetch(served: Served, **own: Any) -> list[Any]:
    request = {
        "run_id": "small",
        "client": "a",
        "agent_id": AGENT_ID,
        "bottom_blocks": 1,
        "top_blocks": 1,
        "rank": 4,
        "config_sha256": bytes.fromhex(canonical_config(resolve_base("demo"))),
    }
    return list(served.stub.FetchLastRound(generation_pb2.FetchLastRoundRequest(**{**request, **own}), timeout=60))


@pytest.mark.parametrize(
    ("own", "code", "said"),
    [
        ({"client": "d"}, "PERMISSION_DENIED", "'d' is not a member of the run"),
        ({"run_id": "x"}, "INVALID_ARGUMENT", "not 'x'"),
        ({"rank": 400}, "PERMISSION_DENIED", "rank is 400"),
        ({"bottom_blocks": 400}, "PERMISSION_DENIED", "do not fit this run"),
        ({"config_sha256": b"x" * 32}, "FAILED_PRECONDITION", "another configuration"),
        (
            {"tensors": [joining_pb2.TensorIdentity(name="model.embed_tokens.weight", dtype="F32", sha256=b"x" * 32)]},
            "FAILED_PRECONDITION",
            "differs from the server's",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_adapters_are_given_to_members_with_the_same_base_alone(
    served: Served, own: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        fetch(served, **own)
    assert (raised.value.code().name, said in raised.value.details()) == (code, True), raised.value.details()


def test_the_adapters_of_the_last_whole_round_come_with_its_number(served: Served) -> None:
    messages = fetch(served)
    assert messages[0].header.round == 0
    names = {message.tensor.name for message in messages[1:]}
    blocks = served.server.daemon._blocks
    assert names
    assert not any(f".{block}." in name for name in names for block in range(1, blocks.stop))


def test_nothing_but_ids_and_shapes_is_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "splitfed.server"),
        closing(served.stream(Request(open=served.opening()), rows())) as stream,
    ):
        next(stream.replies), next(stream.replies)
    assert [record.getMessage() for record in caplog.records] == [
        "a generates a sequence of up to 8 tokens with round 0"
    ]


def test_places_are_bounded_silence_gives_one_up_and_a_server_that_stops_says_so(tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = serve(tmp_path, stack, max_streams=2, idle_timeout_s=1.0)
        streams = {client: served.stream(Request(open=served.opening(client))) for client in ("a", "b")}
        for stream in streams.values():
            next(stream.replies)
        code, details = served.refusal(Request(open=served.opening("c")))
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "2 agents generate already; come back later.")
        with pytest.raises(grpc.RpcError) as raised:
            next(streams["a"].replies)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "No row came for 1 s" in raised.value.details()
        wait_until(lambda: not served.server.daemon._generations._open)
        with closing(served.stream(Request(open=served.opening("c")), rows())) as stream:
            next(stream.replies), next(stream.replies)
            stopping = threading.Thread(target=served.server.stop)
            stopping.start()
            wait_until(lambda: served.server.daemon.coordinator.is_draining)
            with pytest.raises(grpc.RpcError) as raised:
                next(stream.replies)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "The server is shutting down" in raised.value.details()
        stopping.join()


def test_a_server_that_does_not_generate_says_how_it_would(tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = serve(tmp_path, stack, enabled=False)
        said = "does not generate text; its operator can allow it with [generation] enabled = true"
        assert said in served.refusal(Request(open=served.opening()))[1]
        with pytest.raises(grpc.RpcError) as raised:
            fetch(served)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert said in raised.value.details()
