"""The sessions of a round's members, without updates, files or a model."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.errors import RoundLost
from splitfed.federation import Rounds
from splitfed.federation.variants import variant_of
from splitfed.proto.v1 import training_pb2
from splitfed.server.devices import Devices
from splitfed.server.member_session import MemberSession
from splitfed.server.round_policy import round_policy
from splitfed.server.round_sessions import RoundSessions
from splitfed.server.sessions import Limits, Operation, TrainSession
from splitfed.server.trunk_round import TrunkRound
from tests.server.recording_engine import RecordingEngine
from tests.service.conftest import server_config

TRUNK, ENDS = "model.layers.1.q.lora_B.weight", "model.layers.0.q.lora_B.weight"
GOES_ON = "Round 1 goes on without this session of '{}'; wait until it is asked again"


class Members:
    """The members of a run of two rounds, two unless told otherwise, and their sessions.

    Attributes:
        told: How often those who watch were told of a change.
    """

    def __init__(self, folder: Path, worker: ThreadPoolExecutor, *, agents: int = 2, **federation: Any) -> None:
        self.config = server_config(folder, federation={"agents": agents, **federation})
        self.engine = RecordingEngine()
        self.rounds = Rounds(agents, rounds=2, timeout_s=10.0, policy=round_policy(self.config))
        self.begun = self.told = 0
        self.sessions = RoundSessions(
            self.config,
            self.rounds,
            Devices(self.config.shared(), {ENDS: (3,)}, {}),
            self.engine,
            limits=Limits(sequences=4, tokens=32, hidden_size=8, answers=8),
            worker=worker,
            clock=lambda: 0.0,
            begin_again=self.begin,
            tell=self._tell,
        )
        self.begin()

    def join(self, *clients: str) -> None:
        for client in clients:
            self.rounds.join(client, 1, 0.0)

    def begin(self) -> list[MemberSession]:
        """Begin the current round, again if it was begun before."""
        trunk_round = TrunkRound(
            variant_of(self.config.federation.variant),
            self.engine,
            self.config.federation,
            adapter={TRUNK: torch.zeros(2, 3)},
            optimisers={},
            round=self.rounds.current,
            attempt=self.begun,
            trained=frozenset({TRUNK, ENDS}),
        )
        self.begun += 1
        return self.sessions.begin(trunk_round)

    async def _tell(self) -> None:
        self.told += 1


async def step(session: TrainSession, number: int) -> None:
    request = training_pb2.TrainRequest(number=number, step=training_pb2.Step(step=number))
    await session.answer(Operation(request, session.codecs, session.limits))


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as worker:
        yield worker


@pytest.fixture
def members(tmp_path: Path, worker: ThreadPoolExecutor) -> Members:
    return Members(tmp_path, worker)


@pytest.mark.parametrize("round", [0, 2])
async def test_a_session_of_a_round_that_is_not_open_is_refused(members: Members, round: int) -> None:
    members.join("a", "b")
    with pytest.raises(RoundLost, match=rf"Round {round} is not open; the run is at round 1 \(open\)"):
        await members.sessions.open("a", round, b"")


async def test_no_session_opens_while_the_run_waits(members: Members) -> None:
    members.join("a")
    with pytest.raises(RoundLost, match="waits for agents before it opens round 1"):
        await members.sessions.open("a", 1, b"")


async def test_a_stream_that_broke_finds_its_session(members: Members) -> None:
    members.join("a", "b")
    session = await members.sessions.open("a", 1, b"")
    await step(session, 0)
    assert await members.sessions.open("a", 1, session.token) is session
    assert members.sessions.of("a", 1) is session
    assert members.engine.steps[session.slot] == 1


async def test_a_round_that_is_opened_again_starts_from_its_beginning(members: Members) -> None:
    members.join("a", "b")
    first = await members.sessions.open("a", 1, b"")
    await step(first, 0)
    second = await members.sessions.open("a", 1, b"")
    assert not members.sessions.is_current(first)
    assert members.sessions.is_current(second)
    assert list(members.engine.states) == [second.slot]
    assert members.engine.steps[second.slot] == 0
    with pytest.raises(RoundLost, match="does not know this session"):
        await members.sessions.open("a", 1, first.token)
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await step(first, 1)


async def test_anothers_token_opens_nothing(members: Members) -> None:
    members.join("a", "b")
    session = await members.sessions.open("a", 1, b"")
    with pytest.raises(RoundLost, match="does not know this session"):
        await members.sessions.open("b", 1, session.token)


async def test_a_client_that_has_submitted_opens_no_further_session(members: Members) -> None:
    members.join("a", "b")
    members.rounds.submit("a", 1, 0.0)
    with pytest.raises(RoundLost, match="update of 'a' for round 1 is already here"):
        await members.sessions.open("a", 1, b"")


async def test_a_client_that_is_given_up_has_no_session(members: Members) -> None:
    members.join("a", "b")
    session = await members.sessions.open("a", 1, b"")
    assert members.sessions.give_up("a") is session
    assert members.sessions.give_up("a") is None
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        members.sessions.of("a", 1)


async def test_a_session_ends_with_its_round_unless_its_late_update_is_waited_for(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    members = Members(tmp_path, worker, agents=3, late_updates="merge", straggler_margin=1.0)
    members.join("a", "b", "c")
    first, late, second = [await members.sessions.open(client, 1, b"") for client in "abc"]
    await step(late, 0)
    for client in "ac":
        members.rounds.submit(client, 1, 1.0)
    assert members.rounds.cut_off_stragglers(2.0) == ["b"]
    members.rounds.commit(2.0)
    assert members.sessions.late == ["b"]
    assert members.begin() == [first, second]
    members.sessions.check_goes_on("b", 1)
    assert members.sessions.of("b", 1) is late
    with pytest.raises(RoundLost, match="Round 1 is not open; the run is at round 2"):
        members.sessions.check_goes_on("a", 1)


async def test_one_that_loses_its_place_in_joint_steps_is_taken_out_and_the_last_one_begins_again(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    members = Members(tmp_path, worker, variant="parallel")
    members.join("a", "b")
    a, b = [await members.sessions.open(client, 1, b"") for client in "ab"]
    members.sessions.give_up("b")
    await step(a, 0)
    with pytest.raises(RoundLost, match="Round 1 has begun without 'b'"):
        await members.sessions.open("b", 1, b"")
    assert (members.begun, members.told, members.rounds.taken_out) == (1, 1, ["b"])
    again = await members.sessions.open("a", 1, b"")
    assert (members.begun, members.told) == (2, 2)
    assert again.slot not in (a.slot, b.slot)
    assert a.slot not in members.engine.states
