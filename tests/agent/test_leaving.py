"""What the server hears of an agent that stops: that it does, never why."""

import socket
from contextlib import closing
from typing import cast

import pytest

from splitfed.agent.leaving import leave
from splitfed.agent.server_calls import ServerCalls
from splitfed.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    JoinRefused,
    LedgerError,
    LinkError,
    NonFiniteLoss,
    RoundLost,
    ServerUnreachable,
    SplitFedError,
)


class Calls:
    """A connection that notes what goes over it.

    Attributes:
        left: Run and whether for good, of each leave.
        fails: What each leave raises.
        is_closed: The connection was closed.
    """

    def __init__(self, fails: SplitFedError | None = None) -> None:
        self.left: list[tuple[str, bool]] = []
        self.fails = fails
        self.is_closed = False

    def connect(self) -> ServerCalls:
        return cast(ServerCalls, self)

    def leave(self, run_id: str, *, for_good: bool) -> None:
        self.left.append((run_id, for_good))
        if self.fails is not None:
            raise self.fails

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("kind", [BudgetExhausted, NonFiniteLoss])
def test_what_the_agent_would_meet_again_is_for_good(kind: type[SplitFedError]) -> None:
    calls = Calls()
    leave(calls.connect, "run", kind("secret"))
    assert calls.left == [("run", True)]
    assert calls.is_closed


@pytest.mark.parametrize("kind", [LedgerError, DataError, JoinRefused, KeyboardInterrupt, MemoryError])
def test_after_anything_else_the_agent_may_come_back(kind: type[BaseException]) -> None:
    calls = Calls()
    leave(calls.connect, "run", kind("secret"))
    assert calls.left == [("run", False)]


def test_a_server_that_could_not_be_reached_is_not_tried_again() -> None:
    calls = Calls()
    leave(calls.connect, "run", ServerUnreachable("gone"))
    assert calls.left == []


@pytest.mark.parametrize("fails", [ServerUnreachable("gone"), RoundLost("who is that"), LinkError("Method not found")])
def test_a_leave_that_fails_is_tried_once_and_hides_nothing(
    fails: SplitFedError, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls(fails)
    with caplog.at_level("INFO", "splitfed"):
        leave(calls.connect, "run", BudgetExhausted("spent"))
    assert calls.left == [("run", True)]
    assert calls.is_closed
    assert f"did not hear that this agent stops ({fails})" in caplog.text


def test_a_connection_that_cannot_be_opened_hides_nothing() -> None:
    def connect() -> ServerCalls:
        raise ConfigError("The certificate file is gone.")

    leave(connect, "run", BudgetExhausted("spent"))


def test_a_server_that_does_not_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfed.agent.server_calls._LEAVE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            closing(ServerCalls(address, None, None, client="a", agent_id=bytes(16))) as calls,
            pytest.raises(ServerUnreachable),
        ):
            calls.leave("run", for_good=False)
