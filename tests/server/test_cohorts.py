"""A run in which not everyone takes part in every round, and some are too slow for one."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.errors import ProtocolError, RoundLost
from splitfed.federation import Phase
from splitfed.federation.cohort import ranked
from splitfed.proto.v1 import training_pb2
from splitfed.server.contribution import Contribution
from splitfed.server.sessions import Operation, TrainSession
from splitfed.training.trunk_step import Applied
from tests.server.test_coordinator import ENDS, TRUNK, Run, time_passes

SEED = 3
OpenRun = Callable[..., Run]


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[OpenRun]:
    """Open runs one after the other in one directory, as servers that come and go."""
    runs: list[Run] = []
    with ThreadPoolExecutor(2) as worker:

        def open_next(**federation: Any) -> Run:
            if runs:
                runs[-1].store.close()
            runs.append(Run(tmp_path, worker, **federation))
            return runs[-1]

        yield open_next
        for run in runs:
            run.store.close()


def cohort(clients: str, round: int, size: int) -> list[str]:
    return sorted(ranked(clients, seed=SEED, round=round)[:size])


async def step(session: TrainSession, number: int) -> list[training_pb2.TrainReply]:
    request = training_pb2.TrainRequest(number=number, step=training_pb2.Step(step=number))
    return await session.answer(Operation(request, session.codecs, session.limits))


async def submit(run: Run, client: str, round: int, value: float) -> bool:
    return await run.coordinator.submit(client, round, {ENDS: torch.full((3,), value)}, Contribution())


async def leave_d_behind(run: Run) -> TrainSession:
    """Let a, b and c finish round 1 after 2 s, and d make its first step; then wait for 5 s more, 2.5 times as long."""
    await run.join(*"abcd")
    slow = await run.train("d", steps=1)
    for client in "abc":
        await run.train(client)
    await time_passes(run, 2)
    for client in "abc":
        await submit(run, client, 1, 1.0)
    await time_passes(run, 5)
    return slow


async def test_each_round_is_of_its_cohort_and_its_line_says_so(open_run: OpenRun) -> None:
    run = open_run(agents=4, rounds=3, cohort=2)
    await run.join(*"abcd")
    for round in (1, 2, 3):
        await run.finish_round(*cohort("abcd", round, 2))
    assert run.coordinator.rounds.phase is Phase.FINISHED
    for round, line in enumerate(run.metrics(), start=1):
        assert line["selected"] == list(line["agents"]) == cohort("abcd", round, 2)
        assert not {"late", "dropped", "merged", "replaced"} & line.keys()


async def test_a_round_is_over_with_its_cohort_and_who_was_asked_beyond_it_is_late(open_run: OpenRun) -> None:
    run = open_run(agents=4, cohort=2, over_selection=1)
    await run.join(*"abcd")
    first, second, third = asked = cohort("abcd", 1, 3)
    await run.train(third, steps=1)
    await run.finish_round(first, second)
    (line,) = run.metrics()
    assert (line["selected"], list(line["agents"])) == (asked, [first, second])
    assert line["late"] == line["dropped"] == [third]


async def test_who_was_not_asked_can_open_no_session_and_is_told_when_it_is(open_run: OpenRun) -> None:
    run = open_run(agents=4, rounds=9, cohort=2)
    await run.join(*"abcd")
    idle = next(c for c in "abcd" if c not in cohort("abcd", 1, 2))
    with pytest.raises(RoundLost, match=f"'{idle}' has no part in round 1 now; it waits until it is asked"):
        await run.coordinator.open_session(idle, 1, b"")
    watcher = run.coordinator.watch(idle)
    while not run.coordinator.rounds.may_start(idle):
        round = run.coordinator.rounds.current
        assert await anext(watcher) == (Phase.OPEN, round, False)
        await run.finish_round(*cohort("abcd", round, 2))
    assert await anext(watcher) == (Phase.OPEN, run.coordinator.rounds.current, False)
    await run.coordinator.open_session(idle, run.coordinator.rounds.current, b"")


async def test_who_waits_to_be_asked_is_not_taken_for_silent(open_run: OpenRun) -> None:
    run = open_run(agents=3, rounds=2, cohort=1)
    await run.join(*"abc")
    (asked,) = cohort("abc", 1, 1)
    for _ in range(5):
        run.coordinator.note_progress(asked)
        await time_passes(run, 9)
    assert run.coordinator.rounds.joined == 3


async def test_a_member_that_leaves_is_replaced_where_the_quorum_needs_it(open_run: OpenRun) -> None:
    run = open_run(agents=4, cohort=2, quorum=2)
    await run.join(*"abcd")
    first, second, third, _ = ranked("abcd", seed=SEED, round=1)
    watcher = run.coordinator.watch(third)
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    assert not run.coordinator.rounds.may_start(third)
    await run.coordinator.leave(second)
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    assert run.coordinator.rounds.may_start(third)
    await run.finish_round(first, third)
    assert run.metrics()[0]["replaced"] == {second: third}


async def test_a_resumed_run_asks_the_same_cohort_again_and_knows_whose_update_was_counted_last(
    open_run: OpenRun,
) -> None:
    run = open_run(agents=4, rounds=3, cohort=2)
    await run.join(*"abcd")
    await run.finish_round(*cohort("abcd", 1, 2))
    before = run.coordinator.rounds.selected
    resumed = open_run(agents=4, rounds=3, cohort=2)
    await resumed.join(*"dcba")
    assert resumed.coordinator.rounds.selected == before
    counted = {client: resumed.coordinator.last_counted(client) for client in "abcd"}
    assert counted == {client: int(client in cohort("abcd", 1, 2)) for client in "abcd"}


async def test_a_straggler_is_cut_off_at_three_times_the_median_time(
    open_run: OpenRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(agents=4, straggler_margin=3)
    await leave_d_behind(run)
    assert "round 1 waits no longer for d: it takes more than 3 times as long as the median agent" in caplog.text
    (line,) = run.metrics()
    assert (line["late"], line["dropped"], list(line["agents"])) == (["d"], ["d"], ["a", "b", "c"])
    assert line["seconds"] == 7.0
    assert run.coordinator.figures.happened == {"late": 1, "dropped": 1}


async def test_without_a_margin_a_straggler_is_waited_for(open_run: OpenRun) -> None:
    run = open_run(agents=4)
    await leave_d_behind(run)
    assert run.coordinator.rounds.current == 1


async def test_a_clock_that_jumps_between_two_looks_cuts_nobody_off(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3, agent_timeout_s=1e6)
    await run.join(*"abcd")
    await run.train("d", steps=1)
    for client in "abc":
        await run.train(client)
    await time_passes(run, 2)
    for client in "abc":
        await submit(run, client, 1, 1.0)
    run.now_s += 3600
    await time_passes(run, 1)
    assert run.coordinator.rounds.current == 1
    await run.train("d")
    await submit(run, "d", 1, 1.0)
    assert list(run.metrics()[0]["agents"]) == ["a", "b", "c", "d"]


async def test_a_dropped_straggler_hears_why_and_takes_part_in_the_next_round(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3)
    slow = await leave_d_behind(run)
    assert slow.slot not in run.engine.states
    asked = len(run.engine.calls)
    why = "Round 1 was closed without 'd', which was late; its update is dropped, and it starts again in the next one"
    with pytest.raises(RoundLost, match=why):
        await step(slow, 1)
    for call in (submit(run, "d", 1, 1.0), run.coordinator.open_session("d", 1, slow.token)):
        with pytest.raises(RoundLost, match=why):
            await call
    assert len(run.engine.calls) == asked
    assert run.coordinator.last_counted("d") == 0
    await run.finish_round(*"abcd")
    assert list(run.metrics()[1]["agents"]) == ["a", "b", "c", "d"]
    assert run.coordinator.last_counted("d") == 2


async def test_a_straggler_of_the_last_round_hears_that_there_is_no_other(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3, rounds=1)
    slow = await leave_d_behind(run)
    with pytest.raises(RoundLost, match="which was late; its update is dropped, and it was the last round"):
        await step(slow, 1)


async def test_an_operation_whose_slot_is_emptied_meanwhile_ends_with_the_round_and_not_with_the_agent(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(agents=2)
    await run.join("a", "b")
    session = await run.train("a", steps=1)

    refused: Future[Any] = Future()
    monkeypatch.setattr(session._calls, "_submit", lambda work: refused)
    stepping = asyncio.create_task(step(session, 1))
    await asyncio.sleep(0)  # until the operation is there
    monkeypatch.undo()
    await run.coordinator.open_session("a", 1, b"")
    refused.set_exception(ProtocolError("This round has not been opened, or was opened again elsewhere."))
    with pytest.raises(RoundLost, match="Round 1 goes on without this session of 'a'"):
        await stepping


async def test_a_late_update_counts_by_its_change_in_the_round_that_it_comes_in(open_run: OpenRun) -> None:
    """Round 1 takes ends from 0 to 1. In round 2, a, b and c go to 3, and d's change from 0 to 5 makes 1 + 5 = 6."""
    run = open_run(agents=4, straggler_margin=3, late_updates="merge")
    slow = await leave_d_behind(run)
    assert await run.coordinator.open_session("d", 1, slow.token) is slow
    await step(slow, 1)
    assert await submit(run, "d", 1, 5.0)
    assert not await submit(run, "d", 1, 100.0)
    assert run.coordinator.rounds.submitted == []
    for client in "abc":
        await run.train(client)
    for client in "abc":
        await submit(run, client, 2, 3.0)
    assert torch.equal(run.exported[2][ENDS], torch.full((3,), (3 * 3 + 6) / 4))
    assert torch.equal(run.exported[2][TRUNK], torch.full((2, 3), 2.0))  # each copy goes up by 1, the late one too
    first, second = run.metrics()
    assert (first["late"], "dropped" in first) == (["d"], False)
    assert second["merged"] == {"d": 1}
    assert list(second["agents"]) == ["a", "b", "c", "d"]
    assert "late" not in second
    saved = run.store.load()
    assert saved is not None
    assert saved.counted == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert run.engine.states == {}


