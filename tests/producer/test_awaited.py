"""A flush that a coroutine awaits: the event loop goes on, and what comes of it is what a flush would say."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from tests.producer.support import FaultyLog, fold, in_threads, publisher, wait_until


def test_the_event_loop_goes_on() -> None:
    """While the log does not answer, other tasks run; then the token covers what was recorded before."""
    log = FaultyLog()

    async def main() -> None:
        with publisher(log) as pub:
            log.gate.clear()
            pub.sum("v").add(1)
            task = asyncio.create_task(pub.flush_async())
            started, longest = time.monotonic(), 0.0
            for _ in range(50):
                before = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)
            assert longest < time.monotonic() - started - 0.3  # no single wait was as long as the log's silence
            assert not task.done()
            log.gate.set()
            token = await task
            assert token.next_offsets
            assert token == pub.flush() == await pub.flush_async()

    asyncio.run(main())
    assert fold(log.log).total("v") == 1


def test_it_needs_no_log_if_nothing_was_recorded() -> None:
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    assert asyncio.run(pub.flush_async()) == Token({})
    pub.close()
    with pytest.raises(Invalid, match="closed"):
        asyncio.run(pub.flush_async())


def test_a_timeout_is_what_a_flush_would_raise() -> None:
    """Each has its own, and the same words; the deltas are sent all the same."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)

    async def main() -> list[object]:
        patient = asyncio.create_task(pub.flush_async(60))
        waits = [pub.flush_async(seconds) for seconds in (0.3, 0.05, 0.0)]
        errors: list[object] = [*await asyncio.gather(*waits, return_exceptions=True)]
        assert not patient.done()
        log.away = False
        assert (await patient).next_offsets
        return errors

    errors = asyncio.run(main())
    assert all(isinstance(error, Unavailable) for error in errors)
    for error, seconds in zip(errors, (0.3, 0.05, 0.0), strict=True):
        assert f"not acknowledged within {seconds} s: 0 batches and 1 buffered series wait" in str(error)
    pub.close()
    assert fold(log.log).total("v") == 1


def test_a_task_can_be_cancelled() -> None:
    """It ends at once, `asyncio.run` does too, and nothing is lost, kept waiting, or left running."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)
    before = 0

    async def main() -> float:
        nonlocal before
        tasks = [asyncio.create_task(pub.flush_async(60)) for _ in range(10)]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        for task in tasks:
            task.cancel()
        assert all(isinstance(it, asyncio.CancelledError) for it in await asyncio.gather(*tasks, return_exceptions=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pub.flush_async(60), 0.05)
        return started

    assert time.monotonic() - asyncio.run(main()) < 5
    log.away = False
    assert pub.flush().next_offsets
    assert asyncio.run(pub.flush_async()).next_offsets
    pub.close()
    assert fold(log.log).total("v") == 1


def test_what_was_rejected_is_raised_once() -> None:
    """By the coroutine that waits; if that was cancelled, by whoever flushes next."""
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
        await asyncio.to_thread(wait_until, lambda: len(log.attempts) > attempts)
        await asyncio.sleep(0.1)  # so that a thread flushes by now; if none does, nobody has taken what is to be raised
        task.cancel()
        await asyncio.wait((task,))

    for flush in (lambda: asyncio.run(pub.flush_async()), pub.flush):
        asyncio.run(cancelled())
        log.gate.set()
        wait_until(lambda: pub.stats()["waiting"] == 0)
        with pytest.raises(Invalid, match="not this one"):
            _until_raised(flush)
        with suppress(Invalid):  # a flush that was under way with another one may have heard of it, too
            flush()
        flush()
    pub.close()


def _until_raised(flush: Callable[[], Token]) -> None:
    """Flush until what a thread that nobody waits for has found out is there."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        flush()


def test_any_number_of_coroutines_wait_in_one_thread() -> None:
    """A web server whose log is away has a waiting task for each request, and no thread for each."""
    log = FaultyLog()
    pub = publisher(log)
    cell = pub.sum("v").labels()

    async def request() -> Token:
        cell.add(1)
        return await pub.flush_async()

    async def main() -> None:
        log.away = True
        tasks = [asyncio.create_task(request()) for _ in range(500)]
        await asyncio.sleep(0.2)
        assert len(sys._current_frames()) < 20
        log.away = False
        assert all(token.next_offsets for token in await asyncio.gather(*tasks))

    in_threads(2, lambda i: asyncio.run(main()))
    pub.close()
    assert fold(log.log).total("v") == 1_000


def test_closing_ends_the_wait() -> None:
    """What could not be acknowledged until then is said to wait in vain."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)

    async def main() -> None:
        task = asyncio.create_task(pub.flush_async(60))
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable):
            await asyncio.to_thread(pub.close, 0.1)
        with pytest.raises(Unavailable, match="the publisher was closed"):
            await task

    asyncio.run(main())
