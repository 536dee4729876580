"""Streams of answers: server-sent events with the answer to a read, and then with what changes in it.

Reads that ask for the same share a channel, which computes their answer once when a commit has changed the stores, and
keeps its newest updates. A reader that takes its events late, or comes back with the id of the last one it had, is sent the
updates in between as one; one that has missed more is sent the whole answer. So a slow reader costs no memory.

The format is that of the HTML standard, section "Server-sent events".
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec

import pipeline.metrics as m
from pipeline.core.answer import Answer
from pipeline.core.query import Query
from pipeline.core.updates import Update, merged, update_of
from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.problems import problem
from pipeline.settings import QuerySettings

UPDATES_MAX = 64
"""Most updates of a channel that are kept for readers that are late."""
SERIES_MAX = 50_000
"""Most series in all updates of a channel that are kept."""
_AGE_STEP_MS = 20
"""Readers that take an event within this time of each other are sent the same bytes."""
_PAUSE_TIMES = 4
"""An answer is computed again after so many times the time that it took: streams leave most of a core to others."""
_LATE_TIMES = 1.5
"""A heartbeat waits so many times its interval for an answer that is under way."""
_encode = msgspec.json.Encoder().encode


class AnswerSource(Protocol):
    """Answers that are to be watched."""

    async def read(self, query: Query) -> tuple[Answer, float]:
        """Return the answer of now, and the seconds that it took, without waiting. Raises as a read does."""
        ...

    async def moved(self, since: Any, timeout_s: float) -> Any:
        """Return the commits that the stores are at, as soon as they are others than `since` or the time is over."""
        ...


class Streams:
    """All streams of a server, on one event loop."""

    def __init__(self, source: AnswerSource, settings: QuerySettings, metrics: Metrics, clock: Clock) -> None:
        self._source = source
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._channels: dict[Query, _Channel] = {}
        self._open = 0
        self._shares = {limit: Counter[str]() for limit in ("streams_per_client_max", "stream_queries_per_client_max")}
        """By limit and client: open streams, and reads that are streamed and that the client was first to ask for."""
        metrics.set(m.STREAMS, 0)
        metrics.inc(m.ANSWERS, 0, "streamed")
        for reason in ("streams_max", "stream_queries_max", *self._shares):
            metrics.inc(m.READS_REFUSED, 0, reason)

    @asynccontextmanager
    async def open(self, query: Query, last_id: str = "", client: str = "") -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the events of a read for a client, those after the event `last_id` if that is known.

        Raises as the read does if its first answer can't be had, and `Unavailable` if there are too many streams, in all or
        of this client.
        """
        if self._open >= self._settings.streams_max:
            self._refuse("streams_max", f"{self._open} streams are open; no more are taken")
        streams, queries = self._shares.values()
        self._check_share("streams_per_client_max", client, "streams are open")
        channel = self._channels.get(query)
        if channel is None:
            if len(self._channels) >= self._settings.stream_queries_max:
                self._refuse("stream_queries_max", f"{len(self._channels)} different reads are streamed; no more are taken")
            self._check_share("stream_queries_per_client_max", client, "different reads are streamed")
            channel = self._channels[query] = _Channel(
                query, client, self._source, self._settings, self._clock, self._metrics
            )
            queries[client] += 1
        self._open += 1
        streams[client] += 1
        channel.reader_count += 1
        self._metrics.set(m.STREAMS, self._open)
        try:
            await channel.first_answer()
            yield channel.events(last_id)
        finally:
            self._open -= 1
            _take_one(streams, client)
            channel.reader_count -= 1
            self._metrics.set(m.STREAMS, self._open)
            if not channel.reader_count:
                self._channels.pop(query, None)
                _take_one(queries, channel.client)
                await channel.close()

    def _check_share(self, setting: str, client: str, what: str) -> None:
        count = self._shares[setting][client]
        if count >= getattr(self._settings, setting):
            self._refuse(setting, f"{count} {what} for this client ({client[:100]}); no more are taken")

    def _refuse(self, setting: str, why: str) -> None:
        self._metrics.inc(m.READS_REFUSED, 1, setting)
        raise Unavailable(f"{why} (setting {setting})")

    def close(self) -> None:
        """End all streams: their readers come back, to this server or to another."""
        for channel in self._channels.values():
            channel.end()


def _take_one(counts: Counter[str], client: str) -> None:
    counts[client] -= 1
    if not counts[client]:
        del counts[client]


