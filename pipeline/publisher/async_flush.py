"""Flushes that coroutines await, while no event loop waits for a lock or for the log.

One thread flushes for all coroutines that wait: a flush that begins after they came covers what they ask for. The thread
ends when none is left.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Clock

if TYPE_CHECKING:
    import asyncio  # else imported by the first coroutine only: an app without coroutines does not load it

_GRACE_S = 1.0
"""Seconds that the thread waits longer than the most patient coroutine, which raises its own error when it is too late."""


class _Result:
    """The result of a flush: its token, or the error that it raised."""

    def __init__(self, token: Token, error: Exception | None = None) -> None:
        self.token = token
        self.error = error
        self.raised = False
        """True once a coroutine has raised the error, so that the next flush need not."""


class _Waiter:
    """A coroutine that waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> None:
        self.loop = loop
        self.future: asyncio.Future[_Result] = loop.create_future()
        self.deadline_s = deadline_s
        self.left = False
        """True once the coroutine waits no more, because its time is over or it was cancelled."""

    def settle(self, result: _Result) -> None:
        """Have the coroutine go on. To be called in its event loop."""
        if not self.future.done():
            self.future.set_result(result)


class AsyncFlushes:
    """The coroutines that wait for a publisher's flushes, in any number of event loops."""

    def __init__(self, flush: Callable[[float], Token], clock: Clock) -> None:
        self._flush = flush
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: list[_Waiter] = []
        self._serving = False
        self._missed: _Result | None = None
        """The last result that is `Invalid`, which perhaps no coroutine has seen."""

    async def flush(self, timeout_s: float, late: Callable[[], Unavailable]) -> Token:
        """Return the token of a flush, or raise its error; `late` makes the error of a timeout."""
        import asyncio

        waiter = _Waiter(asyncio.get_running_loop(), self._clock.monotonic_s() + timeout_s)
        self._add(waiter)
        try:
            await asyncio.wait((waiter.future,), timeout=timeout_s)
        finally:
            waiter.left = True
        if not waiter.future.done():
            raise late()
        result = waiter.future.result()
        if result.error is not None:
            result.raised = True
            raise result.error
        self.raise_missed()
        return result.token

    def raise_missed(self) -> None:
        """Raise the `Invalid` of a flush whose coroutines were all cancelled or too late to see it."""
        result, self._missed = self._missed, None
        if result is not None and not result.raised and result.error is not None:
            raise result.error

    def _add(self, waiter: _Waiter) -> None:
        with self._lock:
            self._arrived.append(waiter)
            if self._serving:
                return
            self._serving = True
        try:
            _thread.start_new_thread(self._serve, ())  # `Thread.start` would wait for the thread
        except RuntimeError as error:
            with self._lock:
                self._serving = False
            raise Unavailable(f"no thread can be started: {error}") from error

    def _serve(self) -> None:
        while True:
            with self._lock:
                waiters, self._arrived = [it for it in self._arrived if not it.left], []
                if not waiters:
                    self._serving = False
                    return
            timeout_s = max(it.deadline_s for it in waiters) - self._clock.monotonic_s() + _GRACE_S
            try:
                result = _Result(self._flush(max(0.0, timeout_s)))
            except Exception as error:  # the coroutines raise it
                result = _Result(Token(), error)
            if isinstance(result.error, Invalid):
                self._missed = result
            for waiter in waiters:
                with suppress(RuntimeError):  # its event loop was closed: nobody waits
                    waiter.loop.call_soon_threadsafe(waiter.settle, result)
