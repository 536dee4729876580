"""A flush that a coroutine awaits leaves the event loop free, and ends as a blocking flush would."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.publisher.client import BasePublisher
from tests.publisher.support import FaultyLog, fold, in_threads, publisher, wait_until


def away() -> tuple[FaultyLog, BasePublisher]:
    """A log that is away, and a publisher in which a delta waits for it."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)
    return log, pub


def test_the_event_loop_goes_on() -> None:
    """While the log does not answer, other tasks run; then the token covers everything recorded before."""
    log = FaultyLog()

    async def main() -> None:
        with publisher(log) as pub:
            log.gate.clear()
            pub.sum("v").add(1)
            task = asyncio.create_task(pub.flush_async())
            await asyncio.to_thread(wait_until, lambda: log.attempts)
            for _ in range(50):
                await asyncio.sleep(0.001)
            assert not task.done()
            log.gate.set()
            token = await task
            assert token.next_offsets
            assert token == pub.flush() == await pub.flush_async()

    asyncio.run(main())
    assert fold(log.log).total("v") == 1


def test_a_timeout_is_what_a_flush_would_raise() -> None:
    """Each flush has its own timeout and error text; the deltas are sent all the same. A flush of nothing needs no log."""
    log, pub = away()
    assert asyncio.run(publisher(log).flush_async()) == Token({})

    async def main() -> None:
        patient = asyncio.create_task(pub.flush_async(60))
        seconds = (0.3, 0.05, 0.0)
        waits = [pub.flush_async(timeout_s) for timeout_s in seconds]
        for timeout_s, error in zip(seconds, await asyncio.gather(*waits, return_exceptions=True), strict=True):
            assert isinstance(error, Unavailable)
            assert f"not acknowledged within {timeout_s} s: 0 batches and 1 buffered series wait" in str(error)
        assert not patient.done()
        log.away = False
        assert (await patient).next_offsets

    asyncio.run(main())
    pub.close()
    assert fold(log.log).total("v") == 1
    with pytest.raises(Invalid, match="closed"):
        asyncio.run(pub.flush_async())


def test_a_task_can_be_cancelled() -> None:
    """The task ends at once, `asyncio.run` does too, and nothing is lost, kept waiting, or left running."""
    log, pub = away()

    async def main() -> None:
        tasks = [asyncio.create_task(pub.flush_async(60)) for _ in range(10)]
        await asyncio.to_thread(wait_until, lambda: pub._runtime.flushes)
        for task in tasks:
            task.cancel()
        assert all(isinstance(it, asyncio.CancelledError) for it in await asyncio.gather(*tasks, return_exceptions=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pub.flush_async(60), 0.05)

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 50
    log.away = False
    assert pub.flush().next_offsets
    assert asyncio.run(pub.flush_async()).next_offsets
    pub.close()
    assert fold(log.log).total("v") == 1


def test_what_was_rejected_is_raised_once() -> None:
    """A rejection is raised by the waiting coroutine, or, if that was cancelled, by the next flush."""
    log = FaultyLog(lambda n, batch: Invalid("not this one"))
    pub = publisher(log)
    pub.sum("v").add(1)
    with pytest.raises(Invalid, match=r"1 batches were rejected and are lost: .*not this one"):
        asyncio.run(pub.flush_async())
    pub.flush()

    async def cancelled() -> None:
        log.gate.clear()
        attempts = len(log.attempts)
        pub.sum("v").add(1)
        task = asyncio.create_task(pub.flush_async())
        await asyncio.to_thread(wait_until, lambda: len(log.attempts) > attempts and pub._runtime.flushes)
        task.cancel()
        await asyncio.wait((task,))

    for flush in (lambda: asyncio.run(pub.flush_async()), pub.flush):
        asyncio.run(cancelled())
        log.gate.set()
        wait_until(lambda: not pub._runtime.flushes)
        wait_until(lambda flush=flush: raises(flush))  # type: ignore[misc]
        raises(flush)  # a flush that was under way with another one may have heard of it, too
        assert not raises(flush)
    pub.close()


def raises(flush: Callable[[], Token]) -> bool:
    try:
        flush()
    except Invalid as error:
        return "not this one" in str(error)
    return False


def test_any_number_of_coroutines_wait_in_one_thread() -> None:
    """Coroutines that wait for a log that is away share one thread."""
    log, pub = away()
    cell, together = pub.sum("v").labels(), threading.Barrier(2)

    async def request() -> Token:
        cell.add(1)
        return await pub.flush_async()

    async def main() -> None:
        tasks = [asyncio.create_task(request()) for _ in range(500)]
        await asyncio.to_thread(wait_until, lambda: pub._runtime.flushes)
        await asyncio.to_thread(together.wait, 20)
        assert len(sys._current_frames()) < 20
        await asyncio.to_thread(together.wait, 20)
        log.away = False
        assert all(token.next_offsets for token in await asyncio.gather(*tasks))

    in_threads(2, lambda i: asyncio.run(main()))
    pub.close()
    assert fold(log.log).total("v") == 1_001


def test_closing_ends_the_wait() -> None:
    """A coroutine that still waits gets an error: the publisher was closed."""
    _, pub = away()

    async def main() -> None:
        task = asyncio.create_task(pub.flush_async(60))
        await asyncio.to_thread(wait_until, lambda: pub._runtime.flushes)
        with pytest.raises(Unavailable):
            await asyncio.to_thread(pub.close, 0.1)
        with pytest.raises(Unavailable, match="the publisher was closed"):
            await task

    asyncio.run(main())
