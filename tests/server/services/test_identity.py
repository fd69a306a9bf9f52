"""Who calls: only what is a name, only of this run, and under mutual TLS only what the certificate says."""

from types import SimpleNamespace
from typing import Any

import pytest

from splitfed.errors import JoinRefused, ProtocolError
from splitfed.server.services import Identity


def calling_as(*names: bytes) -> Any:
    """The context of a call over mutual TLS, or with no name over plain text."""
    facts = {"x509_common_name": list(names)} if names else {}
    return SimpleNamespace(auth_context=lambda: facts)


OPEN = Identity("run", is_secure=False)
SECURE = Identity("run", is_secure=True)


@pytest.mark.parametrize("client", ["a", "clinic-3", "A.b_c", "x" * 64])
def test_over_plain_text_a_name_is_what_the_caller_says(client: str) -> None:
    OPEN.check(calling_as(), client, "run")


@pytest.mark.parametrize(
    "client", ["", "x" * 65, ".", "..", "../a", "a/b", "a\\b", "a b", "a\n", "\x1b[2J", "a\0", "ä", ".hidden"]
)
def test_what_is_no_name_is_refused(client: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be an agent's name"):
        OPEN.check(calling_as(), client, "run")


def test_a_hostile_name_is_not_repeated_in_full() -> None:
    with pytest.raises(ProtocolError) as refused:
        OPEN.check(calling_as(), "x" * 100_000, "run")
    assert len(str(refused.value)) < 300


def test_another_run_is_refused() -> None:
    with pytest.raises(ProtocolError, match="serves the run 'run', not 'other'"):
        OPEN.check(calling_as(), "a", "other")


def test_before_a_caller_knows_the_run_it_names_none() -> None:
    OPEN.check(calling_as(), "a")


def test_over_mutual_tls_the_certificate_has_the_name() -> None:
    SECURE.check(calling_as(b"a"), "a", "run")


@pytest.mark.parametrize("names", [(), (b"b",), (b"\xff",)])
def test_over_mutual_tls_anothers_name_is_refused(names: tuple[bytes, ...]) -> None:
    with pytest.raises(JoinRefused, match="not for 'a'"):
        SECURE.check(calling_as(*names), "a", "run")
