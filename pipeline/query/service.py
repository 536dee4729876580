"""Serves reads to an event loop: point reads at once, scans in a few threads, waits without any.

Everything is bounded: the threads, the reads that wait for one or for newer data, and the time of each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec

import pipeline.metrics as m
from pipeline.core.answer import Answer, PartitionState
from pipeline.core.exposition import Exposition
from pipeline.core.query import Query
from pipeline.core.token import Token
from pipeline.errors import Invalid, NotFound, NotReady, OtherTopic, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.query.media import Encoded, encode_answer
from pipeline.query.params import ReadRequest
from pipeline.query.reader import ViewReader
from pipeline.settings import QuerySettings
from pipeline.threads import Failures

_log = logging.getLogger(__name__)
POLL_S = 0.003
OBSERVE_S = 0.1
_TOPIC_S = 2.0
"""Longest wait for the log to answer which topic it has now."""

_NOT_FOLDED = "if it was published a moment ago, pass the token that flush() returned: after=token"

States = Sequence[PartitionState]
T = TypeVar("T")
R = TypeVar("R")
RenderViews = Callable[[Exposition, str], tuple[bytes, str]]
"""Renders a scrape for an Accept header; returns the text and its media type."""
_encode = msgspec.json.Encoder().encode


class _PositionWaiter:
    """Waits until positions meet conditions: one task polls them for all reads that wait."""

    def __init__(self, poll: Callable[[], States]) -> None:
        self._read_states = poll
        self._waiters: dict[asyncio.Future[None], Callable[[States], bool]] = {}
        self._task: asyncio.Task[None] | None = None

    async def until(self, ok: Callable[[States], bool], timeout_s: float) -> bool:
        """Wait until `ok` of the polled positions; return whether that came in time. `ok` must not raise."""
        future = asyncio.get_running_loop().create_future()
        self._waiters[future] = ok
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        try:
            await asyncio.wait_for(future, max(0.0, timeout_s))
        except TimeoutError:
            return False
        finally:
            self._waiters.pop(future, None)
        return True

    async def _poll(self) -> None:
        while self._waiters:
            await asyncio.sleep(POLL_S)
            try:
                states = self._read_states()
            except Exception as error:
                for future in self._pending():
                    future.set_exception(error)
                return
            for future in self._pending():
                if self._waiters[future](states):
                    future.set_result(None)

    def _pending(self) -> list[asyncio.Future[None]]:
        return [future for future in self._waiters if not future.done()]


class ReadService:
    """Serves reads on one event loop, on which it must be made and used."""

    def __init__(self, reader: ViewReader, settings: QuerySettings, metrics: Metrics) -> None:
        self._reader = reader
        self._settings = settings
        self._metrics = metrics
        metrics.inc(m.READS_REFUSED, 0, "reads_waiting_max")
        self._threads = ThreadPoolExecutor(settings.read_thread_count, thread_name_prefix="pipeline-read")
        self._waiter = _PositionWaiter(reader.partitions)
        self._failures = Failures(_log, "observe", metrics)
        self._open = 0
        """Reads that wait or run."""

    async def answer(self, request: ReadRequest) -> Encoded:
        """Return the encoded answer. `NotReady` if data it waits for does not come, `Unavailable` without time or room."""
        try:
            return await self._answer(request)
        except NotFound as error:
            if request.after is not None:
                raise
            raise NotFound(f"{error}; {_NOT_FOLDED}") from None

    async def _answer(self, request: ReadRequest) -> Encoded:
        if not request.waits:
            answer = self._reader.point(request.query)
            if answer is not None:
                return encode_answer(answer, request.media_type)
        return await self._bounded(self._slow, request)

    async def read(self, query: Query) -> Answer:
        """Return the answer of now, which is not encoded. `Unavailable` without time or room."""
        deadline_s = self._reader.clock.monotonic_s() + self._settings.timeout_ms_default / 1000
        return await self._bounded(self._in_thread, lambda: self._reader.read(query, deadline_s=deadline_s))

    async def moved(self, since: States | None, timeout_s: float) -> States:
        """Return the positions of the stores, as soon as one is another than in `since` or the time is over."""

        def other(states: States) -> bool:
            return since is None or [*map(_place, states)] != [*map(_place, since)]

        await self._waiter.until(other, timeout_s)
        return self._reader.partitions()

    async def wait(self, request: ReadRequest) -> None:
        """Wait for what the read asks to wait for. Raises as `answer`."""
        if request.waits:
            deadline_s = self._reader.clock.monotonic_s() + request.timeout_ms / 1000
            await self._bounded(partial(self._wait, request), deadline_s)

    async def views(self) -> bytes:
        """Return all views, encoded."""
        return await self._bounded(self._in_thread, lambda: _encode(self._reader.views()))

    async def scrape(self, views: Sequence[str], render: RenderViews, accept: str) -> tuple[bytes, str]:
        """Return all views, or these, as `render` writes them. Raises as `ViewReader.scrape`; `Unavailable` without room."""
        timeout_ms = min(self._settings.timeout_ms_default, self._settings.timeout_ms_max)
        deadline_s = self._reader.clock.monotonic_s() + timeout_ms / 1000
        return await self._bounded(
            self._in_thread, lambda: render(self._reader.scrape(views, deadline_s=deadline_s), accept)
        )

    async def _bounded(self, serve: Callable[[T], Coroutine[Any, Any, R]], what: T) -> R:
        if self._open >= self._settings.reads_waiting_max:
            self._metrics.inc(m.READS_REFUSED, 1, "reads_waiting_max")
            raise Unavailable(f"{self._open} reads are waiting or running; no more are taken")
        self._open += 1
        try:
            return await serve(what)
        finally:
            self._open -= 1

    async def _slow(self, request: ReadRequest) -> Encoded:
        clock = self._reader.clock
        deadline_s = clock.monotonic_s() + request.timeout_ms / 1000
        while True:
            if request.waits:
                await self._wait(request, deadline_s)
            point = self._reader.point(request.query) if request.waits else None
            if point is not None:
                answer, encoded = point, encode_answer(point, request.media_type)
            else:
                answer, encoded = await self._in_thread(lambda: self._read(request, deadline_s))
            if self._fresh(request, answer):
                return encoded
            # The data was fresh enough when the read began, but not when it ended: read again if there is time.
            if clock.monotonic_s() >= deadline_s:
                raise NotReady(_too_old(request))
            await asyncio.sleep(POLL_S)

    def _read(self, request: ReadRequest, deadline_s: float) -> tuple[Answer, Encoded]:
        answer = self._reader.read(request.query, deadline_s=deadline_s)
        return answer, encode_answer(answer, request.media_type)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @staticmethod
    def _fresh(request: ReadRequest, answer: Answer) -> bool:
        most, staleness_ms = request.max_staleness_ms, answer.as_of.staleness_ms
        return most is None or (staleness_ms is not None and staleness_ms <= most)

    async def _wait(self, request: ReadRequest, deadline_s: float) -> None:
        after = request.after or Token()
        wanted, most = after.next_offsets, request.max_staleness_ms

        def behind(states: States) -> list[PartitionState]:
            return [
                state
                for state in states
                if state.next_offset < (least := wanted.get(state.partition, 0))
                or (least and state.topic_id != after.topic_id)
            ]

        def ok(states: States) -> bool:
            fresh = most is None or all(s.staleness_ms is not None and s.staleness_ms <= most for s in states)
            return (fresh and not behind(states) and not unknown(states)) or self._is_other(after)

        def unknown(states: States) -> set[int]:  # a publisher may see new partitions first
            return wanted.keys() - {state.partition for state in states}

        if never := sorted(wanted.keys() & self._reader.elsewhere):
            raise Invalid(
                f"after: the token names partition {never[0]}, which this server does not follow; ask one that follows all "
                "partitions, or one with --gather, which splits tokens"
            )
        states = self._reader.partitions()
        await self._check_topic(after, deadline_s)
        if not ok(states):
            await self._waiter.until(ok, deadline_s - self._reader.clock.monotonic_s())
            states = self._reader.partitions()
            await self._check_topic(after, deadline_s)
        if ok(states):
            return
        if new := unknown(states):
            raise NotReady(f"after: there is no partition {min(new)} yet; this server has {len(states)}")
        late = behind(states)
        if late:
            number, next_offset = late[0].partition, late[0].next_offset
            raise NotReady(
                f"after: partition {number} is at {next_offset}, not at {wanted[number]}, after {request.timeout_ms} ms"
            )
        raise NotReady(_too_old(request))

    def _is_other(self, after: Token) -> bool:
        """Return whether the token is of another topic than the log has; False while the topic of the log is unknown."""
        topic_id = self._reader.topic_id
        return bool(after.next_offsets and topic_id) and topic_id != after.topic_id

    async def _check_topic(self, after: Token, deadline_s: float) -> None:
        """Raise `OtherTopic` if the token is of another topic.

        A publisher may learn before this server that the topic was made anew, so the log is asked once more first.
        `NotReady` if it does not answer soon.
        """
        if not self._is_other(after):
            return
        asked_s = self._reader.clock.monotonic_s()

        def asked_again(_: States) -> bool:
            return not self._is_other(after) or self._reader.seen_s >= asked_s

        known = await self._waiter.until(asked_again, min(_TOPIC_S, deadline_s - asked_s))
        if self._is_other(after):
            what = f"after: the token is of topic {after.topic_id}, but this server reads {self._reader.topic_id}"
            if not known:
                raise NotReady(f"{what}; whether that is the newest of its name is unknown while the log is away")
            raise OtherTopic(
                f"{what}: the topic was made anew since, or the token is of another app or cluster. Flush again for a new "
                "token, or read without `after`"
            )

    async def observe(self) -> None:
        """Read positions and end offsets at an interval, for the bound on staleness and for the gauges."""
        while True:
            try:
                self._reader.partitions()
            except PipelineError as error:
                _log.debug("not observed: %s", error)
            except Exception as error:
                self._failures.note(error)
                await asyncio.sleep(50 * OBSERVE_S)
            else:
                self._failures.forget()
            await asyncio.sleep(OBSERVE_S)

    def close(self) -> None:
        """End all running reads."""
        self._reader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _place(state: PartitionState) -> tuple[int, int, str]:
    return state.partition, state.next_offset, state.topic_id


def _too_old(request: ReadRequest) -> str:
    return f"no answer within max_staleness_ms={request.max_staleness_ms} after {request.timeout_ms} ms"
