"""Errors cross the wire as status codes and come back as what they were."""

from collections.abc import Iterator

import grpc
import pytest

from splitfed import errors
from splitfed.errors import (
    FingerprintMismatch,
    JoinRefused,
    LinkError,
    ProtocolError,
    RoundLost,
    ServerUnreachable,
    SplitFedError,
)
from splitfed.transport.status import error_of, status_of

CROSSING = {ProtocolError, JoinRefused, FingerprintMismatch, RoundLost, ServerUnreachable}


def tree(kind: type[SplitFedError]) -> Iterator[type[SplitFedError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


EVERY_KIND = sorted(set(tree(SplitFedError)), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", sorted(CROSSING, key=lambda kind: kind.__name__))
def test_an_error_that_crosses_comes_back_as_the_same_class(kind: type[SplitFedError]) -> None:
    back = error_of(status_of(kind("round 3 is over")), "round 3 is over")
    assert type(back) is kind
    assert str(back) == "round 3 is over"


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind not in CROSSING])
def test_any_other_error_comes_back_as_a_failed_link_and_as_nothing_it_is_not(kind: type[SplitFedError]) -> None:
    assert status_of(kind("x")) is grpc.StatusCode.INTERNAL
    assert type(error_of(status_of(kind("x")), "x")) is LinkError


def test_an_error_of_a_finer_kind_crosses_as_the_kind_it_is_of() -> None:
    class WrongShape(ProtocolError):
        pass

    assert status_of(WrongShape("x")) is status_of(ProtocolError("x"))


def test_only_a_server_that_is_out_of_reach_is_worth_another_try() -> None:
    again = {code for code in grpc.StatusCode if isinstance(error_of(code, "x"), ServerUnreachable)}
    assert again == {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }


@pytest.mark.parametrize("code", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_code_that_stands_for_nothing_is_a_failed_link(code: grpc.StatusCode) -> None:
    assert type(error_of(code, "x")) is LinkError


@pytest.mark.parametrize("details", [None, ""])
def test_a_code_without_words_is_named(details: str | None) -> None:
    assert "DATA_LOSS" in str(error_of(grpc.StatusCode.DATA_LOSS, details))


@pytest.mark.parametrize(
    ("details", "advice"),
    [
        ("CERTIFICATE_VERIFY_FAILED: self-signed", "certificate is not accepted"),
        ("Hostname Verification Check failed.", "certificate is not accepted"),
        ("SSL_ERROR_SSL: WRONG_VERSION_NUMBER", "does not speak TLS"),
    ],
)
def test_a_handshake_that_no_further_try_will_mend_is_no_server_out_of_reach(details: str, advice: str) -> None:
    error = error_of(grpc.StatusCode.UNAVAILABLE, f"failed to connect to all addresses; {details}")
    assert type(error) is LinkError
    assert advice in str(error)
    assert details in str(error)
