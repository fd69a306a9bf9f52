"""The boundary between services and the wire: one sentence for what is meant for the agent, nothing for the rest."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import aio

from splitfed.errors import (
    FingerprintMismatch,
    JoinRefused,
    ProtocolError,
    RoundLost,
    ServerUnreachable,
    SplitFedError,
    WeightsError,
)
from splitfed.server.boundary import ErrorBoundary

SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")

Behaviour = Callable[[Any], object]
"""What a service does with the call's context, before its answer."""


def service(behave: Behaviour) -> grpc.GenericRpcHandler:
    """A service with a method of each shape; each answers b"yes"."""

    async def unary(request: object, context: Any) -> bytes:
        result = behave(context)
        if asyncio.iscoroutine(result):
            await result
        return b"yes"

    async def stream(request: object, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await unary(request, context)

    return grpc.method_handlers_generic_handler(
        "test",
        {
            shape: getattr(grpc, f"{shape}_rpc_method_handler")(unary if shape.endswith("unary") else stream)
            for shape in SHAPES
        },
    )


@contextlib.asynccontextmanager
async def serving(behave: Behaviour) -> AsyncIterator[aio.Channel]:
    """Serve one behaviour behind the boundary."""
    server = aio.server(interceptors=[ErrorBoundary()])
    server.add_generic_rpc_handlers((service(behave),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def call(channel: aio.Channel, shape: str, on_reply: Callable[[], object] = lambda: None) -> list[bytes]:
    """Call a method of a shape; gives its answers."""
    asked = iter([b"question"]) if shape.startswith("stream") else b"question"
    answer = getattr(channel, shape)(f"/test/{shape}")(asked, timeout=20)
    if shape.endswith("stream"):
        replies = []
        async for reply in answer:
            replies.append(reply)
            on_reply()
        return replies
    return [await answer]


async def failure(behave: Behaviour, shape: str) -> tuple[grpc.StatusCode, str]:
    """Call a method that fails; gives code and words."""
    async with serving(behave) as channel:
        with pytest.raises(aio.AioRpcError) as failed:
            await call(channel, shape)
    return failed.value.code(), failed.value.details() or ""


def raising(error: BaseException) -> Behaviour:
    def behave(context: Any) -> object:
        raise error

    return behave


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_goes_well_passes_untouched(shape: str) -> None:
    async with serving(lambda context: None) as channel:
        assert await call(channel, shape) == ([b"first", b"yes"] if shape.endswith("stream") else [b"yes"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProtocolError("the request has no body"), grpc.StatusCode.INVALID_ARGUMENT),
        (JoinRefused("the run is full"), grpc.StatusCode.PERMISSION_DENIED),
        (FingerprintMismatch("another model"), grpc.StatusCode.FAILED_PRECONDITION),
        (RoundLost("round 2 is over"), grpc.StatusCode.ABORTED),
        (ServerUnreachable("shutting down"), grpc.StatusCode.UNAVAILABLE),
        (WeightsError("model.safetensors is damaged"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_an_error_of_ours_becomes_its_status_and_its_sentence(
    shape: str, error: SplitFedError, code: grpc.StatusCode
) -> None:
    assert await failure(raising(error), shape) == (code, str(error))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("error", [RuntimeError("secret"), KeyError("secret"), AssertionError("secret")])
async def test_any_other_error_tells_the_agent_nothing_and_the_log_everything(
    caplog: pytest.LogCaptureFixture, shape: str, error: Exception
) -> None:
    code, details = await failure(raising(error), shape)
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert type(error).__name__ not in details
    (record,) = [record for record in caplog.records if record.name == "splitfed.server.boundary"]
    assert f"/test/{shape} failed" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_services_own_refusal_passes_untouched(caplog: pytest.LogCaptureFixture, shape: str) -> None:
    def refuse(context: Any) -> object:
        return context.abort(grpc.StatusCode.OUT_OF_RANGE, "not here")

    assert await failure(refuse, shape) == (grpc.StatusCode.OUT_OF_RANGE, "not here")
    assert not [record for record in caplog.records if record.name == "splitfed.server.boundary"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_cancelled_call_stays_cancelled(caplog: pytest.LogCaptureFixture, shape: str) -> None:
    started, replied, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait_for_ever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise

    async with serving(lambda context: wait_for_ever()) as channel:
        asking = asyncio.create_task(call(channel, shape, replied.set))
        await asyncio.wait_for(started.wait(), 20)
        if shape.endswith("stream"):  # gRPC's client misses a cancellation at the moment in which its request is sent
            await asyncio.wait_for(replied.wait(), 20)
        asking.cancel()
        await asyncio.wait_for(ended.wait(), 20)
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert not [record for record in caplog.records if record.name == "splitfed.server.boundary"]


async def test_a_method_that_nobody_serves_is_said_to_be_so() -> None:
    async with serving(lambda context: None) as channel:
        with pytest.raises(aio.AioRpcError) as failed:
            await channel.unary_unary("/test/nothing")(b"", timeout=20)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("error", "level", "said"),
    [
        (RoundLost("Round 2 is over."), "INFO", "an agent was told to come back: Round 2 is over."),
        (ServerUnreachable("It is shutting down."), "INFO", "an agent was told to come back: It is shutting down."),
        (ProtocolError("It holds a NaN."), "WARNING", "an agent was refused: It holds a NaN."),
    ],
)
async def test_lateness_is_no_warning_and_no_line_names_a_call(
    caplog: pytest.LogCaptureFixture, error: SplitFedError, level: str, said: str
) -> None:
    with caplog.at_level("INFO", "splitfed"):
        await failure(raising(error), "unary_unary")
    ours = [record for record in caplog.records if record.name.startswith("splitfed")]
    assert [(record.levelname, record.getMessage()) for record in ours] == [(level, said)]
