"""What those who watch a run are told."""

import asyncio

from splitfed.federation import Phase, Rounds
from splitfed.server.watchers import Watchers


def a_run() -> tuple[Rounds, Watchers]:
    """A run of one round and two agents, on a clock that stands still."""
    rounds = Rounds(2, rounds=1, timeout_s=10.0)
    return rounds, Watchers(rounds, lambda: 0.0)


async def test_a_watcher_is_told_what_it_can_see_and_nothing_else() -> None:
    rounds, watchers = a_run()
    rounds.join("a", 1, 0.0)
    watching = watchers.watch("a")
    assert await anext(watching) == (Phase.WAITING, 1, False)
    following = asyncio.ensure_future(anext(watching))
    await watchers.tell()
    for _ in range(10):  # whatever woke the watcher would have come through by then
        await asyncio.sleep(0)
    assert not following.done()
    rounds.join("b", 1, 0.0)
    await watchers.tell()
    assert await asyncio.wait_for(following, 20) == (Phase.OPEN, 1, False)


async def test_a_run_has_ended_once_everyone_who_may_ask_has_heard_of_it() -> None:
    rounds, watchers = a_run()
    for client in "ab":
        rounds.join(client, 1, 0.0)
    rounds.submit("a", 1, 0.0)
    rounds.leave("b", 0.0, for_good=True)
    rounds.commit(0.0)
    assert not watchers.has_ended
    ending = asyncio.ensure_future(watchers.wait_for_end())
    assert [view async for view in watchers.watch("a")] == [(Phase.FINISHED, 2, False)]
    await asyncio.wait_for(ending, 20)
    assert watchers.has_ended


async def test_who_hangs_up_once_it_has_read_that_the_run_is_over_has_heard_of_it() -> None:
    rounds, watchers = a_run()
    for client in "ab":
        rounds.join(client, 1, 0.0)
    for client in "ab":
        rounds.submit(client, 1, 0.0)
    rounds.commit(0.0)
    for client in "ab":
        assert client in watchers.unaware
        watching = watchers.watch(client)
        assert await anext(watching) == (Phase.FINISHED, 2, False)
        await watching.aclose()  # type: ignore[attr-defined]  # of a generator
    assert (watchers.unaware, watchers.has_ended) == ([], True)


async def test_nobody_waits_at_the_end_for_one_that_left() -> None:
    rounds, watchers = a_run()
    for client in "ab":
        rounds.join(client, 1, 0.0)
    rounds.submit("a", 1, 0.0)
    rounds.leave("b", 0.0, for_good=False)
    rounds.commit(0.0)
    assert watchers.unaware == ["a"]


async def test_a_server_that_drains_lets_its_watchers_go() -> None:
    rounds, watchers = a_run()
    rounds.join("a", 1, 0.0)
    seen = []

    async def watch() -> None:
        seen.extend([view async for view in watchers.watch("a")])

    watching = asyncio.ensure_future(watch())
    await asyncio.sleep(0)  # until it has seen how things are
    watchers.is_draining = True
    await watchers.tell()
    await asyncio.wait_for(watching, 20)
    assert seen == [(Phase.WAITING, 1, False)] * 2
