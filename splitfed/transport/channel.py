"""Channels and ports: TLS, keep-alive and size limits, the same for every service."""

import grpc

from splitfed.config import TlsSection
from splitfed.transport.certificates import read_certificates
from splitfed.transport.tensors import MAX_MESSAGE_BYTES

_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

CHANNEL_OPTIONS = [
    *_LIMITS,
    # A peer that is gone without a word is noticed after 10 + 10 s, however long a computation takes.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Two agents on one machine are two agents: they share no connection.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS = [
    *_LIMITS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A second daemon on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
]


def open_channel(address: str, tls: TlsSection | None) -> grpc.Channel:
    """Open a channel to a server; it connects at its first call.

    Args:
        address: ``host:port``.
        tls: Certificates; none: plain text.

    Raises:
        ConfigError: If a certificate file cannot be used.
    """
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    own = read_certificates(tls)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=own.authority, private_key=own.key, certificate_chain=own.chain
    )
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def server_credentials(tls: TlsSection) -> grpc.ServerCredentials:
    """Give the server's side of mutual TLS: a client without a certificate of the authority is refused.

    Raises:
        ConfigError: If a certificate file cannot be used.
    """
    own = read_certificates(tls)
    return grpc.ssl_server_credentials(
        [(own.key, own.chain)], root_certificates=own.authority, require_client_auth=True
    )
