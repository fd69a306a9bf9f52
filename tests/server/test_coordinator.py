"""A run's members, rounds and updates, on a clock that the tests hold and an engine without a model."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.errors import JoinRefused, ProtocolError, RoundLost, RunDirectoryError, ServerUnreachable
from splitfed.federation import Phase, UpdateRefused
from splitfed.proto.v1 import training_pb2
from splitfed.server.contribution import Contribution
from splitfed.server.coordinator import Coordinator
from splitfed.server.sessions import Operation, TrainSession
from splitfed.server.store import RunState, RunStore
from tests.server.recording_engine import RecordingEngine
from tests.service.conftest import server_config

IDS = {name: name.encode() * 16 for name in "abcdef"}
TRUNK, ENDS = "model.layers.1.q.lora_B.weight", "model.layers.0.q.lora_B.weight"
STEPS, TIMEOUT_S = 2, 10.0


class Run:
    """A run of two agents and two rounds unless told otherwise, from its start or from a state.

    Attributes:
        now_s: What the clock says.
        exported: The adapter of each round, as it was exported.
        may_write: Rounds are written while this is set.
        is_writing: Set once a round is being written.
    """

    def __init__(
        self,
        folder: Path,
        worker: ThreadPoolExecutor,
        *,
        agents: int = 2,
        rounds: int = 2,
        local_steps: int = STEPS,
        aggregation: Mapping[str, Any] = {},
        **federation: Any,
    ) -> None:
        self.now_s = 0.0
        self.exported: dict[int, dict[str, Tensor]] = {}
        self.may_write, self.is_writing = threading.Event(), threading.Event()
        self.may_write.set()
        self.config = server_config(
            folder,
            training={"rounds": rounds, "local_steps": local_steps},
            federation={"agents": agents, "agent_timeout_s": TIMEOUT_S, **federation},
            aggregation=aggregation,
        )
        self.engine = RecordingEngine()
        self.store = RunStore(folder / "run", {"name": "small"}, resume=True)
        state = self.store.load() or RunState(0, {TRUNK: torch.zeros(2, 3)}, {ENDS: torch.zeros(3)})
        self.coordinator = Coordinator(
            self.config,
            state,
            self.engine,
            self.store,
            export=self._export,
            worker=worker,
            hidden_size=8,
            clock=lambda: self.now_s,
        )

    async def join(self, *clients: str, weight: int = 1) -> None:
        for client in clients:
            await self.coordinator.join(client, IDS[client], weight)

    async def train(self, client: str, *, steps: int = STEPS) -> TrainSession:
        """Open a client's session in the current round and run some local steps."""
        session = await self.coordinator.open_session(client, self.coordinator.rounds.current, b"")
        for step in range(steps):
            request = training_pb2.TrainRequest(number=step, step=training_pb2.Step(step=step))
            await session.answer(Operation(request, session.codecs, session.limits))
        return session

    async def submit(self, client: str, value: float = 1.0, **contribution: Any) -> bool:
        round = self.coordinator.rounds.current
        ends = {ENDS: torch.full((3,), value)}
        return await self.coordinator.submit(client, round, ends, Contribution(**contribution))

    async def finish_round(self, *clients: str) -> None:
        for client in clients:
            await self.train(client)
        for client in clients:
            await self.submit(client)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.store.directory / "metrics.jsonl").read_text().splitlines()]

    def _export(self, round: int, state: Mapping[str, Tensor]) -> None:
        self.is_writing.set()
        assert self.may_write.wait(20)
        self.exported[round] = dict(state)
        self.store.adapter_folder(round).mkdir(parents=True, exist_ok=True)


async def time_passes(run: Run, seconds: float) -> None:
    """Let the clock go on, and the server look at it every second."""
    for _ in range(int(seconds)):
        run.now_s += 1
        await run.coordinator.tick()


async def watched(run: Run, client: str) -> list[tuple[Phase, int, bool]]:
    """Watch a run until there is nothing more to see."""
    return [view async for view in run.coordinator.watch(client)]


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as worker:
        yield worker


@pytest.fixture
def run(tmp_path: Path, worker: ThreadPoolExecutor) -> Iterator[Run]:
    run = Run(tmp_path, worker)
    yield run
    run.may_write.set()
    run.store.close()


