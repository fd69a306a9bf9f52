"""One table between splitfed's errors and gRPC's status codes, read both ways."""

import grpc

from splitfed.errors import (
    FingerprintMismatch,
    JoinRefused,
    LinkError,
    ProtocolError,
    RoundLost,
    ServerUnreachable,
    SplitFedError,
)

_CODES: dict[type[SplitFedError], grpc.StatusCode] = {
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    JoinRefused: grpc.StatusCode.PERMISSION_DENIED,
    FingerprintMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    RoundLost: grpc.StatusCode.ABORTED,
    ServerUnreachable: grpc.StatusCode.UNAVAILABLE,
}
_NOT_ACCEPTED = (
    "The server's certificate is not accepted: [tls] authority must be the one that signed it, and [agent] server must "
    "be a name in it"
)
_HANDSHAKES = {
    "CERTIFICATE_VERIFY_FAILED": _NOT_ACCEPTED,
    "Hostname Verification Check failed": _NOT_ACCEPTED,
    "WRONG_VERSION_NUMBER": (
        "What listens at [agent] server does not speak TLS: check the address, and give the server a [tls] section too"
    ),
}
"""What gRPC says of a handshake that no further try will mend, and what to do about it."""
_ERRORS = {code: error for error, code in _CODES.items()}


def status_of(error: SplitFedError) -> grpc.StatusCode:
    """Give the status code that stands for an error; INTERNAL for one that has none."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)


def error_of(code: grpc.StatusCode, details: str | None) -> LinkError | FingerprintMismatch:
    """Give the error that a status code stands for; `ServerUnreachable` is the one that is worth another try."""
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE and details:
        for words, advice in _HANDSHAKES.items():
            if words in details:
                return LinkError(f"{advice} ({details}).")
    kind = _ERRORS.get(code, LinkError)
    message = details or f"The server answered {code.name}."
    return kind(message)  # type: ignore[return-value]


def error_of_call(error: grpc.RpcError) -> LinkError | FingerprintMismatch:
    """Translate what a gRPC call raised."""
    return error_of(error.code(), error.details())