async def test_a_late_update_that_is_not_finished_is_refused_and_may_come_again(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3, late_updates="merge")
    slow = await leave_d_behind(run)
    with pytest.raises(ProtocolError, match="'d' sent its update after 1 of 2 local steps"):
        await submit(run, "d", 1, 5.0)
    await step(slow, 1)
    assert await submit(run, "d", 1, 5.0)


async def test_a_late_member_that_starts_again_gives_up_its_update_and_waits_for_nothing(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3, late_updates="merge")
    slow = await leave_d_behind(run)
    await run.join("d")
    with pytest.raises(RoundLost, match="Round 1 was closed without 'd'"):
        await submit(run, "d", 1, 5.0)
    await run.finish_round(*"abcd")
    assert torch.equal(run.exported[2][ENDS], torch.ones(3))
    assert run.metrics()[1]["dropped"] == ["d"]
    assert slow.slot not in run.engine.states


async def test_one_that_is_late_again_is_counted_by_what_it_started_from_the_last_time(open_run: OpenRun) -> None:
    """Round 1 takes ends from 0 to 1, and d gives its part up; late for round 2, it goes from 1 to 1."""
    run = open_run(agents=4, rounds=4, straggler_margin=3, late_updates="merge")
    await leave_d_behind(run)
    await run.join("d")
    slow = await run.train("d", steps=1)
    for client in "abc":
        await run.train(client)
    await time_passes(run, 2)
    for client in "abc":
        await submit(run, client, 2, 1.0)
    await time_passes(run, 5)
    await step(slow, 1)
    assert await submit(run, "d", 2, 1.0)
    for client in "abc":
        await run.train(client)
    for client in "abc":
        await submit(run, client, 3, 1.0)
    assert torch.equal(run.exported[3][ENDS], torch.ones(3))


