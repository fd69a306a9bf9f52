"""Channels and ports: the same limits on both sides, one daemon a port, no channel with half its certificates."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc._cython import cygrpc

from splitfed.errors import ConfigError
from splitfed.transport import channel
from splitfed.transport.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, open_channel, server_credentials
from splitfed.transport.tensors import CHUNK_BYTES, MAX_MESSAGE_BYTES
from tests.service.certificates import Authority

FASTER = 10


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def flood(request: bytes, context: Any) -> bytes:
    return bytes(MAX_MESSAGE_BYTES + 1)


async def ponder(request: bytes, context: Any) -> bytes:
    """Answer after six of the client's pings, with no data meanwhile."""
    await asyncio.sleep(6 * 10.0 / FASTER)
    return request


def faster(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Let the pings of both sides go as much faster."""
    is_ping = ("keepalive_time_ms", "ping_interval_without_data_ms")
    return [(name, value // FASTER if name.endswith(is_ping) else value) for name, value in options]


@contextlib.asynccontextmanager
async def serving(options: Any) -> AsyncIterator[str]:
    """Serve one method that sends back what it gets, and one that sends too much."""
    server = aio.server(options=options)
    named = {"Echo": echo, "Flood": flood, "Ponder": ponder}
    methods = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in named.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def call(address: str, method: str, request: bytes) -> grpc.StatusCode:
    """Call a method over a channel of ours; gives how it ended."""
    with open_channel(address, None) as opened:
        try:
            opened.unary_unary(f"/test/{method}")(request, timeout=20)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("size_bytes", "code"),
    [
        (CHUNK_BYTES + 4096, grpc.StatusCode.OK),
        (MAX_MESSAGE_BYTES, grpc.StatusCode.OK),
        (MAX_MESSAGE_BYTES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_chunk_crosses_and_what_is_over_the_limit_does_not(size_bytes: int, code: grpc.StatusCode) -> None:
    async with serving(SERVER_OPTIONS) as address:
        assert await asyncio.to_thread(call, address, "Echo", bytes(size_bytes)) is code


async def test_a_server_without_limits_of_its_own_cannot_flood_a_client() -> None:
    async with serving([("grpc.max_send_message_length", -1)]) as address:
        assert await asyncio.to_thread(call, address, "Flood", b"") is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_second_server_on_the_same_port_fails() -> None:
    async with serving(SERVER_OPTIONS) as address:
        second = aio.server(options=SERVER_OPTIONS)
        with pytest.raises(RuntimeError, match="bind"):
            second.add_insecure_port(address)


def test_every_option_is_one_that_the_library_knows() -> None:
    """An option that it does not know is passed over in silence."""
    known = Path(cygrpc.__file__).read_bytes()
    assert [name for name, _ in [*CHANNEL_OPTIONS, *SERVER_OPTIONS] if name.encode() not in known] == []


async def test_a_client_that_waits_long_without_data_is_not_thrown_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", faster(CHANNEL_OPTIONS))
    async with serving(faster(SERVER_OPTIONS)) as address:
        assert await asyncio.to_thread(call, address, "Ponder", b"") is grpc.StatusCode.OK


@pytest.mark.parametrize("which", ["key", "certificate", "authority"])
def test_a_certificate_file_that_is_missing_is_named_on_both_sides(tmp_path: Path, which: str) -> None:
    tls = Authority(tmp_path).issue("a")
    broken = tls.model_copy(update={which: tmp_path / "lost.pem"})
    with pytest.raises(ConfigError, match=r"lost\.pem cannot be read"):
        open_channel("127.0.0.1:1", broken)
    with pytest.raises(ConfigError, match=r"lost\.pem cannot be read"):
        server_credentials(broken)
