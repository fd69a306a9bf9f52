"""Variants under failure, on a clock that the tests hold: who waits for whom, who goes, and what counts how often."""

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.config import FederationSection
from splitfed.errors import ProtocolError, RoundLost, ServerUnreachable
from splitfed.federation import Phase, UpdateRefused
from splitfed.federation.cohort import ranked
from splitfed.federation.variants import Staleness
from splitfed.proto.v1 import training_pb2
from splitfed.server.contribution import Contribution
from splitfed.server.sessions import Operation, TrainSession
from splitfed.server.trunk_round import staleness_of
from splitfed.training.trunk_step import Applied
from splitfed.transport.tensors import to_messages
from tests.server.test_coordinator import ENDS, STEPS, TIMEOUT_S, TRUNK, Run, time_passes

SEED = 3
VARIANTS = ["sflv1", "sflv2", "parallel", "async"]
GOES_ON = "Round 1 goes on without this session of '{}'; wait until it is asked again"
OpenRun = Callable[..., Run]
Replies = list[training_pb2.TrainReply]


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[OpenRun]:
    runs: list[Run] = []
    with ThreadPoolExecutor(2) as worker:

        def open_next(variant: str = "parallel", **settings: Any) -> Run:
            runs.append(Run(tmp_path, worker, variant=variant, **settings))
            return runs[-1]

        yield open_next
        for run in runs:
            run.store.close()


async def start(run: Run, *clients: str) -> dict[str, TrainSession]:
    """Let all of them join, then open a session each."""
    await run.join(*clients)
    return await open_all(run, *clients)


async def open_all(run: Run, *clients: str) -> dict[str, TrainSession]:
    round = run.coordinator.rounds.current
    return {client: await run.coordinator.open_session(client, round, b"") for client in clients}


def ask(session: TrainSession, **body: Any) -> Awaitable[Replies]:
    request = training_pb2.TrainRequest(number=session.next_number, **body)
    return session.answer(Operation(request, session.codecs, session.limits))


async def step(session: TrainSession, number: int, **fields: Any) -> Replies:
    return await ask(session, step=training_pb2.Step(step=number, **fields))


async def forward(session: TrainSession, number: int = 0, **fields: Any) -> Replies:
    smashed, _ = to_messages(torch.ones(1, 2, 8), session.codecs.smashed)
    body = {"kind": training_pb2.KIND_TRAIN, "step": number, "smashed": smashed, **fields}
    return await ask(session, forward=training_pb2.Forward(**body))


async def asked(call: Awaitable[Any]) -> asyncio.Future[Any]:
    """Make a call that has to wait for others; gives it once it is there."""
    waiting = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    return waiting


async def step_together(sessions: dict[str, TrainSession], *numbers: int) -> None:
    for number in numbers:
        await asyncio.gather(*[step(session, number) for session in sessions.values()])


async def submit(run: Run, *clients: str, value: float = 1.0) -> None:
    for client in clients:
        round = run.coordinator.rounds.current
        assert await run.coordinator.submit(client, round, {ENDS: torch.full((3,), value)}, Contribution())


async def finish(run: Run, sessions: dict[str, TrainSession], *, done: int = 0) -> None:
    """Make the joint steps that are left, and submit."""
    await step_together(sessions, *range(done, run.config.training.local_steps))
    await submit(run, *sessions)


def together(run: Run) -> list[list[str]]:
    """Who made each joint step."""
    return [
        [slot.rpartition("/")[2] for slot in call[1:-1]] for call in run.engine.calls if call[0] == "apply together"
    ]


def agents_of(run: Run) -> list[list[str]]:
    return [list(line["agents"]) for line in run.metrics()]


# Joint steps: who waits for whom


async def test_a_joint_step_waits_for_everyone_and_is_applied_once(open_run: OpenRun) -> None:
    run = open_run(agents=3)
    sessions = await start(run, *"abc")
    waiting = [await asked(step(sessions[client], 0)) for client in "ca"]
    assert together(run) == []
    assert not any(call.done() for call in waiting)
    await step(sessions["b"], 0)
    await asyncio.gather(*waiting)
    assert together(run) == [["a", "b", "c"]]


