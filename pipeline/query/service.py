"""Serves reads to an event loop: point reads at once, scans in a few threads, waits without any.

Everything is bounded: the threads, the reads that wait for one or for newer data, and the time of each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import msgspec
from msgspec.structs import replace

import pipeline.metrics as m
from pipeline.budget import Spent
from pipeline.core.answer import Answer, AsOf, PartitionState
from pipeline.core.exposition import Exposition
from pipeline.core.gathered import decode_asked, encode_part
from pipeline.core.grants import Bounds
from pipeline.core.query import Query
from pipeline.core.token import Token
from pipeline.errors import Invalid, NotFound, NotReady, OtherTopic, PipelineError
from pipeline.metrics import Metrics
from pipeline.query.codings import encode_end, preferred_coding
from pipeline.query.found import FoundAnswer, answers_together, release, span_of, unchanged_head
from pipeline.query.kept import KeptAnswer
from pipeline.query.media import ARROW, Encoded, encode_answers, encode_body, encoded, end_of, plain_json
from pipeline.query.pages import AnswerPages, PageLists, Place
from pipeline.query.params import ReadHeaders, ReadRequest, SeveralRequest, Waiting
from pipeline.query.read_pool import Asker, ReadPool, Receive
from pipeline.query.reader import ViewReader
from pipeline.query.remote_reads import RemoteReads
from pipeline.query.shared import SharedAnswers
from pipeline.settings import QuerySettings
from pipeline.threads import Failures

_log = logging.getLogger(__name__)
POLL_S = 0.003
OBSERVE_S = 0.1
_TOPIC_S = 2.0
"""Longest wait for the log to answer which topic it has now, and where that ends."""
_END_S = 0.25
"""Time after which an answer of the log about its end counts as newer than a token that the client has."""

NOT_FOLDED = "if it was published a moment ago, pass the token that flush() returned: after=token"

States = Sequence[PartitionState]
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
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
            async with asyncio.timeout(max(0.0, timeout_s)):  # not wait_for, which swallows being cancelled at the same time
                await future
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
        self._remote = RemoteReads(reader, settings)
        self._settings = settings
        self._metrics = metrics
        self._pool = ReadPool(settings, metrics, reader.clock)
        self._waiter = _PositionWaiter(reader.partitions)
        self._failures = Failures(_log, "observe", metrics)
        self._lists = PageLists(reader.clock, settings, metrics)
        self._answers = SharedAnswers(reader, settings.answer_cache_bytes, metrics, self._start)

    def _start(self, compute: Callable[[], KeptAnswer], query: Query, spent: Spent) -> asyncio.Task[KeptAnswer]:
        return self._pool.start(compute, large=self._is_large(query), spent=spent)

    def _is_large(self, *queries: Query) -> bool:
        """Return whether the answers together can have so many series that few such are made at once."""
        limits = [min(it for it in (query.limit, query.top, query.bottom) if it is not None) for query in queries]
        most = self._settings.large_answer_series
        if sum(limits) <= most:
            return False
        counts = [self._reader.series_count(query) if query.by != () else 1 for query in queries]
        return sum(map(min, limits, counts)) > most

    async def answer(self, request: ReadRequest, receive: Receive | None = None) -> Encoded:
        """Return the encoded answer. `NotReady` if data it waits for does not come, `Unavailable` without time or room.

        `receive` tells when the client goes away, which ends a wait, and a scan at its next check.
        """
        try:
            return await self._answer(request, Asker(receive))
        except NotFound as error:
            if request.after is not None:
                raise
            raise NotFound(f"{error}; {NOT_FOLDED}") from None

    async def _answer(self, request: ReadRequest, asker: Asker) -> Encoded:
        if request.cursor:
            return await self._page(self._lists.find(request.cursor, request.query), request, asker)
        clock = self._reader.clock
        if request.cursor is None and not request.waits:
            found = self._reader.find_point(request.query, clock.now_ms())
            if found is not None:
                return await self._encode_point(found, request, asker)
        deadline_s = clock.monotonic_s() + request.timeout_ms / 1000
        while True:
            if request.waits:
                await self._wait(request, deadline_s, asker.receive)
            answer = await (self._shared if request.cursor is None else self._first_page)(request, deadline_s, asker)
            if answer is not None:
                return answer
            # The data was fresh enough when the read began, but not when it ended: read again if there is time.
            if clock.monotonic_s() >= deadline_s:
                raise NotReady(too_old(request))
            await asyncio.sleep(POLL_S)

    async def _first_page(self, request: ReadRequest, deadline_s: float, asker: Asker) -> Encoded | None:
        """Return the first page of an answer whose other pages are kept; None if it is not fresh enough."""
        whole = replace(request.query, limit=self._settings.limit_max)

        def read() -> AnswerPages:
            found = self._reader.find(whole, self._reader.clock.now_ms(), deadline_s=deadline_s)
            pages = AnswerPages(request.query, found)
            self._lists.check(pages)
            return pages

        pages = await self._pool.bounded(self._pool.run, read, large=self._is_large(whole), asker=asker)
        if not self._fresh(request, self._reader.renewed(pages.head, pages.positions).as_of):
            return None
        return await self._page(self._lists.keep(pages), request, asker)

    async def _page(self, place: Place, request: ReadRequest, asker: Asker) -> Encoded:
        head = self._reader.renewed(place.pages.head, place.pages.positions)
        following = self._lists.cursor_after(place)
        page = partial(place.pages.page, place.number, head, following, request.media_type)
        answer, body = await self._pool.bounded(self._pool.run, page, asker=asker)
        parts, coding = await self._pool.coded(body, request.coding, asker)
        return encoded(answer, request.media_type, b"", parts, coding)

    async def _encode_point(self, found: FoundAnswer, request: ReadRequest, asker: Asker) -> Encoded:
        """Return an answer that is not kept."""
        answer = found.answer
        etag = self._answers.tags.of(request.key, span_of(answer), found.positions)
        if request.knows(etag):
            return encoded(answer, request.media_type, etag, (), unchanged=True)
        if request.media_type == ARROW:  # the first one loads pyarrow
            body = await self._pool.run(lambda: encode_body(answer, ARROW), asker=asker)
        else:
            body = encode_body(answer, request.media_type)
        if not request.coding:
            return encoded(answer, request.media_type, etag, (body,))
        parts, coding = await self._pool.coded(body, request.coding, asker)
        return encoded(answer, request.media_type, etag, parts, coding)

    async def _shared(self, request: ReadRequest, deadline_s: float, asker: Asker) -> Encoded | None:
        """Return an answer from a few keys, or one that equal reads of one commit share; None if it is not fresh enough."""
        if request.waits:
            found = self._reader.find_point(request.query, self._reader.clock.now_ms())
            if found is not None:
                fresh = self._fresh(request, found.answer.as_of)
                return await self._encode_point(found, request, asker) if fresh else None
        asked = self._reader.asked(request.query)
        if asked is not None and request.known:
            etag = self._answers.tags.of(request.key, asked.span, asked.positions)
            if request.knows(etag):
                answer = self._reader.renewed(unchanged_head(asked), asked.positions)
                self._metrics.inc(m.ANSWERS, 1, "unchanged")
                unchanged = encoded(answer, request.media_type, etag, (), unchanged=True)
                return unchanged if self._fresh(request, answer.as_of) else None
        kept = await self._answers.get(request.key, asked, deadline_s, asker)
        coded = None
        if request.coding and len(kept.start) >= self._settings.compress_bytes_min:
            coded = await self._answers.coded(kept, request.coding, self._pool.compress, asker)
        answer = self._reader.renewed(kept.head, kept.positions)
        if not self._fresh(request, answer.as_of):
            return None
        end = end_of(answer, request.media_type)
        if coded is not None:
            parts = coded.start, encode_end(coded, end)
            return encoded(answer, request.media_type, kept.etag, parts, request.coding)
        return encoded(answer, request.media_type, kept.etag, (kept.start, end))

    async def read(self, query: Query) -> tuple[Answer, float]:
        """Return the answer of now, not encoded, and the seconds that it took. `Unavailable` without time or room."""
        deadline_s = self._pool.deadline_s()
        clock = self._reader.clock

        def read() -> tuple[Answer, float]:
            begun_s = clock.monotonic_s()
            return self._reader.read(query, deadline_s=deadline_s), clock.monotonic_s() - begun_s

        return await self._pool.bounded(self._pool.run, read, large=self._is_large(query))

    async def moved(self, since: States | None, timeout_s: float) -> States:
        """Return the positions of the stores, as soon as one is another than in `since` or the time is over."""

        def other(states: States) -> bool:
            return since is None or [*map(_place, states)] != [*map(_place, since)]

        await self._waiter.until(other, timeout_s)
        return self._reader.partitions()

    async def wait(self, request: ReadRequest, receive: Receive | None = None) -> None:
        """Wait for what the read asks to wait for. Raises as `answer`."""
        if request.waits:
            await self._wait(request, self._reader.clock.monotonic_s() + request.timeout_ms / 1000, receive)

    async def answers(self, request: SeveralRequest, headers: ReadHeaders, receive: Receive | None = None) -> Encoded:
        """Return the encoded answers to several queries at one moment. Raises as `answer`, and for one wrong query."""
        clock = self._reader.clock
        deadline_s, asker = clock.monotonic_s() + request.timeout_ms / 1000, Asker(receive)

        def read() -> tuple[AsOf, bytes]:
            found = self._reader.find_all(request.queries, clock.now_ms(), deadline_s=deadline_s)
            answers = answers_together([self._reader.renewed(it.answer, it.positions) for it in found])
            body = encode_answers(answers)
            for it in found:
                release(it.answer)
            return answers.as_of, body

        large = self._is_large(*request.queries)

        while True:
            if request.waits:
                await self._wait(request, deadline_s, receive)
            as_of, body = await self._pool.bounded(self._pool.run, read, large=large, asker=asker)
            if self._fresh(request, as_of):
                parts, coding = await self._pool.coded(body, preferred_coding(headers.encoding), asker)
                return plain_json(parts, coding)
            if clock.monotonic_s() >= deadline_s:
                raise NotReady(too_old(request))
            await asyncio.sleep(POLL_S)

    async def views(self, headers: ReadHeaders, bounds: Bounds | None = None) -> Encoded:
        """Return all views within bounds, encoded."""
        body = await self._pool.bounded(self._pool.run, lambda: _encode(self._reader.views(bounds)))
        parts, coding = await self._pool.coded(body, preferred_coding(headers.encoding))
        return plain_json(parts, coding)

    async def scrape(
        self,
        views: Sequence[str],
        render: RenderViews,
        accept: str,
        *,
        windowed: bool = True,
        bounds: Bounds | None = None,
        receive: Receive | None = None,
    ) -> tuple[bytes, str]:
        """Return all views within bounds, or these, as `render` writes them.

        Raises as `ViewReader.scrape`; `Unavailable` without room.
        """
        deadline_s = self._pool.deadline_s()

        def scrape() -> tuple[bytes, str]:
            return render(self._reader.scrape(views, windowed=windowed, deadline_s=deadline_s, bounds=bounds), accept)

        return await self._pool.bounded(self._pool.run, scrape, asker=Asker(receive))

    async def remote_read(self, body: bytes, bounds: Bounds | None = None, receive: Receive | None = None) -> bytes:
        """Return the answer to a remote read of Prometheus. Raises as `RemoteReads.answer`; `Unavailable` without room."""
        deadline_s = self._pool.deadline_s()
        read = partial(self._remote.answer, body, bounds, deadline_s=deadline_s)
        return await self._pool.bounded(self._pool.run, read, asker=Asker(receive))

    async def states(self, body: bytes, receive: Receive | None = None) -> bytes:
        """Return what a server that merges several asks for; see `core.gathered`. Raises as `answer`."""
        clock = self._reader.clock
        arrived_s = clock.monotonic_s()
        asked = decode_asked(body)
        deadline_s = arrived_s + min(asked.timeout_ms, self._settings.timeout_ms_max) / 1000
        if asked.after or asked.max_staleness_ms is not None:
            token = Token.parse(asked.after)
            waiting = Waiting(timeout_ms=asked.timeout_ms, after=token, max_staleness_ms=asked.max_staleness_ms)
            await self._wait(waiting, deadline_s, receive)

        def read() -> bytes:
            return encode_part(self._reader.states(asked, arrived_s=arrived_s, deadline_s=deadline_s))

        if not asked.reads and not asked.views and asked.views is not None:
            return read()  # at once, also while many reads run: by this the other server knows that this one is there
        return await self._pool.bounded(self._pool.run, read, asker=Asker(receive))

    @staticmethod
    def _fresh(request: Waiting, as_of: AsOf) -> bool:
        most, staleness_ms = request.max_staleness_ms, as_of.staleness_ms
        return most is None or (staleness_ms is not None and staleness_ms <= most)

    async def _wait(self, request: Waiting, deadline_s: float, receive: Receive | None) -> None:
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
        if not ok(states) or self._is_other(after):
            async with self._pool.waiting(receive):
                await self._check_topic(after, deadline_s)
                await self._check_end(after, deadline_s, ok)
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
        raise NotReady(too_old(request))

    async def _check_end(self, after: Token, deadline_s: float, ok: Callable[[States], bool]) -> None:
        """Raise `Invalid` if the token names an offset beyond the log's end: nothing that was acknowledged is there.

        What this server knows of the end can be older than the token, so the log is asked once more first.
        """

        def beyond(states: States) -> list[PartitionState]:
            return [
                it for it in states if it.end_offset is not None and after.next_offsets.get(it.partition, 0) > it.end_offset
            ]

        if not beyond(self._reader.partitions()):
            return
        asked_s = self._reader.clock.monotonic_s() + _END_S

        def settled(states: States) -> bool:
            return ok(states) or not beyond(states) or self._reader.seen_s >= asked_s

        known = await self._waiter.until(settled, min(_TOPIC_S, deadline_s - self._reader.clock.monotonic_s()))
        if known and not self._is_other(after) and (far := beyond(self._reader.partitions())):
            it = far[0]
            raise Invalid(
                f"after: the token names offset {after.next_offsets[it.partition]} of partition {it.partition}, and the log "
                f"ends at {it.end_offset}: it is no token of this log, or the log has lost what was acknowledged"
            )

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
                self._lists.expire()
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
        """End all running reads, and take no more."""
        self._pool.close()
        self._reader.close()


def _place(state: PartitionState) -> tuple[int, int, str]:
    return state.partition, state.next_offset, state.topic_id


def too_old(request: Waiting) -> str:
    """Return the message of a read that found no answer that is fresh enough."""
    return f"no answer within max_staleness_ms={request.max_staleness_ms} after {request.timeout_ms} ms"
