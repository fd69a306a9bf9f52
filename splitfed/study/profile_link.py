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
_FILE: Final = "tokenizer.json"
_LEAST_BITS_PER_S, _LARGEST_BITS_PER_S = 100.0, 1e13


def measure_link(server: str, tls: TlsSection | None, *, client: str = "profile") -> LinkSection:
    """Measure bandwidth and round trip.

    The round trip is that of a health check. Up goes a health check of a service with a long name, which no server has;
    down comes the tokenizer's file. Nothing of this changes the server's state, and nothing of the device's data is in
    it.

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
        latency_s = _round_trip_s(health)
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


def _round_trip_s(health: health_pb2_grpc.HealthStub) -> float:
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
    """Give bits per second of a file; None if the server has no such file, or one too small to tell."""
    asked = joining_pb2.DescribeRequest(protocol_version=PROTOCOL_VERSION, client=client)
    run_id = joining.Describe(asked, timeout=_FIRST_S).run_id
    request = joining_pb2.FetchSegmentsRequest(run_id=run_id, file=_FILE)
    got_bytes = 0

    def fetch() -> None:
        nonlocal got_bytes
        got_bytes = sum(len(chunk.data) for chunk in joining.FetchSegments(request, timeout=_CALL_S))

    try:
        took_s = _seconds(fetch)
        if took_s < _LONG_ENOUGH_S:
            took_s = min(took_s, *(_seconds(fetch) for _ in range(3)))
    except grpc.RpcError:
        return None
    return 8 * got_bytes / max(took_s - latency_s, 1e-9) if got_bytes >= _LEAST_BYTES else None


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _bounded(bits_per_s: float) -> float:
    return min(max(bits_per_s, _LEAST_BITS_PER_S), _LARGEST_BITS_PER_S)