async def test_those_that_wait_go_on_at_once_when_the_last_one_leaves(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    waiting = await asked(step(sessions["a"], 0))
    await run.coordinator.leave("b")
    await asyncio.wait_for(waiting, 20)
    assert together(run) == [["a"]]
    await finish(run, {"a": sessions["a"]}, done=1)
    await run.coordinator.tick()
    assert agents_of(run) == [["a"]]


async def test_those_that_wait_for_a_silent_one_are_not_silent_and_go_on_without_it(open_run: OpenRun) -> None:
    run = open_run(agents=3)
    sessions = await start(run, *"abc")
    waiting = [await asked(step(sessions[client], 0)) for client in "ac"]
    await time_passes(run, int(TIMEOUT_S))
    assert together(run) == []
    await time_passes(run, 1)
    await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert together(run) == [["a", "c"]]
    with pytest.raises(RoundLost, match=GOES_ON.format("b")):
        await step(sessions["b"], 0)


async def test_nobody_waits_for_one_that_was_asked_and_never_came(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    await run.join(*"ab")
    sessions = await open_all(run, "a")
    waiting = await asked(step(sessions["a"], 0))
    await time_passes(run, int(TIMEOUT_S) + 1)
    await asyncio.wait_for(waiting, 20)
    assert together(run) == [["a"]]


async def test_one_that_comes_after_joint_steps_have_begun_takes_part_in_the_next_round(open_run: OpenRun) -> None:
    run = open_run(agents=2, population=3)
    sessions = await start(run, *"ab")
    await run.join("c")
    with pytest.raises(RoundLost, match="Round 1 has begun without 'c'; it takes part in the next one"):
        await open_all(run, "c")
    assert not run.coordinator.rounds.may_start("c")
    await finish(run, sessions)
    assert together(run) == [["a", "b"]] * STEPS
    await finish(run, await open_all(run, *"abc"))
    assert agents_of(run) == [["a", "b"], ["a", "b", "c"]]
    assert run.metrics()[0]["taken_out"] == ["c"]


async def test_a_silent_one_that_comes_back_in_the_middle_takes_part_in_the_next_round(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    await step_together(sessions, 0)
    waiting = await asked(step(sessions["a"], 1))
    await time_passes(run, int(TIMEOUT_S) + 1)
    await waiting
    await run.join("b")
    with pytest.raises(RoundLost, match="Round 1 has begun without 'b'"):
        await open_all(run, "b")
    await submit(run, "a")
    await finish(run, await open_all(run, *"ab"))
    assert agents_of(run) == [["a"], ["a", "b"]]
    assert run.engine.states == {}


# Joint steps: a session that is started again


async def test_one_that_starts_again_is_taken_out_and_the_others_finish_the_round(
    open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(agents=3)
    sessions = await start(run, *"abc")
    await step_together(sessions, 0)
    waiting = [await asked(step(sessions[client], 1)) for client in "ac"]
    with pytest.raises(RoundLost, match="Round 1 has begun without 'b'"):
        await open_all(run, "b")
    await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert together(run) == [["a", "b", "c"], ["a", "c"]]
    with pytest.raises(RoundLost, match="'b' has no part in round 1 now"):
        await open_all(run, "b")
    assert {state[0] for state in run.engine.states.values()} == {"a", "c"}
    assert "begins again" not in caplog.text
    await submit(run, *"ac")
    await finish(run, await open_all(run, *"abc"))
    assert agents_of(run) == [["a", "c"], ["a", "b", "c"]]
    assert run.metrics()[0]["taken_out"] == ["b"]
    assert not {"late", "dropped"} & run.metrics()[0].keys()
    assert run.engine.states == {}


async def test_one_that_starts_again_before_anything_was_run_keeps_its_place(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    lost = await asked(step(sessions["b"], 0))
    sessions |= await open_all(run, "b")
    with pytest.raises(RoundLost, match=GOES_ON.format("b")):
        await asyncio.wait_for(lost, 20)
    await finish(run, sessions)
    assert together(run) == [["a", "b"]] * STEPS
    assert agents_of(run) == [["a", "b"]]


async def test_one_that_starts_again_while_its_first_joint_call_is_on_the_trunk_has_lost_its_place(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call was run, though no answer has come: taken in again, it would wait for what the others have done."""
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    on_trunk: Future[Any] = Future()
    monkeypatch.setattr(run.coordinator._trunk_round.joint, "_submit", lambda work: on_trunk)
    waiting = {client: await asked(step(session, 0)) for client, session in sessions.items()}
    with pytest.raises(RoundLost, match="Round 1 has begun without 'b'"):
        await open_all(run, "b")
    monkeypatch.undo()
    on_trunk.set_result([Applied(1, 0.0)] * 2)
    await asyncio.wait_for(asyncio.gather(*waiting.values()), 20)
    await asyncio.wait_for(step(sessions["a"], 1), 20)
    assert together(run) == [["a"]]


async def test_one_alone_that_starts_again_begins_the_round_again(
    open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(agents=1)
    sessions = await start(run, "a")
    await step_together(sessions, 0)
    again = await open_all(run, "a")
    assert "round 1 begins again: too few are left to finish it" in caplog.text
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await step(sessions["a"], 1)
    assert run.engine.calls.count(("open_shared", "(shared)")) == 2
    await finish(run, again)
    assert agents_of(run) == [["a"]]


async def test_one_whose_update_was_refused_has_no_part_in_a_round_that_begins_again(open_run: OpenRun) -> None:
    run = open_run(agents=3, quorum=2)
    sessions = await start(run, *"abc")
    await step_together(sessions, *range(STEPS))
    with pytest.raises(UpdateRefused):
        await submit(run, "a", value=math.nan)
    await run.coordinator.open_session("b", 1, b"")
    with pytest.raises(RoundLost, match="has no part in round 1 now"):
        await run.coordinator.open_session("a", 1, b"")
    await finish(run, await open_all(run, *"bc"))
    await run.coordinator.tick()
    (line,) = run.metrics()
    assert (list(line["agents"]), list(line["refused"]), line["begun_again"]) == (["b", "c"], ["a"], 1)


async def test_all_that_start_again_one_after_the_other_begin_the_round_again(open_run: OpenRun) -> None:
    run = open_run(agents=3)
    await step_together(await start(run, *"abc"), 0)
    for client in "ab":
        with pytest.raises(RoundLost, match="has begun without"):
            await open_all(run, client)
    watcher = run.coordinator.watch("a")
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    assert not run.coordinator.rounds.may_start("a")
    sessions = await open_all(run, "c")
    assert await asyncio.wait_for(anext(watcher), 20) == (Phase.OPEN, 1, False)
    assert run.coordinator.rounds.may_start("a")
    sessions |= await open_all(run, *"ab")
    await finish(run, sessions)
    assert agents_of(run) == [["a", "b", "c"]]


async def test_one_that_was_taken_out_finishes_alone_when_the_last_one_in_the_round_goes(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    await step_together(sessions, 0)
    with pytest.raises(RoundLost, match="has begun without"):
        await open_all(run, "b")
    watcher = run.coordinator.watch("b")
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    assert not run.coordinator.rounds.may_start("b")
    await run.coordinator.leave("a", for_good=True)
    await run.coordinator.tick()
    assert await asyncio.wait_for(anext(watcher), 20) == (Phase.OPEN, 1, False)
    assert run.coordinator.rounds.may_start("b")
    assert run.engine.states == {}
    await finish(run, await open_all(run, "b"))
    assert agents_of(run) == [["b"]]
    assert run.metrics()[0]["begun_again"] == 1


async def test_several_go_at_once_and_the_others_finish(open_run: OpenRun) -> None:
    run = open_run(agents=5)
    sessions = await start(run, *"abcde")
    await step_together(sessions, 0)
    waiting = [await asked(step(sessions[client], 1)) for client in "ad"]
    results = await asyncio.gather(
        open_all(run, "b"), run.coordinator.leave("c"), open_all(run, "e"), return_exceptions=True
    )
    assert [type(result) for result in results] == [RoundLost, type(None), RoundLost]
    await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert together(run)[-1] == ["a", "d"]
    await submit(run, *"ad")
    assert agents_of(run) == [["a", "d"]]


async def test_a_round_that_begins_again_counts_nothing_of_its_first_attempt(open_run: OpenRun) -> None:
    run = open_run(agents=2, quorum=2)
    sessions = await start(run, *"ab")
    await step_together(sessions, *range(STEPS))
    await submit(run, "a", value=100.0)
    assert run.coordinator.last_counted("a") == 1
    again = await open_all(run, "b")  # too few are left without it
    assert run.coordinator.last_counted("a") == 0
    assert run.coordinator.rounds.submitted == []
    again |= await open_all(run, "a")
    await finish(run, again)
    assert torch.equal(run.exported[1][ENDS], torch.ones(3))


async def test_an_update_of_an_attempt_that_is_over_is_lost_and_does_not_end_its_agent(open_run: OpenRun) -> None:
    run = open_run(agents=2, quorum=2)
    await step_together(await start(run, *"ab"), *range(STEPS))
    again = await open_all(run, "b")
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await submit(run, "a", value=100.0)
    again |= await open_all(run, "a")
    await finish(run, again)
    assert torch.equal(run.exported[1][ENDS], torch.ones(3))


# Joint steps: stragglers


async def behind(run: Run) -> tuple[dict[str, TrainSession], asyncio.Future[Any]]:
    """Let a, b and c make four joint steps, a second each, and a and c wait for b in the fifth."""
    sessions = await start(run, *"abc")
    for number in range(4):
        await time_passes(run, 1)
        await step_together(sessions, number)
    return sessions, asyncio.gather(await asked(step(sessions["a"], 4)), await asked(step(sessions["c"], 4)))


async def test_who_holds_up_a_joint_step_beyond_the_margin_is_taken_out_and_back_in_the_next_round(
    open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(agents=3, local_steps=5, straggler_margin=3.0, agent_timeout_s=1e6)
    sessions, waiting = await behind(run)
    await time_passes(run, 4)
    assert not waiting.done()  # beyond the margin for the first time: the server may have stood still
    await time_passes(run, 1)
    await asyncio.wait_for(waiting, 20)
    assert "round 1 goes on without b: its joint steps wait for it" in caplog.text
    for call in (step(sessions["b"], 4), submit(run, "b")):
        with pytest.raises(RoundLost, match=GOES_ON.format("b")):
            await call
    await submit(run, *"ac")
    assert run.metrics()[0]["taken_out"] == ["b"]
    await finish(run, await open_all(run, *"abc"))
    assert agents_of(run) == [["a", "c"], ["a", "b", "c"]]


async def test_who_holds_up_a_rounds_first_step_is_taken_out_by_what_it_took_before_and_not_asked_again(
    open_run: OpenRun,
) -> None:
    """A round of one step, which the cohort makes in a second; in the next one b does not even open its session."""
    run = open_run(agents=3, rounds=4, local_steps=1, straggler_margin=3.0, agent_timeout_s=1e6)
    sessions = await start(run, *"abc")
    await time_passes(run, 1)
    await finish(run, sessions)
    await time_passes(run, 50)
    sessions = await open_all(run, *"ac")
    waiting = asyncio.gather(*[await asked(step(session, 0)) for session in sessions.values()])
    await time_passes(run, 4)
    assert not waiting.done()
    await time_passes(run, 1)
    await asyncio.wait_for(waiting, 20)
    await submit(run, *"ac")
    assert run.metrics()[1]["taken_out"] == ["b"]
    assert run.coordinator.rounds.selected == ["a", "c"]
    await finish(run, await open_all(run, *"ac"))
    await run.join("b")
    await finish(run, await open_all(run, *"abc"))
    assert agents_of(run) == [["a", "b", "c"], ["a", "c"], ["a", "c"], ["a", "b", "c"]]


async def test_a_round_that_began_again_says_how_often(open_run: OpenRun) -> None:
    run = open_run(agents=1)
    await step_together(await start(run, "a"), 0)
    await finish(run, await open_all(run, "a"))
    await finish(run, await open_all(run, "a"))
    assert [line.get("begun_again") for line in run.metrics()] == [1, None]


async def test_who_cannot_be_spared_is_waited_for(open_run: OpenRun) -> None:
    run = open_run(agents=3, quorum=3, local_steps=5, straggler_margin=3.0, agent_timeout_s=1e6)
    sessions, waiting = await behind(run)
    await time_passes(run, 30)
    await step(sessions["b"], 4)
    await asyncio.wait_for(waiting, 20)
    assert together(run)[-1] == ["a", "b", "c"]


async def test_a_clock_that_jumps_takes_nobody_out(open_run: OpenRun) -> None:
    run = open_run(agents=3, local_steps=5, straggler_margin=3.0, agent_timeout_s=1e6)
    sessions, waiting = await behind(run)
    run.now_s += 3600
    await run.coordinator.tick()
    await time_passes(run, 1)
    assert not waiting.done()
    await step(sessions["b"], 4)
    await asyncio.wait_for(waiting, 20)
    assert together(run)[-1] == ["a", "b", "c"]


# What is hostile


async def test_one_that_asks_for_something_else_goes_and_the_others_finish_the_round(
    open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(agents=3)
    sessions = await start(run, *"abc")
    odd = await asked(step(sessions["c"], 0))
    outputs = await asyncio.wait_for(asyncio.gather(*[forward(sessions[client]) for client in "ab"]), 20)
    assert [reply.WhichOneof("body") for (reply, *_) in outputs] == ["trunk_output"] * 2
    with pytest.raises(ProtocolError, match="This agent is out of step"):
        await odd
    with pytest.raises(RoundLost):
        await step(sessions["c"], 0)
    await run.coordinator.tick()
    assert "round 1 goes on without c: it asked what was not due" in caplog.text
    sessions.pop("c")
    await finish(run, sessions)
    assert agents_of(run) == [["a", "b"]]
    assert run.engine.states == {}


@pytest.mark.parametrize("squared_norm", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("variant", ["parallel", "async"])
async def test_a_squared_norm_that_is_none_is_refused_and_nobody_waits_for_its_sender(
    open_run: OpenRun, variant: str, squared_norm: float
) -> None:
    run = open_run(variant, agents=2)
    sessions = await start(run, *"ab")
    waiting = await asked(step(sessions["a"], 0))
    with pytest.raises(ProtocolError, match="'b' have the squared norm"):
        await step(sessions["b"], 0, squared_norm=squared_norm)
    await asyncio.wait_for(waiting, 20)
    applied = [call for call in run.engine.calls if call[0].startswith("apply")]
    assert len(applied) == 1


async def test_more_tokens_than_a_step_has_are_refused_and_nobody_waits_for_their_sender(open_run: OpenRun) -> None:
    run = open_run(agents=2)
    sessions = await start(run, *"ab")
    waiting = asyncio.ensure_future(forward(sessions["a"], step_tokens=4 * 32))
    with pytest.raises(ProtocolError, match="A step of 129 tokens is more than this run's steps have"):
        await forward(sessions["b"], step_tokens=4 * 32 + 1)
    (reply,) = await asyncio.wait_for(waiting, 20)
    assert reply.WhichOneof("body") == "trunk_output"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
async def test_a_round_goes_on_without_a_refused_update_in_every_variant(
    open_run: OpenRun, variant: str, value: float
) -> None:
    run = open_run(variant, agents=2)
    await run.join(*"ab")
    first, second = ranked("ab", seed=SEED, round=1)
    sessions = await open_all(run, first) if variant == "sflv2" else await open_all(run, *"ab")
    await step_together(sessions, *range(STEPS))
    with pytest.raises(UpdateRefused, match="must be between"):
        await submit(run, first, value=value)
    assert run.coordinator.rounds.submitted == []
    if variant == "sflv2":
        await step_together(await open_all(run, second), *range(STEPS))
    await submit(run, second, value=3.0)
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 3.0))
    assert agents_of(run) == [[second]]
    assert run.metrics()[0]["refused"].keys() == {first}
    assert run.engine.states == {}
    assert run.coordinator.rounds.selected == ["a", "b"]


@pytest.mark.parametrize("variant", VARIANTS)
async def test_an_update_that_comes_twice_is_counted_once_in_every_variant(open_run: OpenRun, variant: str) -> None:
    run = open_run(variant, agents=2)
    await run.join(*"ab")
    for client in ranked("ab", seed=SEED, round=1):
        if variant == "sflv2" or client == ranked("ab", seed=SEED, round=1)[0]:
            sessions = await open_all(run, client) if variant == "sflv2" else await open_all(run, *"ab")
            await step_together(sessions, *range(STEPS))
        await submit(run, client, value=1.0 if client == "a" else 3.0)
        if run.coordinator.rounds.current == 1:
            assert not await run.coordinator.submit(client, 1, {ENDS: torch.full((3,), 9.0)}, Contribution())
    assert torch.equal(run.exported[1][ENDS], torch.full((3,), 2.0))


# The mean gradient


async def mean(run: Run, client: str, value: float, *, step: int = 0, tokens: int = 1) -> dict[str, Tensor]:
    gradients = {ENDS: torch.full((3,), value)}
    return await run.coordinator.mean_gradient(client, 1, step, gradients, tokens=tokens)


async def test_the_mean_gradient_is_weighted_by_tokens_and_given_to_all(open_run: OpenRun) -> None:
    run = open_run(agents=2, merge_ends="step")
    await start(run, *"ab")
    first = await asked(mean(run, "b", 4.0, tokens=3))
    assert not first.done()
    second = await mean(run, "a", 8.0, tokens=1)
    assert torch.equal(second[ENDS], torch.full((3,), 5.0))
    assert torch.equal((await first)[ENDS], second[ENDS])


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_gradient_that_is_sent_again_after_a_lost_answer_is_counted_once(
    open_run: OpenRun, is_late: bool
) -> None:
    run = open_run(agents=2, merge_ends="step")
    await start(run, *"ab")
    lost = await asked(mean(run, "a", 8.0))
    lost.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lost
    if is_late:
        others = await mean(run, "b", 4.0)
        again = await mean(run, "a", 8.0)
    else:
        waiting = await asked(mean(run, "a", 8.0))
        others = await mean(run, "b", 4.0)
        again = await waiting
    assert torch.equal(again[ENDS], torch.full((3,), 6.0))
    assert torch.equal(others[ENDS], again[ENDS])


async def test_a_call_that_broke_before_its_round_went_on_without_the_agent_is_no_error_of_the_server(
    open_run: OpenRun,
) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    run = open_run(agents=2, merge_ends="step")
    await start(run, *"ab")
    broken = await asked(mean(run, "a", 8.0))
    broken.cancel()
    with pytest.raises(asyncio.CancelledError):
        await broken
    await run.coordinator.leave("a")
    for _ in range(3):
        await asyncio.sleep(0)
    del broken
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize(
    ("value", "tokens", "why"),
    [
        (math.nan, 1, "gradients of 'b' are not finite; lower the learning rate"),
        (-math.inf, 1, "gradients of 'b' are not finite"),
        (1.0, 0, "Gradients of 0 tokens do not come from one of this run's steps"),
        (1.0, 4 * 32 + 1, "Gradients of 129 tokens"),
    ],
)
async def test_hostile_gradients_are_refused_and_not_in_the_mean(
    open_run: OpenRun, value: float, tokens: int, why: str
) -> None:
    run = open_run(agents=2, merge_ends="step")
    await start(run, *"ab")
    waiting = await asked(mean(run, "a", 2.0))
    with pytest.raises(ProtocolError, match=why):
        await mean(run, "b", value, tokens=tokens)
    assert not waiting.done()
    await mean(run, "b", 4.0)
    assert torch.equal((await waiting)[ENDS], torch.full((3,), 3.0))


async def test_gradients_of_another_step_or_of_nobodys_session_are_refused(open_run: OpenRun) -> None:
    run = open_run(agents=2, merge_ends="step")
    await run.join(*"ab")
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await mean(run, "a", 1.0)
    await open_all(run, *"ab")
    with pytest.raises(ProtocolError, match="Gradients of step 7 came; those of step 0 are due"):
        await mean(run, "a", 1.0, step=7)


async def test_a_run_that_merges_ends_once_a_round_takes_no_gradients(open_run: OpenRun) -> None:
    run = open_run(agents=1)
    await start(run, "a")
    with pytest.raises(ProtocolError, match="does not merge bottom and top at every step"):
        await mean(run, "a", 1.0)


async def test_the_mean_goes_on_without_one_that_leaves_and_the_one_that_waits_is_not_silent(open_run: OpenRun) -> None:
    run = open_run(agents=3, merge_ends="step")
    await start(run, *"abc")
    waiting = [await asked(mean(run, client, 2.0)) for client in "ab"]
    await time_passes(run, int(TIMEOUT_S) - 1)
    assert not any(call.done() for call in waiting)
    await run.coordinator.leave("c")
    means = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert torch.equal(means[0][ENDS], torch.full((3,), 2.0))


async def test_an_answer_that_has_come_takes_nobody_for_silent_that_waits_for_another_one(open_run: OpenRun) -> None:
    run = open_run(agents=2, merge_ends="step")
    sessions = await start(run, *"ab")
    stepping = await asked(step(sessions["a"], 0))
    waiting = await asked(mean(run, "a", 2.0))
    await mean(run, "b", 2.0)
    await waiting
    for _ in range(3):
        run.coordinator.note_progress("b")
        await time_passes(run, int(TIMEOUT_S))
    assert run.coordinator.rounds.joined == 2
    await step(sessions["b"], 0)
    await asyncio.wait_for(stepping, 20)


async def test_one_that_is_taken_out_while_it_waits_for_the_mean_is_told_so(open_run: OpenRun) -> None:
    run = open_run(agents=3, merge_ends="step")
    sessions = await start(run, *"abc")
    await step_together(sessions, 0)
    lost = await asked(mean(run, "a", 2.0))
    with pytest.raises(RoundLost, match="has begun without"):
        await open_all(run, "a")
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await asyncio.wait_for(lost, 20)


# Races


@pytest.mark.parametrize("variant", ["sflv1", "parallel", "async"])
async def test_two_openings_at_once_leave_one_session_and_one_slot(open_run: OpenRun, variant: str) -> None:
    run = open_run(variant, agents=1)
    await run.join("a")
    opened = await asyncio.gather(*[run.coordinator.open_session("a", 1, b"") for _ in range(3)])
    current = [session for session in opened if run.coordinator.is_current(session)]
    assert len(current) == 1
    assert list(run.engine.states) == [current[0].slot]
    for session in opened:
        if session is not current[0]:
            with pytest.raises(RoundLost, match=GOES_ON.format("a")):
                await step(session, 0)
    await finish(run, {"a": current[0]})
    assert run.engine.states == {}


class Gate:
    """Holds the engine's word that it has filled a slot."""

    def __init__(self, run: Run) -> None:
        self.is_reached, self.may_go = asyncio.Event(), asyncio.Event()
        self._open_round, run.engine.open_round = run.engine.open_round, self._hold  # type: ignore[method-assign]

    async def _hold(self, *given: Any, **named: Any) -> None:
        await self._open_round(*given, **named)
        self.is_reached.set()
        await self.may_go.wait()


@pytest.mark.parametrize("variant", VARIANTS)
async def test_one_that_hangs_up_while_its_round_is_opened_leaves_no_slot_behind(
    open_run: OpenRun, variant: str
) -> None:
    run = open_run(variant, agents=1)
    await run.join("a")
    gate = Gate(run)
    opening = asyncio.ensure_future(run.coordinator.open_session("a", 1, b""))
    await gate.is_reached.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gate.may_go.set()
    sessions = await open_all(run, "a")
    assert list(run.engine.states) == [sessions["a"].slot]
    await finish(run, sessions)
    assert agents_of(run) == [["a"]]
    assert run.engine.states == {}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_one_that_leaves_while_its_round_is_opened_has_no_session(open_run: OpenRun, variant: str) -> None:
    run = open_run(variant, agents=1)
    await run.join("a")
    gate = Gate(run)
    opening = asyncio.ensure_future(run.coordinator.open_session("a", 1, b""))
    await gate.is_reached.wait()
    await run.coordinator.leave("a")
    gate.may_go.set()
    with pytest.raises(RoundLost, match=GOES_ON.format("a")):
        await opening
    assert run.engine.states == {}
    await run.join("a")
    if variant == "parallel":  # its place was given up with it, and nobody else is left: the round begins again
        with pytest.raises(RoundLost, match="has begun without"):
            await open_all(run, "a")
    await finish(run, await open_all(run, "a"))
    assert agents_of(run) == [["a"]]


@pytest.mark.parametrize("variant", ["sflv1", "parallel", "async"])
async def test_a_round_that_is_being_written_opens_no_session(open_run: OpenRun, variant: str) -> None:
    run = open_run(variant, agents=2)
    sessions = await start(run, *"ab")
    await step_together(sessions, *range(STEPS))
    await submit(run, "a")
    run.may_write.clear()
    submitting = asyncio.ensure_future(submit(run, "b"))
    assert await asyncio.to_thread(run.is_writing.wait, 20)
    opening = asyncio.ensure_future(run.coordinator.open_session("b", 1, b""))
    await asyncio.sleep(0)
    run.may_write.set()
    await asyncio.wait_for(submitting, 20)
    with pytest.raises(RoundLost, match="Round 1 is not open; the run is at round 2"):
        await opening
    assert run.engine.states == {}


@pytest.mark.parametrize("merge_ends", ["round", "step"])
async def test_a_server_that_drains_lets_those_go_that_wait_for_each_other(open_run: OpenRun, merge_ends: str) -> None:
    run = open_run(agents=2, merge_ends=merge_ends)
    sessions = await start(run, *"ab")
    waiting = [await asked(step(sessions["a"], 0))]
    if merge_ends == "step":
        waiting.append(await asked(mean(run, "a", 2.0)))
    await run.coordinator.drain()
    for call in waiting:
        with pytest.raises(ServerUnreachable, match="shutting down; come back"):
            await asyncio.wait_for(call, 20)
    with pytest.raises(ServerUnreachable):
        await step(sessions["b"], 0)


# Turns


async def turns(run: Run, *clients: str) -> list[str]:
    await run.join(*clients)
    return ranked(clients, seed=SEED, round=1)


def start_of(run: Run, session: TrainSession) -> tuple[Tensor, dict[str, Tensor]]:
    """The trunk adapter and the optimiser's state that a session began with."""
    _, _, adapter, optimiser = run.engine.states[session.slot]
    return adapter[TRUNK], optimiser


async def test_one_adapter_and_one_optimiser_go_from_turn_to_turn(open_run: OpenRun) -> None:
    """Each turn adds one to the trunk, and leaves the optimiser's state of its round."""
    run = open_run("sflv2", agents=3)
    for turn, client in enumerate(await turns(run, *"abc")):
        sessions = await open_all(run, client)
        trunk, optimiser = start_of(run, sessions[client])
        assert torch.equal(trunk, torch.full((2, 3), float(turn)))
        assert bool(optimiser) == (turn > 0)
        await finish(run, sessions)
    assert torch.equal(run.exported[1][TRUNK], torch.full((2, 3), 3.0))
    assert run.engine.states == {}


@pytest.mark.parametrize("goes", ["leaves", "falls silent", "starts again"])
async def test_the_next_turn_goes_on_from_the_last_one_that_was_finished(open_run: OpenRun, goes: str) -> None:
    run = open_run("sflv2", agents=3)
    first, second, third = await turns(run, *"abc")
    await finish(run, await open_all(run, first))
    lost = await open_all(run, second)
    await step(lost[second], 0)
    if goes == "leaves":
        await run.coordinator.leave(second)
    elif goes == "falls silent":
        run.coordinator.note_progress(third)
        await time_passes(run, int(TIMEOUT_S) + 1)
    else:
        again = await open_all(run, second)
        assert torch.equal(start_of(run, again[second])[0], torch.ones(2, 3))
        await finish(run, again)
    sessions = await open_all(run, third)
    done = 2 if goes == "starts again" else 1
    assert torch.equal(start_of(run, sessions[third])[0], torch.full((2, 3), float(done)))
    with pytest.raises(RoundLost):
        await step(lost[second], 1)
    await finish(run, sessions)
    await run.coordinator.tick()
    assert torch.equal(run.exported[1][TRUNK], torch.full((2, 3), done + 1.0))


async def test_a_turn_whose_update_is_refused_leaves_nothing_to_the_next_one(open_run: OpenRun) -> None:
    run = open_run("sflv2", agents=2)
    first, second = await turns(run, *"ab")
    await step_together(await open_all(run, first), *range(STEPS))
    with pytest.raises(UpdateRefused):
        await submit(run, first, value=math.nan)
    sessions = await open_all(run, second)
    trunk, optimiser = start_of(run, sessions[second])
    assert torch.equal(trunk, torch.zeros(2, 3))
    assert optimiser == {}


async def test_a_copy_whose_update_is_refused_leaves_its_optimiser_as_it_was(open_run: OpenRun) -> None:
    run = open_run("sflv1", agents=2)
    sessions = await start(run, *"ab")
    await step_together(sessions, *range(STEPS))
    with pytest.raises(UpdateRefused):
        await submit(run, "a", value=math.nan)
    await submit(run, "b")
    await run.coordinator.tick()
    saved = run.store.load()
    assert saved is not None
    assert (saved.optimisers["a"], list(saved.optimisers["b"])) == ({}, ["moment"])


async def test_a_turn_that_leaves_an_adapter_that_is_not_finite_is_refused(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run("sflv2", agents=1)
    sessions = await start(run, "a")
    await step_together(sessions, *range(STEPS))

    async def spoilt(slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {TRUNK: torch.full((2, 3), math.nan)}, {}

    monkeypatch.setattr(run.engine, "snapshot", spoilt)
    with pytest.raises(UpdateRefused, match=f"'{TRUNK}' has values from nan to nan"):
        await submit(run, "a")
    assert run.coordinator.rounds.submitted == []


async def test_the_next_turn_goes_on_from_one_that_is_cut_short(open_run: OpenRun) -> None:
    """A turn adds one to each of six elements, and the ends change by nothing."""
    run = open_run("sflv2", agents=2, aggregation={"norm_bound": 0.5 * math.sqrt(6)})
    first, second = await turns(run, *"ab")
    await step_together(await open_all(run, first), *range(STEPS))
    await submit(run, first, value=0.0)
    sessions = await open_all(run, second)
    torch.testing.assert_close(start_of(run, sessions[second])[0], torch.full((2, 3), 0.5))
    await finish(run, sessions)
    await run.coordinator.tick()
    assert run.metrics()[0]["aggregation"]["clipped"] == 2


async def test_a_submission_of_one_whose_turn_is_lost_does_not_end_its_agent(open_run: OpenRun) -> None:
    run = open_run("sflv2", agents=2)
    first, second = await turns(run, *"ab")
    await step_together(await open_all(run, first), *range(STEPS))
    run.coordinator.note_progress(second)
    await time_passes(run, int(TIMEOUT_S) + 1)
    with pytest.raises(RoundLost, match=GOES_ON.format(first)):
        await submit(run, first)
    sessions = await open_all(run, second)
    assert torch.equal(start_of(run, sessions[second])[0], torch.zeros(2, 3))


# Free steps


async def held_back(run: Run) -> tuple[dict[str, TrainSession], asyncio.Future[Any]]:
    """Let a begin a step, and b make as many as the bound allows, and wait with the next one."""
    sessions = await start(run, *"ab")
    await forward(sessions["a"])
    await forward(sessions["b"])
    await step(sessions["b"], 0)
    await forward(sessions["b"], 1)
    waiting = await asked(step(sessions["b"], 1))
    assert not waiting.done()
    return sessions, waiting


async def test_a_step_waits_for_a_slower_one_that_would_become_too_old(open_run: OpenRun) -> None:
    run = open_run("async", agents=2, max_staleness=1)
    sessions, waiting = await held_back(run)
    await step(sessions["a"], 0)
    await asyncio.wait_for(waiting, 20)


async def test_the_age_of_steps_is_in_the_metrics(open_run: OpenRun) -> None:
    """b's first step has age 0, a's first and b's second, which waits for it, age 1, all others 0."""
    run = open_run("async", agents=2, max_staleness=1)
    sessions, waiting = await held_back(run)
    await step(sessions["a"], 0)
    await asyncio.wait_for(waiting, 20)
    for number in range(1, STEPS):
        await forward(sessions["a"], number)
        await step(sessions["a"], number)
    for number in range(2, STEPS):
        await forward(sessions["b"], number)
        await step(sessions["b"], number)
    await submit(run, *"ab")
    assert run.metrics()[0]["staleness"] == {"mean": round(2 / (2 * STEPS), 3), "oldest": 1}


@pytest.mark.parametrize("variant", ["sflv1", "sflv2", "parallel"])
async def test_steps_that_have_no_age_say_nothing_of_it(open_run: OpenRun, variant: str) -> None:
    run = open_run(variant, agents=1)
    await finish(run, await start(run, "a"))
    assert "staleness" not in run.metrics()[0]


@pytest.mark.parametrize("goes", ["leaves", "falls silent", "starts again", "is refused"])
async def test_a_step_waits_no_longer_for_one_that_goes(open_run: OpenRun, goes: str) -> None:
    run = open_run("async", agents=2, max_staleness=1)
    sessions, waiting = await held_back(run)
    if goes == "leaves":
        await run.coordinator.leave("a")
    elif goes == "falls silent":
        await time_passes(run, int(TIMEOUT_S) + 1)
        assert run.coordinator.rounds.joined == 1
    elif goes == "starts again":
        await open_all(run, "a")
    else:
        with pytest.raises(ProtocolError):
            await step(sessions["a"], 0, squared_norm=math.nan)
    await asyncio.wait_for(waiting, 20)
    with pytest.raises(RoundLost):
        await step(sessions["a"], 0)


async def test_a_round_that_is_over_keeps_no_step_waiting(open_run: OpenRun) -> None:
    """Both d and e are too slow for the round, and e waits for d."""
    run = open_run("async", agents=5, max_staleness=4, straggler_margin=3.0, agent_timeout_s=1e6)
    sessions = await start(run, *"abcde")
    slow = {client: sessions.pop(client) for client in "de"}
    for number in range(STEPS):
        await step_together(sessions, number)
    await time_passes(run, 1)
    await submit(run, *"abc")
    await forward(slow["d"])
    await forward(slow["e"])
    await step(slow["e"], 0)
    await forward(slow["e"], 1)
    waiting = await asked(step(slow["e"], 1))
    await time_passes(run, 2)
    assert not waiting.done()
    await time_passes(run, 1)
    assert agents_of(run) == [["a", "b", "c"]]
    with pytest.raises(RoundLost):
        await asyncio.wait_for(waiting, 20)
    assert run.engine.states == {}


def test_a_step_may_be_four_times_as_old_as_there_are_agents_unless_the_run_says_otherwise() -> None:
    assert staleness_of(FederationSection(agents=3, variant="async")).most == 12
    assert staleness_of(FederationSection(agents=3, variant="async", max_staleness=2)).most == 2


def test_how_old_a_step_may_be_and_what_it_counts_for_is_the_runs() -> None:
    federation = FederationSection(agents=5, cohort=3, variant="async", max_staleness=2, staleness_exponent=2.0)
    assert staleness_of(federation) == Staleness(most=2, clients=3, exponent=2.0)
