"""The threads of reads, the bound on reads that wait for one, and that on reads that wait for newer data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, Generic, ParamSpec, TypeVar

import pipeline.metrics as m
from pipeline.budget import Budget, ClientGone, Spent
from pipeline.errors import Invalid, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.codings import Coded, encode_end, encode_start
from pipeline.settings import QuerySettings

_COMPRESS_HERE_MAX = 32_768
"""Size up to which a body is compressed on the event loop; a fraction of a millisecond's work."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""Returns the next message of a client, as ASGI has it."""
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class Asker:
    """The client of one read, and what was spent for it."""

    def __init__(self, receive: Receive | None) -> None:
        """`receive` tells when the client goes away; None: nothing tells that."""
        self.receive = receive
        self.spent = Spent()


class SharedWork(Generic[T]):
    """A task that several reads wait for. The last one that stops to wait cancels it, and so ends its work."""

    task: asyncio.Task[T]

    def __init__(self) -> None:
        self._awaited = 0
        self.is_dropped = False

    async def result(self, timeout_s: float | None = None) -> T:
        """Wait for the result of the task. `TimeoutError` after `timeout_s`."""
        self._awaited += 1
        try:
            async with asyncio.timeout(None if timeout_s is None else max(0.0, timeout_s)):
                return await asyncio.shield(self.task)
        finally:
            self._awaited -= 1
            if not self._awaited:
                self.is_dropped = True
                self.task.cancel()


class ReadPool:
    """Threads for the reads of one event loop, on which it must be used."""

    def __init__(self, settings: QuerySettings, metrics: Metrics, clock: Clock) -> None:
        self.closed = False
        """True if the server is stopping."""
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        for limit in ("reads_waiting_max", "waits_max", "cpu_ms_max"):
            metrics.inc(m.READS_REFUSED, 0, limit)
        self._threads = ThreadPoolExecutor(settings.read_thread_count, thread_name_prefix="pipeline-read")
        self._open = 0
        """Reads that run, or wait for a thread; equal ones count once."""
        self._large = asyncio.Semaphore(settings.large_answers_max)
        self._waits: dict[asyncio.Timeout, None] = {}
        """Reads that wait for newer data; the first one has waited for longest."""

    def deadline_s(self) -> float:
        """Return the monotonic time by which a read that names no time has to end."""
        timeout_ms = min(self._settings.timeout_ms_default, self._settings.timeout_ms_max)
        return self._clock.monotonic_s() + timeout_ms / 1000

    def _admit(self) -> None:
        if self.closed:
            raise Unavailable("the server is stopping")
        if self._open >= self._settings.reads_waiting_max:
            self._metrics.inc(m.READS_REFUSED, 1, "reads_waiting_max")
            raise Unavailable(f"{self._open} reads are waiting or running; no more are taken")
        self._open += 1

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count a read until the context ends. Raises `Unavailable` if there are too many, or the server stops."""
        self._admit()
        try:
            yield
        finally:
            self._open -= 1

    async def bounded(self, serve: Callable[P, Coroutine[Any, Any, R]], *arguments: P.args, **options: P.kwargs) -> R:
        """Return what `serve` returns, as one of the reads that may wait or run. Raises as `slot`."""
        with self.slot():
            return await serve(*arguments, **options)

    @asynccontextmanager
    async def waiting(self, receive: Receive | None) -> AsyncIterator[None]:
        """Count a read that waits for newer data until the context ends, which it does when the client goes away.

        If too many wait, the one that has waited for longest makes room, with `Unavailable`: so reads that wait for a moment
        are served beside any number of reads that wait for something that never comes.
        """
        if self.closed:
            raise Unavailable("the server is stopping")
        while len(self._waits) >= self._settings.waits_max:
            longest = next(iter(self._waits))
            del self._waits[longest]
            longest.reschedule(0)
            self._metrics.inc(m.READS_REFUSED, 1, "waits_max")
        async with while_connected(receive):
            try:
                async with asyncio.timeout(None) as timeout:
                    self._waits[timeout] = None
                    try:
                        yield
                    finally:
                        self._waits.pop(timeout, None)
            except TimeoutError:
                if not timeout.expired():
                    raise
                raise Unavailable(f"{self._settings.waits_max} later reads wait for newer data (waits_max)") from None

    def start(self, work: Callable[[], T], *, large: bool = False, spent: Spent) -> asyncio.Task[T]:
        """Do work in a thread, as one of the reads that may run. Raises as `slot`, at once."""
        asker = Asker(None)
        asker.spent = spent
        self._admit()

        async def run() -> T:
            try:
                return await self.run(work, large=large, asker=asker)
            finally:
                self._open -= 1

        return asyncio.create_task(run())

    async def run(self, work: Callable[[], T], *, large: bool = False, asker: Asker | None = None) -> T:
        """Return what `work` returns, done in a thread. Work on large answers waits for its turn before it takes one.

        The work ends soon, at a check of its budget, if this is cancelled or the client goes away.
        """
        asker = asker or Asker(None)
        budget = Budget(self._clock, self._settings.cpu_ms_max, self._cpu_used_up, asker.spent)
        try:
            async with while_connected(asker.receive), self._large if large else nullcontext():
                return await asyncio.get_running_loop().run_in_executor(self._threads, budget.work, work)
        except BaseException:
            budget.abandon()
            raise

    def _cpu_used_up(self) -> Invalid:
        self._metrics.inc(m.READS_REFUSED, 1, "cpu_ms_max")
        return Invalid(
            f"the read has used {self._settings.cpu_ms_max} ms of CPU (setting cpu_ms_max): ask for fewer series or a "
            "shorter range, or narrow `where`"
        )

    async def compress(self, coding: str, body: bytes, asker: Asker | None = None) -> Coded:
        """Return a compressed body, without its end; a large one is compressed in a thread."""
        if len(body) <= _COMPRESS_HERE_MAX:
            return encode_start(coding, body)
        return await self.run(lambda: encode_start(coding, body), asker=asker)

    async def coded(self, body: bytes, coding: str, asker: Asker | None = None) -> tuple[Sequence[bytes], str]:
        """Return a body in a coding, or as it is if that is not worth it, and the coding."""
        if not coding or len(body) < self._settings.compress_bytes_min:
            return (body,), ""
        coded = await self.compress(coding, body, asker)
        return (coded.start, encode_end(coded, b"")), coding

    def close(self) -> None:
        """Take no more reads."""
        self.closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def while_connected(receive: Receive | None) -> AsyncIterator[None]:
    """End the context with `ClientGone` when the client goes away; without `receive` nothing tells that."""
    if receive is None:
        yield
        return
    try:
        async with asyncio.timeout(None) as timeout:

            async def leave() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                timeout.reschedule(0)

            leaving = asyncio.create_task(leave())
            try:
                yield
            finally:
                leaving.cancel()
    except TimeoutError:
        if not timeout.expired():
            raise
        raise ClientGone from None
