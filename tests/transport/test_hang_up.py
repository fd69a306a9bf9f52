"""Whether certificates are what a server misses, by a second handshake."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from splitfed.config import TlsSection
from splitfed.transport.channel import SERVER_OPTIONS, server_credentials
from splitfed.transport.hang_up import explain_hang_up
from tests.service.certificates import Authority


@contextmanager
def serving(tls: TlsSection | None) -> Iterator[str]:
    """Serve nothing over gRPC; gives the address."""
    server = grpc.server(ThreadPoolExecutor(1), options=SERVER_OPTIONS)
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(tls))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Answer a connection with something that is no handshake; gives the address."""

    def accept() -> None:
        connection, _ = listener.accept()
        with connection:
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_plain_text_where_tls_is_spoken_is_named(authority: Authority) -> None:
    with serving(authority.issue("server")) as address:
        assert "takes no plain text" in str(explain_hang_up(address, None))


def test_a_certificate_that_the_server_refuses_is_named(authority: Authority, tmp_path: Path) -> None:
    tls = Authority(tmp_path, "other").issue("a").model_copy(update={"authority": authority.file})
    with serving(authority.issue("server")) as address:
        assert f"does not accept this agent's certificate {tls.certificate}" in str(explain_hang_up(address, tls))


def test_a_server_that_takes_the_certificate_is_not_accused(authority: Authority) -> None:
    with serving(authority.issue("server")) as address:
        assert explain_hang_up(address, authority.issue("a")) is None


@pytest.mark.parametrize("has_tls", [False, True])
def test_a_server_that_speaks_plain_text_is_not_accused(authority: Authority, has_tls: bool) -> None:
    with serving(None) as address:
        assert explain_hang_up(address, authority.issue("a") if has_tls else None) is None


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        lambda connection: None,
        lambda connection: connection.recv(1),
        lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ],
    ids=["hangs up", "hangs up on the handshake", "is something else"],
)
def test_a_server_that_goes_away_is_not_accused(
    authority: Authority, answer: Callable[[socket.socket], None], has_tls: bool
) -> None:
    with answering(answer) as address:
        assert explain_hang_up(address, authority.issue("a") if has_tls else None) is None


def test_a_port_that_nobody_listens_on_is_not_accused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert explain_hang_up(f"127.0.0.1:{port}", None) is None


def test_a_server_that_says_nothing_is_not_waited_for_long(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfed.transport.hang_up._PATIENCE_S", 0.05)
    given_up = threading.Event()
    with answering(lambda connection: bool(given_up.wait(20)) and None) as address:
        assert explain_hang_up(address, authority.issue("a")) is None
        given_up.set()