async def test_a_run_opens_with_the_last_agent_that_it_waits_for(run: Run) -> None:
    await run.join("a")
    assert run.coordinator.rounds.phase is Phase.WAITING
    await run.join("b")
    assert run.coordinator.rounds.phase is Phase.OPEN


async def test_an_update_before_all_local_steps_is_refused_and_not_counted(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a", steps=STEPS - 1)
    with pytest.raises(ProtocolError, match="after 1 of 2 local steps"):
        await run.submit("a", 100.0)
    assert run.coordinator.rounds.submitted == []
    await run.train("a")
    await run.train("b")
    await run.submit("a", 1.0)
    await run.submit("b", 3.0)
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 2.0))


async def test_an_update_without_a_session_is_refused(run: Run) -> None:
    await run.join("a", "b")
    with pytest.raises(RoundLost, match="Round 1 goes on without this session of 'a'; wait until it is asked again"):
        await run.submit("a")
    assert run.coordinator.rounds.submitted == []


async def test_an_update_that_comes_again_is_not_counted_again(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.train("b")
    assert await run.submit("a", 1.0)
    assert not await run.submit("a", 100.0)
    await run.submit("b", 3.0)
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 2.0))


async def test_an_update_that_comes_again_after_the_round_is_over_is_lost(run: Run) -> None:
    await run.join("a", "b")
    await run.finish_round("a", "b")
    with pytest.raises(RoundLost, match="Round 1 is not open; the run is at round 2"):
        await run.coordinator.submit("a", 1, {ENDS: torch.zeros(3)}, Contribution())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
async def test_a_round_goes_on_without_a_refused_update_and_the_next_one_with_its_member(
    run: Run, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    await run.join("a", "b")
    session = await run.train("a")
    await run.train("b")
    with pytest.raises(UpdateRefused, match="must be between -2048 and 2048") as said:
        await run.submit("a", value)
    assert session.slot not in run.engine.states
    for again in (value, 1.0):  # a lost answer is given again, and there is no second try
        with pytest.raises(UpdateRefused, match=re.escape(str(said.value))):
            await run.submit("a", again)
    await run.submit("b", 3.0)
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 3.0))
    with pytest.raises(UpdateRefused, match=re.escape(str(said.value))):
        await run.coordinator.submit("a", 1, {ENDS: torch.zeros(3)}, Contribution())
    assert run.coordinator.last_counted("a") == 0
    await run.finish_round("a", "b")
    first, second = run.metrics()
    assert (first["refused"], list(first["agents"])) == ({"a": str(said.value)}, ["b"])
    assert ("refused" in second, list(second["agents"])) == (False, ["a", "b"])
    assert f"round 1 goes on without a, whose update is refused: {said.value}" in caplog.text


async def test_a_run_in_which_too_many_are_refused_says_what_to_do(run: Run) -> None:
    await run.join("a", "b")
    for client in "ab":
        assert run.coordinator.why_hopeless is None
        await run.train(client)
        with pytest.raises(UpdateRefused):
            await run.submit(client, 1e6)
    assert str(run.coordinator.why_hopeless).startswith(
        "round 1 cannot have its quorum of 1, for the updates of a, b were refused (" + repr(ENDS)
    )
    assert str(run.coordinator.why_hopeless).endswith("; lower training.learning_rate in a new run")
    await run.coordinator.tick()
    assert run.coordinator.rounds.current == 1


async def test_the_next_round_starts_from_the_weighted_mean_and_each_ones_optimiser(run: Run) -> None:
    await run.join("a", weight=3)
    await run.join("b", weight=1)
    await run.train("a")
    await run.train("b")
    await run.submit("a", 0.0)
    await run.submit("b", 4.0)
    assert run.coordinator.rounds.current == 2
    assert torch.equal(run.coordinator.start_of_round("a")[ENDS], torch.ones(3))
    session = await run.train("a")
    client, round, adapter, optimiser = run.engine.states[session.slot]
    assert (client, round) == ("a", 2)
    assert torch.equal(adapter[TRUNK], torch.ones(2, 3))  # each client's copy went from 0 to 1
    assert torch.equal(optimiser["moment"], torch.tensor([1.0]))


