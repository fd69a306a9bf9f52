"""Measure the way to a server by calls that change nothing there."""

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitfed.config import TlsSection
from splitfed.config.device import LinkSection
from splitfed.errors import LinkError, ServerUnreachable
from splitfed.proto.v1 import joining_pb2
from splitfed.proto.v1.joining_pb2_grpc import JoiningStub
from splitfed.transport.channel import open_channel
from splitfed.transport.status import error_of_call
from splitfed.transport.version import PROTOCOL_VERSION

_FIRST_S: Final = 30.0
_CALL_S: Final = 60.0
_ROUND_TRIPS: Final = 10
_LEAST_BYTES, _LARGEST_BYTES = 16 << 10, 1 << 20
_LONG_ENOUGH_S: Final = 0.5
_FETCHES: Final = 4
_TELLING_S: Final = 1e-3
_SMALL_FILE, _FILE = "config.json", "tokenizer.json"
_LEAST_BITS_PER_S, _LARGEST_BITS_PER_S = 100.0, 1e13


def measure_link(server: str, tls: TlsSection | None, *, client: str = "profile") -> LinkSection:
    """Measure bandwidth and round trip.

    The round trip is that of a health check. Up goes a health check of a service with a long name, which no server has;
    down comes the tokenizer's file, half a second of it at most. Where that is too small to tell, the way down counts
    as the way up. Nothing of this changes the server's state, and nothing of the device's data is in it.

    Args:
        server: ``host:port``.
        tls: Certificates; None: plain text.
        client: The name in the certificate, where there is one.

    Raises:
        ServerUnreachable: If no server answers.
        LinkError: If it is not one of splitfed.
    """
    channel = open_channel(server, tls)
    try:
        health = health_pb2_grpc.HealthStub(channel)
        latency_s = round_trip_s(health)
        up = _rate(lambda size_bytes: _send(health, size_bytes), latency_s)
        down = _down(JoiningStub(channel), client, latency_s) or up
    except grpc.RpcError as error:
        failure = error_of_call(error)
        if isinstance(failure, ServerUnreachable):
            raise ServerUnreachable(f"No server answers at {server}; start one there, or correct --link-to.") from error
        raise LinkError(f"The link to {server} cannot be measured: {failure}") from error
    finally:
        channel.close()
    return LinkSection(up_bits_per_s=_bounded(up), down_bits_per_s=_bounded(down), latency_s=latency_s)


def round_trip_s(health: health_pb2_grpc.HealthStub) -> float:
    """Give the fastest round trip; the first call also connects."""
    health.Check(health_pb2.HealthCheckRequest(), timeout=_FIRST_S)
    return min(
        _seconds(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_S)) for _ in range(_ROUND_TRIPS)
    )


def _send(health: health_pb2_grpc.HealthStub, size_bytes: int) -> None:
    """Ask for the health of a service that does not exist, by a name that nothing on the way can shorten."""
    try:
        health.Check(health_pb2.HealthCheckRequest(service=secrets.token_hex(size_bytes // 2)), timeout=_CALL_S)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise


def _rate(send: Callable[[int], None], latency_s: float) -> float:
    """Give bits per second: larger and larger messages, until one takes long enough to tell, or is the largest."""
    size_bytes = _LEAST_BYTES
    while True:
        took_s = min(_seconds(partial(send, size_bytes)) for _ in range(3))
        if took_s > latency_s + _LONG_ENOUGH_S or size_bytes >= _LARGEST_BYTES:
            return 8 * size_bytes / max(took_s - latency_s, 1e-9)
        size_bytes *= 4


def _down(joining: JoiningStub, client: str, latency_s: float) -> float | None:
    """Give bits per second of a large file, what a small one takes left aside; None if the two take as long."""
    asked = joining_pb2.DescribeRequest(protocol_version=PROTOCOL_VERSION, client=client)
    run_id = joining.Describe(asked, timeout=_FIRST_S).run_id

    def fetch(name: str) -> tuple[float, int]:
        request = joining_pb2.FetchSegmentsRequest(run_id=run_id, file=name)
        got_bytes, started_s = 0, time.perf_counter()
        call = joining.FetchSegments(request, timeout=_CALL_S)
        for chunk in call:
            got_bytes += len(chunk.data)
            if time.perf_counter() - started_s > latency_s + _LONG_ENOUGH_S:
                call.cancel()
                break
        return time.perf_counter() - started_s, got_bytes

    try:
        small_s, small_bytes = min(fetch(_SMALL_FILE) for _ in range(_FETCHES))
        took_s, got_bytes = min(fetch(_FILE) for _ in range(_FETCHES))
    except grpc.RpcError:
        return None
    beyond_s, beyond_bytes = took_s - small_s, got_bytes - small_bytes
    return 8 * beyond_bytes / beyond_s if beyond_s > _TELLING_S and beyond_bytes >= _LEAST_BYTES else None


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _bounded(bits_per_s: float) -> float:
    return min(max(bits_per_s, _LEAST_BITS_PER_S), _LARGEST_BITS_PER_S)