async def test_a_late_member_that_leaves_leaves_nothing_behind(open_run: OpenRun) -> None:
    run = open_run(agents=4, straggler_margin=3, late_updates="merge")
    slow = await leave_d_behind(run)
    assert slow.slot in run.engine.states
    await run.coordinator.leave("d")
    assert slow.slot not in run.engine.states
    await run.finish_round(*"abc")
    assert run.coordinator.rounds.phase is Phase.FINISHED


async def test_in_turns_the_next_one_is_told_to_start_when_the_one_before_is_done(open_run: OpenRun) -> None:
    run = open_run(agents=3, variant="sflv2")
    await run.join(*"abc")
    first, second, third = ranked("abc", seed=SEED, round=1)
    watcher = run.coordinator.watch(second)
    assert await anext(watcher) == (Phase.OPEN, 1, False)
    with pytest.raises(RoundLost, match=f"'{second}' has no part in round 1 now"):
        await run.coordinator.open_session(second, 1, b"")
    following = asyncio.create_task(anext(watcher))  # type: ignore[arg-type]  # it is a coroutine
    await run.train(first)
    await submit(run, first, 1, 1.0)
    assert await following == (Phase.OPEN, 1, False)
    assert run.coordinator.rounds.may_start(second)
    await run.coordinator.leave(second)
    assert run.coordinator.rounds.may_start(third)


async def test_a_turn_that_is_lost_leaves_no_slot_behind(open_run: OpenRun) -> None:
    run = open_run(agents=2, variant="sflv2")
    await run.join("a", "b")
    first, second = ranked("ab", seed=SEED, round=1)
    session = await run.train(first, steps=1)
    await time_passes(run, 11)
    assert session.slot not in run.engine.states
    assert run.coordinator.rounds.may_start(second)
    with pytest.raises(RoundLost, match=f"Round 1 goes on without this session of '{first}'"):
        await step(session, 1)


async def test_a_member_that_waits_for_its_answer_is_not_taken_for_silent(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(agents=2)
    await run.join("a", "b")
    session = await run.train("a", steps=1)
    slow: Future[Any] = Future()
    monkeypatch.setattr(session._calls, "_submit", lambda work: slow)
    stepping = asyncio.create_task(step(session, 1))
    await asyncio.sleep(0)  # until the operation is there
    await time_passes(run, 30)
    assert run.coordinator.rounds.joined == 1  # b, which has nothing to wait for, is left out
    slow.set_result(Applied(2, 0.0))
    await stepping
    await time_passes(run, 11)
    assert run.coordinator.rounds.joined == 0
