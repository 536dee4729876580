"""Answers as they change: the stream of a read, which is opened again whenever it is lost.

A thread takes the events as they come and keeps the newest answer, so a caller that takes answers slowly gets the newest one
with its true staleness, and neither memory nor the server's sockets fill.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Self

import msgspec

from pipeline.adapters.http_client import Client, EventStream, error_of
from pipeline.core.answer import Answer
from pipeline.core.events import EventParser, ServerEvent
from pipeline.core.updates import Update, updated
from pipeline.errors import BadRecord, Invalid, NotReady, PipelineError, Unavailable
from pipeline.ports import Clock
from pipeline.threads import ReentrantCondition

SERIES_MAX = 1_000_000
"""Series of an answer that grows by updates; no server answers with more."""
_PAUSE_S = 0.25
_PAUSE_S_MAX = 5.0
_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_update = msgspec.json.Decoder(Update).decode


class WatchLink:
    """The newest answer to a read, which a thread keeps up to date from the first time that it is asked for.

    `path` is the path of the read, and `limit_s` how long an answer may take.
    """

    def __init__(self, client: Client, path: str, clock: Clock, limit_s: float, on_end: Callable[[WatchLink], None]) -> None:
        self.changed = ReentrantCondition()
        self.problem: PipelineError | None = None
        """Reason why there is no newer answer than the one that was taken last; None while they come."""
        self._problem: PipelineError | None = None
        self._client = client
        self._path = path
        self._clock = clock
        self._limit_s = limit_s
        self._on_end = on_end
        self._pid = os.getpid()
        self._started = False
        self._closed = False  # no Event: `close` may interrupt a call that holds its lock
        self._ended = False
        self._error: BaseException | None = None
        self._stream: EventStream | None = None
        self._answer: Answer | None = None
        self._arrived_s = 0.0
        """Time at which the first byte of the newest answer came, from which its staleness grows."""
        self._last_id = ""
        self._news = False
        """True while there is something that was not taken: an event, or a failed attempt to connect."""
        self._waiters: list[Callable[[], object]] = []

    def start(self) -> None:
        """Start to read, at the first call."""
        if self._pid != os.getpid():
            raise Invalid("a watch from before a fork: make one in each process")
        with self.changed:
            if not self._started:
                threading.Thread(target=self._run, name="pipeline-watch", daemon=True).start()
                self._started = True

    def ready(self, waiter: Callable[[], object] | None = None) -> bool:
        """Return whether `take` would not wait; if it would, have another thread call `waiter` once it would not."""
        with self.changed:
            found = self._news or self._ended
            if waiter is not None and not found:
                self._waiters.append(waiter)
            return found

    def take(self) -> Answer | None:
        """Return the newest answer, as stale as it is by now; None at the end. Wait if there is nothing new.

        Raises what ended the watch, once.
        """
        with self.changed:
            while not self._news and not self._ended:
                self.changed.wait()
            if self._news and not self._closed:
                self._news, self.problem = False, self._problem
                return self._aged()
            error, self._error = self._error, None
        if error is not None and not self._closed:
            raise error
        return None

    def close(self) -> None:
        """End the watch, also while it is waited for in another thread. May be called twice, and by a signal handler."""
        if self._pid != os.getpid():
            return  # the connection is the parent's, and a thread of the parent may have held the lock at the fork
        with self.changed:
            self._closed = True
            if self._stream is not None:
                self._stream.interrupt()
            self._finish()

    def _aged(self) -> Answer | None:
        answer = self._answer
        if answer is None or answer.as_of.staleness_ms is None:
            return answer
        since_ms = int((self._clock.monotonic_s() - self._arrived_s) * 1_000)
        as_of = msgspec.structs.replace(answer.as_of, staleness_ms=answer.as_of.staleness_ms + since_ms)
        return msgspec.structs.replace(answer, as_of=as_of)

    def _tell(
        self, *, answer: Answer | None = None, arrived_s: float | None = None, problem: PipelineError | None = None
    ) -> None:
        with self.changed:
            self._problem = problem
            if answer is not None:
                self._answer, self._arrived_s = answer, self._clock.monotonic_s() if arrived_s is None else arrived_s
            self._news = True
            self._wake()

    def _wake(self) -> None:
        self.changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def _finish(self, error: BaseException | None = None) -> None:
        with self.changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._on_end(self)
                self._wake()

    def _run(self) -> None:
        try:
            if self._client.live:
                self._follow()
            else:
                status, body = self._client.request("GET", self._path, timeout_s=self._limit_s)
                if status != 200:
                    raise error_of(self._client.url, status, body)
                self._tell(answer=_decode_answer(body))
            self._finish()
        except BaseException as error:  # raised where the next answer is asked for
            self._finish(error)

    def _follow(self) -> None:
        """Take events until the watch is closed; come back whenever the connection is lost."""
        pause_s = _PAUSE_S
        while not self._closed:
            number = self._arrived_s
            error: PipelineError = Unavailable(f"{self._client.url}: the stream has ended")
            try:
                self._take_events()
            except (Unavailable, NotReady) as lost:
                error = lost
            if self._answer is None:
                raise error
            self._tell(problem=error)
            pause_s = _PAUSE_S if self._arrived_s != number else min(2 * pause_s, _PAUSE_S_MAX)
            # Many clients of a server that was started again come one after the other.
            with self.changed:
                if not self._closed:
                    self.changed.wait(pause_s * (0.5 + int(self._clock.new_id()[:4], 16) / 2**17))

    def _take_events(self) -> None:
        path, _, query = self._path.partition("?")
        stream = self._client.stream(f"{path}/stream?{query}", timeout_s=self._limit_s, last_id=self._last_id)
        try:
            with self.changed:
                if self._closed:
                    return
                self._stream = stream
            parser = EventParser(stream.bytes_max)
            begun_s = 0.0
            while data := stream.read():
                now_s = self._clock.monotonic_s()
                if not parser.within_event:
                    begun_s = now_s
                for event in self._events(parser, data):
                    self._take_event(event, begun_s)
                    begun_s = now_s
        finally:
            with self.changed:
                self._stream = None
            stream.close()

    def _events(self, parser: EventParser, data: bytes) -> list[ServerEvent]:
        try:
            return parser.feed(data)
        except BadRecord as error:
            raise Invalid(f"{self._client.url}: {error}: ask for less, or raise answer_bytes_max") from None

    def _take_event(self, event: ServerEvent, begun_s: float) -> None:
        if event.name == "problem":
            error = error_of(self._client.url, 503, event.data)
            if self._answer is None or not isinstance(error, Unavailable | NotReady):
                raise error
            self._tell(problem=error)
            return
        try:
            if event.name == "answer":
                answer = _decode_answer(event.data)
            elif event.name == "update" and self._answer is not None:
                answer = updated(self._answer, _decode_update(event.data))
            else:
                return  # an event of a later version
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
            self._last_id = ""  # begin with a whole answer
            raise Unavailable(f"{self._client.url}: not an event of this API: {error!r:.200}") from None
        if len(answer.series) > SERIES_MAX:
            raise Invalid(f"{self._client.url}: updates have made an answer of over {SERIES_MAX} series: ask for less")
        self._last_id = event.id
        self._tell(answer=answer, arrived_s=begun_s)


class Watch:
    """Iterator over the answers to one read, the newest one each time, made by `Reader.watch`.

    It ends when it is closed: by `close()`, which may come from another thread, by the end of its `with` block, by the
    reader's `close()`, or when nothing refers to it any more, as after `break`.
    """

    def __init__(self, link: WatchLink) -> None:
        self._link = link

    @property
    def problem(self) -> PipelineError | None:
        """Reason why the last answer is no newer, such as a lost connection; None while answers come."""
        return self._link.problem

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Answer:
        self._link.start()
        answer = self._link.take()
        if answer is None:
            raise StopIteration
        return answer

    def close(self) -> None:
        """Close the connection; who waits for an answer sees the end. May be called twice."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