async def test_a_round_leaves_a_checkpoint_an_adapter_and_a_line(run: Run) -> None:
    await run.join("a", weight=3)
    await run.join("b")
    await run.train("a")
    await run.train("b")
    run.coordinator.figures.count_bytes("a", up=100, down=50)
    for seconds in (0.5, 1.25):
        run.coordinator.figures.count_seconds("a", seconds)
    run.now_s = 4.0
    await run.submit("a", tokens=64, training_loss=2.5)
    await run.submit("b", tokens=32)
    (line,) = run.metrics()
    nothing_told = {"training_loss": None, "held_out_loss": None, "server_seconds": 0.0}
    of_a = nothing_told | {"training_loss": 2.5, "server_seconds": 1.75}
    assert line == {
        "round": 1,
        "rounds": 2,
        "seconds": 4.0,
        "agents": {
            "a": {"weight": 3, "tokens": 64, "bytes_up": 100, "bytes_down": 50, **of_a},
            "b": {"weight": 1, "tokens": 32, "bytes_up": 0, "bytes_down": 0, **nothing_told},
        },
        "adapter": "adapters/round-0001",
        "aggregation": {"step_norm": 3.0},
    }
    saved = run.store.load()
    assert saved is not None
    assert (saved.round, saved.weights) == (1, {"a": 3, "b": 1})
    assert saved.agent_ids == {name: IDS[name].hex() for name in "ab"}
    assert run.store.final_adapter.is_dir()
    assert run.engine.states == {}


async def test_a_round_that_cannot_be_written_ends_the_server_and_sends_agents_away_for_a_while(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: RunState) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.store, "save", full)
    await run.join("a", "b")
    for client in "ab":
        await run.train(client)
    await run.submit("a")
    with pytest.raises(ServerUnreachable, match="cannot write the round"):
        await run.submit("b")
    with pytest.raises(RunDirectoryError, match=r"No space left on device.*--resume"):
        await run.coordinator.tick()
    assert run.store.load() is None


