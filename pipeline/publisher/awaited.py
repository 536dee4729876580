"""Flushes that coroutines await, while no event loop waits for a lock or for the log.

One thread flushes for all that have come: a flush that begins later than they did covers what they ask for. It ends when
nobody waits any more.
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
    import asyncio  # else only by who awaits: an app without coroutines pays for none

_GRACE_S = 1.0
"""How much longer the thread waits than the most patient coroutine, which says itself that it is too late."""


class _Outcome:
    """The result of a flush: its token, or the error that it raised."""

    def __init__(self, token: Token, error: Exception | None = None) -> None:
        self.token = token
        self.error = error
        self.told = False
        """True once a coroutine has raised the error, so that the next flush need not."""


class _Request:
    """A coroutine that waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline_s: float, flush: Callable[[float], Token]) -> None:
        self.loop = loop
        self.future: asyncio.Future[_Outcome] = loop.create_future()
        self.deadline_s = deadline_s
        self.flush = flush
        self.left = False
        """True once the coroutine waits no more, because its time is over or it was cancelled."""

    def settle(self, outcome: _Outcome) -> None:
        """Have the coroutine go on. To be called in its event loop."""
        if not self.future.done():
            self.future.set_result(outcome)


class AwaitedFlushes:
    """The coroutines that wait for a publisher's flushes, in any number of event loops."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived: list[_Request] = []
        self._serving = False
        self._untold: _Outcome | None = None

    async def flush(self, flush: Callable[[float], Token], timeout_s: float, late: Callable[[], Unavailable]) -> Token:
        """Return what `flush` returns, or raise what it raises, in a thread; `late` makes the error of a timeout."""
        import asyncio

        request = _Request(asyncio.get_running_loop(), self._clock.monotonic_s() + timeout_s, flush)
        self._add(request)
        try:
            await asyncio.wait((request.future,), timeout=timeout_s)
        finally:
            request.left = True
        if not request.future.done():
            raise late()
        outcome = request.future.result()
        if outcome.error is not None:
            outcome.told = True
            raise outcome.error
        self.raise_untold()
        return outcome.token

    def raise_untold(self) -> None:
        """Raise what was `Invalid` in a flush whose coroutines were all cancelled or too late to hear of it."""
        outcome, self._untold = self._untold, None
        if outcome is not None and not outcome.told and outcome.error is not None:
            raise outcome.error

    def _add(self, request: _Request) -> None:
        with self._lock:
            self._arrived.append(request)
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
                group, self._arrived = [it for it in self._arrived if not it.left], []
                if not group:
                    self._serving = False
                    return
            outcome = self._flush(group)
            if isinstance(outcome.error, Invalid):
                self._untold = outcome
            for request in group:
                with suppress(RuntimeError):  # its event loop was closed: nobody waits
                    request.loop.call_soon_threadsafe(request.settle, outcome)

    def _flush(self, group: list[_Request]) -> _Outcome:
        timeout_s = max(it.deadline_s for it in group) - self._clock.monotonic_s() + _GRACE_S
        try:
            return _Outcome(group[0].flush(max(0.0, timeout_s)))
        except Exception as error:  # the coroutines raise it
            return _Outcome(Token(), error)