class _Channel:
    """The answer to one read, its newest updates, and the readers that wait for the next."""

    def __init__(
        self,
        query: Query,
        client: str,
        source: AnswerSource,
        settings: QuerySettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.client = client
        """Client that was first to ask for the read: the channel is in its share for as long as somebody reads it."""
        self.reader_count = 0
        self._query = query
        self._source = source
        self._interval_s = settings.stream_interval_ms / 1000
        self._heartbeat_s = settings.stream_heartbeat_ms / 1000
        self._clock = clock
        self._metrics = metrics
        self._id = secrets.token_hex(6)
        self._answer: Answer | None = None
        self._read_s = 0.0
        """Monotonic time at which the answer was read."""
        self._error: Exception | None = None
        """The reason why there is no newer answer."""
        self._version = 0
        """Number of the newest update."""
        self._updates: deque[Update] = deque()
        self._round = 0
        """Number of times that readers were woken."""
        self._woken_s = clock.monotonic_s()
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._encoded: dict[int, bytes] = {}
        """Newest event by the version that its readers have."""
        self._encoded_age = 0
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = False
        self._task = asyncio.create_task(self._run())

    async def first_answer(self) -> None:
        """Wait for the first answer; raise what the read raised if there is none, or none at present."""
        await asyncio.shield(self._first)
        if self._error is not None:
            raise self._error

    async def events(self, last_id: str) -> AsyncIterator[bytes]:
        """Yield the next event whenever the reader takes one, until the stream ends."""
        version = self._version_of(last_id)
        seen = -1
        while not self._ended:
            if seen == self._round:
                await asyncio.shield(self._woken)
                continue
            seen = self._round
            if self._error is not None:
                version = -1  # whatever comes after a problem begins with the whole answer
                yield b"event: problem\ndata: %s\n\n" % problem(self._error).body
            else:
                event, version = self._event(version), self._version  # the version may rise while the event is sent
                yield event

    def _version_of(self, event_id: str) -> int:
        channel, _, number = event_id.partition("-")
        return int(number) if channel == self._id and number.isascii() and number.isdecimal() and len(number) < 16 else -1

    def _event(self, version: int) -> bytes:
        """Return the event that brings a reader from a version to the newest."""
        missing = self._version - version
        version = version if 0 <= missing <= len(self._updates) else -1
        age = int((self._clock.monotonic_s() - self._read_s) * 1_000 / _AGE_STEP_MS) + 1
        if age != self._encoded_age:
            self._encoded.clear()
            self._encoded_age = age
        event = self._encoded.get(version)
        if event is None:
            assert self._answer is not None
            head = _aged(self._answer, age * _AGE_STEP_MS)
            if version < 0:
                event = self._encode("answer", head)
            else:
                updates = [*self._updates][len(self._updates) - missing :]
                update = merged(updates) if updates else Update(head)
                event = self._encode("update", msgspec.structs.replace(update, answer=_without_series(head)))
            self._encoded[version] = event
        return event

    def _encode(self, name: str, value: Answer | Update) -> bytes:
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._id.encode(), self._version, name.encode(), _encode(value))

    async def _run(self) -> None:
        beating = asyncio.create_task(self._beat())
        try:
            await self._watch()
        except Exception as error:  # a fault of this program: readers are told, and come back
            self._fail(error)
            self.end()
            raise
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        """Give readers their heartbeats while an answer takes long to compute: the last answer's staleness grows."""
        late_s = _LATE_TIMES * self._heartbeat_s
        while True:
            left_s = self._woken_s + late_s - self._clock.monotonic_s()
            if left_s <= 0:
                self._wake()
                left_s = late_s
            await asyncio.sleep(left_s)

    async def _watch(self) -> None:
        since: Any = None
        while True:
            took_s = 0.0
            try:
                since = await self._source.moved(since, 0.0 if since is None else self._heartbeat_s)
                read_s = self._clock.monotonic_s()
                answer, took_s = await self._source.read(self._query)
                self._metrics.inc(m.ANSWERS, 1, "streamed")
            except PipelineError as error:
                self._fail(error)
            else:
                self._take(answer, read_s)
            await asyncio.sleep(max(self._interval_s, _PAUSE_TIMES * took_s))

    def _take(self, answer: Answer, read_s: float) -> None:
        before, self._answer, self._read_s = self._answer, answer, read_s
        self._encoded.clear()
        if before is None or self._error is not None:
            self._error = None
            self._updates.clear()
            self._version += 1
            self._wake()
        else:
            update = update_of(before, answer)
            if update is not None:
                self._keep(update)
                self._version += 1
            if update is not None or read_s - self._woken_s >= self._heartbeat_s:
                self._wake()
        if not self._first.done():
            self._first.set_result(None)

    def _keep(self, update: Update) -> None:
        kept = self._updates
        kept.append(update)
        while len(kept) > UPDATES_MAX or (kept and sum(len(it.changed) for it in kept) > SERIES_MAX):
            kept.popleft()

    def _fail(self, error: Exception) -> None:
        if not self._first.done():
            self._first.set_exception(error)
            self._first.exception()  # nobody may wait for it any more
            return
        known, self._error = self._error, error
        if str(known) != str(error) or self._clock.monotonic_s() - self._woken_s >= self._heartbeat_s:
            self._wake()

    def _wake(self) -> None:
        self._round += 1
        self._woken_s = self._clock.monotonic_s()
        woken, self._woken = self._woken, asyncio.get_running_loop().create_future()
        woken.set_result(None)

    def end(self) -> None:
        """End the streams of all readers."""
        self._ended = True
        if not self._woken.done():
            self._wake()

    async def close(self) -> None:
        """Stop to compute answers."""
        self._task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._task


def _aged(answer: Answer, age_ms: int) -> Answer:
    """Return an answer whose staleness is that of `age_ms` later."""
    staleness_ms = answer.as_of.staleness_ms
    if staleness_ms is None:
        return answer
    return msgspec.structs.replace(answer, as_of=msgspec.structs.replace(answer.as_of, staleness_ms=staleness_ms + age_ms))


def _without_series(answer: Answer) -> Answer:
    return msgspec.structs.replace(answer, series=[])