async def test_a_resumed_run_goes_on_with_its_members_and_no_other(
    run: Run, tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    await run.join("a", "b")
    await run.finish_round("a", "b")
    run.store.close()
    resumed = Run(tmp_path, worker)
    assert resumed.coordinator.rounds.current == 2
    with pytest.raises(JoinRefused, match="Another agent is called 'a'"):
        await resumed.coordinator.join("a", IDS["c"], 1)
    with pytest.raises(JoinRefused, match="agents already"):
        await resumed.join("c")
    await resumed.join("a", "b")
    await resumed.finish_round("a", "b")
    assert resumed.coordinator.rounds.phase is Phase.FINISHED
    resumed.store.close()


async def test_a_resumed_run_knows_what_a_member_holds_once_it_has_joined_again(
    run: Run, tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    await run.join("a", "b")
    run.coordinator.check_joined("a", IDS["a"])
    await run.finish_round("a", "b")
    run.store.close()
    again = Run(tmp_path, worker)
    resumed = again.coordinator
    resumed.check_member("a", IDS["a"])
    with pytest.raises(RoundLost, match="'a' has not joined since the server started again"):
        resumed.check_joined("a", IDS["a"])
    with pytest.raises(JoinRefused, match="Another agent is called 'a'"):
        resumed.check_joined("a", IDS["b"])
    await resumed.join("a", IDS["a"], 1)
    resumed.check_joined("a", IDS["a"])
    again.store.close()


async def test_a_resumed_run_goes_on_with_what_its_rule_keeps_from_round_to_round(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    """Round 1 goes from 0 to 1, and round 2 stays there: what moves it on is nine tenths of the first step."""
    aggregation = {"lora": "factors", "server_optimiser": "fedavgm"}
    run = Run(tmp_path, worker, aggregation=aggregation)
    await run.join("a", "b")
    await run.finish_round("a", "b")
    run.store.close()
    resumed = Run(tmp_path, worker, aggregation=aggregation)
    await resumed.join("a", "b")
    await resumed.finish_round("a", "b")
    resumed.store.close()
    torch.testing.assert_close(resumed.exported[2][ENDS], torch.full((3,), 1.9))


async def test_a_round_goes_on_without_a_silent_member(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await time_passes(run, TIMEOUT_S)
    await run.submit("a")
    await run.coordinator.tick()
    assert run.coordinator.rounds.current == 1
    await time_passes(run, 1)
    assert run.coordinator.rounds.current == 2
    assert list(run.metrics()[0]["agents"]) == ["a"]


async def test_a_server_that_stood_still_takes_nobody_for_silent(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.submit("a")
    run.now_s += 3600
    await run.coordinator.tick()
    assert run.coordinator.rounds.working == ["b"]
    await time_passes(run, TIMEOUT_S)
    assert run.coordinator.rounds.current == 2
    assert run.metrics()[0]["silent"] == ["b"]


async def test_every_request_keeps_a_member_in_the_round(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.submit("a")
    session = await run.coordinator.open_session("b", 1, b"")
    for step in range(STEPS):
        await time_passes(run, TIMEOUT_S)
        request = training_pb2.TrainRequest(number=step, step=training_pb2.Step(step=step))
        await session.answer(Operation(request, session.codecs, session.limits))
        await run.coordinator.tick()
    assert run.coordinator.rounds.current == 1
    await run.submit("b")
    assert run.coordinator.rounds.current == 2


async def test_a_member_that_comes_back_while_the_round_is_written_joins_the_next_one(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    run.may_write.clear()
    await run.submit("a")
    await time_passes(run, TIMEOUT_S)
    run.now_s += 1
    ticking = asyncio.create_task(run.coordinator.tick())
    assert await asyncio.to_thread(run.is_writing.wait, 20)
    await run.join("b")
    run.coordinator.note_progress("b")
    run.may_write.set()
    await asyncio.wait_for(ticking, 20)
    assert run.coordinator.rounds.current == 2
    await run.finish_round("a")
    assert run.coordinator.rounds.current == 2
    await run.finish_round("b")
    assert run.coordinator.rounds.phase is Phase.FINISHED


async def test_a_session_that_opens_while_the_last_round_is_cleared_away_is_kept(run: Run) -> None:
    opening: list[asyncio.Task[TrainSession]] = []
    empty = run.engine.empty

    async def open_meanwhile(slot: str) -> None:
        if not opening:
            opening.append(asyncio.create_task(run.coordinator.open_session("a", 2, b"")))
            await asyncio.sleep(0)
        await empty(slot)

    await run.join("a", "b")
    run.engine.empty = open_meanwhile  # type: ignore[method-assign]
    await run.finish_round("a", "b")
    session = await opening[0]
    assert run.coordinator.is_current(session)
    assert list(run.engine.states) == [session.slot]


async def test_a_watcher_sees_where_the_run_stands_after_every_change(run: Run) -> None:
    await run.join("a")
    watcher = run.coordinator.watch("a")
    assert await anext(watcher) == (Phase.WAITING, 1, False)
    await run.join("b")
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    await run.train("a")
    await run.submit("a")
    assert await anext(watcher) == (Phase.OPEN, 1, True)
    await run.finish_round("b")
    assert await anext(watcher) == (Phase.OPEN, 2, False)
    await run.finish_round("a", "b")
    assert (await anext(watcher))[0] is Phase.FINISHED
    assert [view async for view in watcher] == []


async def test_a_run_has_ended_when_every_member_has_heard_of_it(run: Run) -> None:
    await run.join("a", "b")
    for _ in range(2):
        await run.finish_round("a", "b")
    ending = asyncio.create_task(run.coordinator.wait_for_end())
    for client in "ab":
        assert not run.coordinator.has_ended
        assert [phase for phase, *_ in await watched(run, client)] == [Phase.FINISHED]
    await asyncio.wait_for(ending, 20)
    assert run.coordinator.has_ended


async def test_draining_takes_no_more_work_and_asks_to_come_back(run: Run) -> None:
    await run.join("a", "b")
    watching = asyncio.create_task(watched(run, "a"))
    session = await run.train("a")
    await run.coordinator.drain()
    assert [phase for phase, *_ in await asyncio.wait_for(watching, 20)][-1] is Phase.OPEN
    with pytest.raises(RoundLost):
        await run.coordinator.open_session("a", 1, session.token)
    with pytest.raises(ServerUnreachable, match="shutting down; come back"):
        await run.join("b")


async def test_a_round_goes_on_at_once_without_a_member_that_leaves(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    await run.join("a", "b")
    session = await run.train("b", steps=1)
    await run.train("a")
    await run.submit("a", 1.0)
    caplog.clear()
    with caplog.at_level("INFO", "splitfed"):
        await run.coordinator.leave("b")
        await run.coordinator.leave("b")
    assert [record.getMessage() for record in caplog.records] == ["b left (1 of 2 here)"]
    assert not run.coordinator.is_current(session)
    assert session.slot not in run.engine.states
    await run.coordinator.tick()
    assert run.coordinator.rounds.current == 2
    assert list(run.metrics()[0]["agents"]) == ["a"]
    assert torch.equal(run.exported[1][ENDS], torch.ones(3))
    await run.finish_round("a")
    assert run.coordinator.rounds.phase is Phase.FINISHED


async def test_what_a_member_submitted_before_it_left_counts(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.submit("a", 1.0)
    await run.coordinator.leave("a", for_good=True)
    await run.coordinator.tick()
    assert run.coordinator.rounds.current == 1
    await run.train("b")
    await run.submit("b", 3.0)
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 2.0))


async def test_a_member_that_left_joins_again_and_starts_its_round_from_the_beginning(run: Run) -> None:
    await run.join("a", "b")
    session = await run.train("b", steps=1)
    await run.coordinator.leave("b")
    for token in (session.token, b""):
        with pytest.raises(RoundLost, match="'b' left the run; join again"):
            await run.coordinator.open_session("b", 1, token)
    await run.join("b")
    await run.finish_round("a")
    assert run.coordinator.rounds.current == 1
    await run.finish_round("b")
    assert list(run.metrics()[0]["agents"]) == ["a", "b"]


async def test_a_member_that_left_for_good_is_refused_until_the_server_is_started_again(
    run: Run, tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    await run.join("a", "b")
    await run.finish_round("a", "b")
    await run.coordinator.leave("b", for_good=True)
    with pytest.raises(JoinRefused, match=r"'b' left the run 'small' for good.*--resume"):
        await run.join("b")
    run.store.close()
    resumed = Run(tmp_path, worker)
    await resumed.join("a", "b")
    assert resumed.coordinator.rounds.phase is Phase.OPEN
    resumed.store.close()


async def test_leaving_changes_nothing_that_the_others_see_of_an_open_round(run: Run) -> None:
    await run.join("a", "b")
    watcher = run.coordinator.watch("a")
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    following = asyncio.create_task(anext(watcher))  # type: ignore[arg-type]  # it is a coroutine
    await run.coordinator.leave("b", for_good=True)
    for _ in range(10):  # whatever woke the watcher would have come through by then
        await asyncio.sleep(0)
    assert not following.done()
    await run.finish_round("a")
    assert await following == (Phase.OPEN, 2, False)


async def test_a_run_that_nobody_is_left_in_says_that_it_waits(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    await run.join("a", "b")
    await run.coordinator.leave("a", for_good=True)
    await run.coordinator.leave("b")
    assert "nobody is here; the run waits for an agent to come back" in caplog.text
    await time_passes(run, 10 * TIMEOUT_S)
    assert not run.coordinator.rounds.is_abandoned
    await run.join("b")
    await run.finish_round("b")
    assert run.coordinator.rounds.current == 2


async def test_a_run_that_every_agent_left_for_good_is_abandoned_after_its_last_whole_round(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.submit("a")
    for client in "ab":
        await run.coordinator.leave(client, for_good=True)
    assert not run.coordinator.rounds.is_abandoned
    await run.coordinator.tick()
    assert run.coordinator.rounds.is_abandoned
    saved = run.store.load()
    assert saved is not None
    assert saved.round == 1


async def test_a_run_that_is_over_tells_it_to_no_one_that_left_for_good(run: Run) -> None:
    await run.join("a", "b")
    await run.coordinator.leave("b", for_good=True)
    for _ in range(2):
        await run.finish_round("a")
    assert not run.coordinator.has_ended
    await watched(run, "a")
    assert run.coordinator.has_ended


async def test_a_round_is_written_once_although_its_last_agent_hangs_up_meanwhile(run: Run) -> None:
    await run.join("a", "b")
    await run.train("a")
    await run.train("b")
    await run.submit("a")
    run.may_write.clear()
    submitting = asyncio.create_task(run.submit("b"))
    assert await asyncio.to_thread(run.is_writing.wait, 20)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    run.is_writing.clear()
    run.may_write.set()
    await run.coordinator.tick()
    assert run.coordinator.rounds.current == 2
    assert not run.is_writing.is_set()
    assert list(run.metrics()[0]["agents"]) == ["a", "b"]
