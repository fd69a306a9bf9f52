"""Where no server answers, that is said once at first, and in a sentence at the end."""

from typing import Any

import pytest

from splitfed.agent.no_server import gave_up, goes_on
from splitfed.config.agent import AgentSection
from splitfed.errors import ServerUnreachable

AGENT = AgentSection.model_validate({"name": "a", "server": "127.0.0.1:1", "state_directory": "state"})


def test_it_is_said_once_that_it_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    for tries in range(3):
        goes_on(AGENT, tries, ServerUnreachable("nobody is there"))
    assert [record.getMessage() for record in caplog.records] == [
        "no server at 127.0.0.1:1 (nobody is there); trying again"
    ]


def test_at_the_end_it_says_how_often_for_how_long_and_what_to_check() -> None:
    error: Any = gave_up(AGENT, 14, ServerUnreachable("nobody is there"))
    assert str(error) == (
        "No server answered at 127.0.0.1:1 (tries: 14, over 60 s); start it, or check [agent] server, [tls] on both "
        "sides (last reason: nobody is there)."
    )
