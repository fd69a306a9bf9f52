"""Work that is finished even if whoever asked for it no longer waits."""

import asyncio
import gc
from collections.abc import Awaitable

import pytest

from splitfed.errors import RoundLost
from splitfed.server.outlast import outlasting

Complaints = list[dict[str, object]]


@pytest.fixture
async def complaints() -> Complaints:
    """What the event loop has to say of errors that nobody took."""
    heard: Complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    return heard


async def begun(work: Awaitable[object]) -> "asyncio.Task[object]":
    task = asyncio.create_task(outlasting(work))
    await asyncio.sleep(0)
    return task


async def abandoned(answer: "asyncio.Future[object]") -> None:
    waiting = await begun(answer)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_who_waits_gets_the_answer_or_the_error() -> None:
    answer: asyncio.Future[object] = asyncio.Future()
    waiting = await begun(answer)
    answer.set_result(5)
    assert await waiting == 5
    lost: asyncio.Future[object] = asyncio.Future()
    waiting = await begun(lost)
    lost.set_exception(RoundLost("it is over"))
    with pytest.raises(RoundLost, match="it is over"):
        await waiting


async def test_work_goes_on_when_nobody_waits_any_more() -> None:
    answer: asyncio.Future[object] = asyncio.Future()
    await abandoned(answer)
    assert not answer.done()
    answer.set_result(5)


async def test_an_error_meant_for_one_who_no_longer_waits_is_none_of_the_server(complaints: Complaints) -> None:
    answer: asyncio.Future[object] = asyncio.Future()
    await abandoned(answer)
    answer.set_exception(RoundLost("it is over"))
    await asyncio.sleep(0)
    del answer
    gc.collect()
    assert complaints == []


async def test_what_nobody_foresaw_is_logged_all_the_same(complaints: Complaints) -> None:
    answer: asyncio.Future[object] = asyncio.Future()
    await abandoned(answer)
    error = OSError("the disk is gone")
    answer.set_exception(error)
    await asyncio.sleep(0)
    assert [said["exception"] for said in complaints] == [error]
