"""The publisher: drains buffers into sealed batches, sends them until they are acknowledged, and says so with a token.

Two threads: the flusher merges and seals every `flush_interval_ms`, the sender sends. While the log, or a partition of
it, is away, few batches are sealed for it: deltas pile up as merged series, not as batches.
"""

from __future__ import annotations

import logging
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import pipeline.metrics as m
import pipeline.producer.process as process
from pipeline.core.merge import KIND_NAMES
from pipeline.core.record import Definition, check_definition
from pipeline.core.token import Token
from pipeline.core.view import describe
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, LogWriter
from pipeline.producer.account import Account
from pipeline.producer.buffer import VIEW_TYPES, LastView, ObserveView, SumView, View
from pipeline.producer.delivery import Delivery
from pipeline.producer.sealing import Merged
from pipeline.settings import PublisherSettings

_log = logging.getLogger(__name__)
_PARKED_LOOK_S = 1.0
_RETRY_S = 0.05
_COMPLAIN_S = 10.0
_VIEWS_MAX = 10_000

ViewT = TypeVar("ViewT", bound=View)


class _Flush:
    """One caller's wait: `barrier` says, once everything was sealed, which sequences must be settled."""

    def __init__(self, rejected_count: int) -> None:
        self.rejected_count = rejected_count
        """Rejected batches that somebody was told of when the wait began."""
        self.barrier: Mapping[int, int] | None = None


class BasePublisher:
    """A publisher on any `LogWriter`; `pipeline.Publisher` makes one from a URL. Safe from any thread.

    Recording, flushing and closing are also safe in signal handlers and finalisers. A forked child starts clean: views
    and cells of its parent work there, and record for a producer of its own.
    """

    def __init__(self, writer: LogWriter, clock: Clock, settings: PublisherSettings, metrics: Metrics = NO_METRICS) -> None:
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        for reason in ("buffer_full", "closed", "no number", "rejected"):
            metrics.inc(m.PUBLISHER_DROPPED, 0, reason)  # so that an alert sees the first one as a rise
        self._views: dict[str, View] = {}
        self._closed = False
        self._inherited = False
        self._start()
        process.join(self)

    def _start(self) -> None:
        # `with self._lock` can't be interrupted between taking it and the block; `with self._changed` can.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closing_lock = threading.RLock()
        self._closing = self._closed
        self._account = Account(self._settings, self._metrics, self._lock, self._changed)
        self._delivery = Delivery(
            self._clock.new_id(), self._writer, self._settings, self._metrics, self._account, self._lock, self._changed
        )
        self._used = False
        self._started = False
        self._threads: dict[str, threading.Thread] = {}
        self._stopping = False
        self._flushes: list[_Flush] = []
        self._told_count = 0
        """Rejected batches that a flush has raised for."""
        self._delta_count = 0

    def start_clean(self) -> None:
        """What a forked child does first: what is buffered is its parent's to send."""
        self._inherited = True
        self._start()
        for view in [*self._views.values()]:
            view.forget(self._account)

    def __enter__(self: PublisherT) -> PublisherT:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.close()
        except PipelineError as error:
            if exc[0] is None:
                raise
            _log.error("closing after another error: %s", error)

    # Views

    def sum(self, view: str, *, labels: Sequence[str] = (), window_s: int | None = None, monotone: bool = False) -> SumView:
        """The view of this name, as the total of what is added. `labels` names its labels, in the order of keys.

        A `monotone` one takes no negative number, everywhere, so it never falls: Prometheus sees it as a counter.
        """
        return self._view(SumView, "sum", view, labels, window_s, monotone)

    def min(self, view: str, *, labels: Sequence[str] = (), window_s: int | None = None) -> ObserveView:
        """The view of this name, as the smallest observation."""
        return self._view(ObserveView, "min", view, labels, window_s)

    def max(self, view: str, *, labels: Sequence[str] = (), window_s: int | None = None) -> ObserveView:
        """The view of this name, as the largest observation."""
        return self._view(ObserveView, "max", view, labels, window_s)

    def mean(self, view: str, *, labels: Sequence[str] = (), window_s: int | None = None) -> ObserveView:
        """The view of this name, as the mean of all observations."""
        return self._view(ObserveView, "mean", view, labels, window_s)

    def last(self, view: str, *, labels: Sequence[str] = (), window_s: int | None = None) -> LastView:
        """The view of this name, as the newest value that was set."""
        return self._view(LastView, "last", view, labels, window_s)

    def view(
        self, kind: str, view: str, *, labels: Sequence[str] = (), window_s: int | None = None, monotone: bool = False
    ) -> View:
        """The view of this name and of a kind that is only known at run time."""
        return self._view(View, kind, view, labels, window_s, monotone)

    def _view(
        self, _: type[ViewT], kind: str, view: str, labels: Sequence[str], window_s: int | None, monotone: bool = False
    ) -> ViewT:
        if self._closing:
            raise Invalid("this publisher is closed")
        definition = _definition(kind, view, labels, window_s, monotone)
        known = self._views.get(definition.view)
        if known is None:
            if len(self._views) >= _VIEWS_MAX:
                raise Invalid(f"over {_VIEWS_MAX} views")
            new = VIEW_TYPES[definition.kind](definition, self._account, self._clock.now_ms, self._on_register)
            known = self._views.setdefault(definition.view, new)
        if known.declared != definition:
            raise Invalid(f"view {definition.view} is {describe(known.declared)} here; not {describe(definition)}")
        return known  # type: ignore[return-value]

    # Flushing and closing

    def flush(self, timeout_s: float = 10.0) -> Token:
        """Wait until everything recorded before the call is acknowledged; the token lets a read wait for it.

        Raises `Unavailable` after `timeout_s`; the deltas stay buffered and are sent all the same. Raises `Invalid` if
        batches were rejected for good since the last flush: they are gone, and counted.
        """
        if self._closed:
            raise Invalid("this publisher is closed")
        return self._flush(timeout_s)

    def _flush(self, timeout_s: float) -> Token:
        if self._in_own_thread():
            raise Invalid("the publisher's own threads can't wait for it")  # a finaliser or log handler was run by one
        if not self._used:
            return self._delivery.token  # nothing was ever recorded in this process
        flush = _Flush(self._told_count)
        with self._locks_released():
            self._start_threads()
            try:
                with self._lock:
                    self._flushes.append(flush)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopping or self._settled(flush), timeout_s)
                    return self._outcome(flush, timeout_s)
            finally:
                if flush in self._flushes:
                    self._flushes.remove(flush)

    @contextmanager
    def _locks_released(self) -> Iterator[None]:
        """Before waiting for other threads: in a signal handler or finaliser, this thread can hold what they need."""
        locks = [self._lock, *[view.lock for view in [*self._views.values()]]]
        counts = [_release(lock) for lock in locks]
        try:
            yield
        finally:
            for lock, count in zip(locks, counts, strict=True):
                for _ in range(count):
                    lock.acquire()

    def _outcome(self, flush: _Flush, timeout_s: float) -> Token:
        if rejected := self._delivery.rejected_since(flush.rejected_count):
            self._told_count = max(self._told_count, self._delivery.rejected_count)
            raise Invalid(rejected)
        if not self._settled(flush):
            why = "the publisher was closed" if self._stopping else f"not acknowledged within {timeout_s} s"
            series = sum(map(len, [*self._views.values()]))
            raise Unavailable(
                f"{why}: {len(self._delivery.outbox)} batches and {series} buffered series wait{self._delivery.trouble}"
            )
        return self._delivery.token

    def _settled(self, flush: _Flush) -> bool:
        return flush.barrier is not None and self._delivery.outbox.settled(flush.barrier)

    def _in_own_thread(self) -> bool:
        return threading.get_ident() in self._account.own_threads

    def close(self, timeout_s: float | None = None) -> Token:
        """Flush, then let go of threads and connections; from then on recording raises `Invalid`. Twice is fine.

        Raises as `flush` does, after letting go: what was not acknowledged until then is lost, and counted.
        """
        if self._in_own_thread():  # a finaliser, run there by chance
            threading.Thread(target=self.close, args=(timeout_s,), name="pipeline-closer", daemon=True).start()
            return self._delivery.token
        with self._locks_released(), self._closing_lock:  # a second thread waits for the first
            if self._closed:
                return self._delivery.token
            return self._close(self._settings.close_timeout_ms / 1000 if timeout_s is None else timeout_s)

    def _close(self, timeout_s: float) -> Token:
        self._closing = True
        for view in [*self._views.values()]:
            view.shut()
        try:
            return self._flush(timeout_s)
        except Unavailable:
            if self._closed:  # by a signal handler, in the midst of this
                return self._delivery.token
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
            threads = [*self._threads.values()]
        process.leave(self)
        for thread in threads:
            thread.join(5.0)
        lost = len(self._delivery.outbox) + sum([view.waiting_count() for view in [*self._views.values()]])
        if lost:
            self._metrics.inc(m.PUBLISHER_DROPPED, lost, "closed")
        if self._used or not self._inherited:  # connections that only the parent has used are the parent's to close
            self._writer.close()

    def stats(self) -> dict[str, int]:
        """Deltas drained; batches and entries acknowledged; batches rejected, waiting; bytes of the memory account."""
        with self._lock:
            delivery = self._delivery
            return {
                "deltas": self._delta_count,
                "batches": delivery.batch_count,
                "entries": delivery.entry_count,
                "rejected": delivery.rejected_count,
                "waiting": len(delivery.outbox),
                "buffer_bytes": self._account.used_bytes,
            }

    # The threads

    def _on_register(self) -> None:
        if self._closing:
            raise Invalid("this publisher is closed")
        if not self._used:
            self._used = True
            process.drain_when_child_ends()
        self._start_threads()

    def _start_threads(self) -> None:
        """See to it that the threads run, soon.

        `Thread.start` waits for the thread, with a lock of its own; a signal handler that came in there could not wait for
        it too. So a helper does it, in a thread that one call starts.
        """
        if self._started:
            return
        try:
            self._started = True  # before the helper, which takes it back if it fails
            start_new_thread(self._start_both, ())
        except BaseException as error:
            self._started = False  # two helpers do no harm
            if isinstance(error, RuntimeError):
                raise Unavailable(f"no thread can be started: {error}") from error
            raise

    def _start_both(self) -> None:
        try:
            with self._lock:
                self._start_thread("flusher", self._flush_until_stopped)
                self._start_thread("sender", self._send_until_stopped)
        except Exception:
            _log.exception("the publisher's threads can't be started; what is recorded waits")
            self._started = False  # whoever registers a series or flushes next tries again

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        if name in self._threads or self._stopping:
            return

        def run_owned() -> None:
            self._account.own_threads.add(threading.get_ident())
            run()

        thread = threading.Thread(target=run_owned, name=f"pipeline-{name}", daemon=True)
        thread.start()
        self._threads[name] = thread

    # The flusher

    def _flush_until_stopped(self) -> None:
        interval_s = self._settings.flush_interval_ms / 1000
        looked_s = pause_s = complained_s = 0.0
        while True:
            with self._lock:
                # Whoever is starved must not keep this thread, and the interpreter lock, busy.
                self._changed.wait_for(self._flush_asked, min(pause_s, interval_s))
                self._changed.wait_for(self._asked, max(0.0, interval_s - pause_s))
                if self._stopping:
                    return
                flushes = [flush for flush in self._flushes if flush.barrier is None]
            started_s = self._clock.monotonic_s()
            look = bool(flushes) or started_s - looked_s >= _PARKED_LOOK_S
            looked_s = started_s if look else looked_s
            try:
                everything = self._drain(started_s, parked=look)
            except Exception:  # a flusher that dies would keep everybody's deltas for ever
                everything = False
                if not complained_s or started_s - complained_s >= _COMPLAIN_S:
                    complained_s = started_s
                    _log.exception("a flush failed; its deltas are kept and tried again")
            pause_s = max(0.001, self._clock.monotonic_s() - started_s)
            if everything and flushes:
                with self._lock:
                    for flush in flushes:
                        flush.barrier = self._delivery.outbox.next_sequences()
                    self._changed.notify_all()
            elif flushes:
                with self._lock:
                    self._changed.wait_for(lambda: self._stopping, min(interval_s, _RETRY_S))

    def _asked(self) -> bool:
        return self._account.starved or self._account.due or self._flush_asked()

    def _flush_asked(self) -> bool:
        return self._stopping or any(flush.barrier is None for flush in self._flushes)

    def _drain(self, now_s: float, *, parked: bool) -> bool:
        """Merge all buffers and seal what there is room for; whether everything that was recorded is sealed now."""
        self._account.drained()
        pressed = self._account.pressed
        idle_s = 0.0 if pressed else self._settings.series_idle_ms / 1000
        views = [*self._views.values()]
        found = [(view, view.look(now_s=now_s, idle_s=idle_s, parked=parked)) for view in views]
        everything = True
        if any(cells or view.orphans for view, cells in found) or self._delivery.unsealed:
            now_ms = self._clock.now_ms()
            partition_count, busy = self._delivery.room(now_ms)
            merged: list[Merged] = []
            try:
                for view, cells in found:
                    everything &= view.drain(cells, merged, partition_count=partition_count, busy=busy, pressed=pressed)
            finally:
                delta_count = sum([series.delta_count for series in merged])
                with self._lock:
                    self._delta_count += delta_count
                everything &= self._delivery.seal(merged, partition_count, now_ms)
                self._metrics.inc(m.PUBLISHER_DELTAS, delta_count)
        for view in views:
            lost, view.lost_count = view.lost_count, 0
            if lost:
                self._metrics.inc(m.PUBLISHER_DROPPED, lost, "no number")
                _log.error("view %s: %d deltas were no numbers any more when they were merged", view.definition.view, lost)
        self._metrics.set(m.PUBLISHER_BYTES, self._account.used_bytes)
        self._metrics.set(m.PUBLISHER_SERIES, sum(map(len, views)))
        return everything

    # The sender

    def _send_until_stopped(self) -> None:
        backoff_s = 0.0
        while True:
            with self._lock:
                if backoff_s:
                    self._changed.wait_for(lambda: self._stopping, backoff_s)
                self._changed.wait_for(lambda: self._stopping or len(self._delivery.outbox) > 0)
                if self._stopping:
                    return
                batches = self._delivery.next_batches()
            try:
                progressed = self._delivery.send(batches)
            except Exception:  # as above; the batches are still in the outbox
                _log.exception("sending failed; trying again")
                progressed = False
            first, most = self._settings.retry_backoff_ms / 1000, self._settings.retry_backoff_max_ms / 1000
            backoff_s = 0.0 if progressed else min(max(first, 2 * backoff_s), most)


PublisherT = TypeVar("PublisherT", bound=BasePublisher)


def _definition(kind: Any, view: Any, labels: Any, window_s: Any, monotone: Any) -> Definition:
    """A checked definition, of plain text also when the names are members of a `StrEnum`."""
    names = (labels,) if isinstance(labels, str) else tuple(labels) if isinstance(labels, Iterable) else (None,)
    if not isinstance(view, str) or not all(isinstance(name, str) for name in names):
        raise Invalid("view and label names are text")
    if not isinstance(kind, str) or kind not in VIEW_TYPES:
        raise Invalid(f"view {view:.200}: unknown kind {kind!r:.50}; known: {', '.join(KIND_NAMES)}")
    if window_s is not None and (type(window_s) is not int or window_s < 1):
        raise Invalid(f"view {view:.200}: window_s is a whole number of seconds from 1, got {window_s!r:.50}")
    if not isinstance(monotone, bool):
        raise Invalid(f"view {view:.200}: monotone is True or False, got {monotone!r:.50}")
    definition = Definition(str.__str__(view), str.__str__(kind), tuple(map(str.__str__, names)), window_s or 0, monotone)
    check_definition(definition, KIND_NAMES)
    return definition


def _release(lock: threading.RLock) -> int:
    """Release `lock` as often as this thread holds it; how often that was."""
    count = 0
    while True:
        try:
            lock.release()
        except RuntimeError:  # not held, or no more
            return count
        count += 1


def publisher_settings(keywords: Mapping[str, Any]) -> PublisherSettings:
    """Settings from keywords; `Invalid` for a name that is none."""
    unknown = keywords.keys() - {item.name for item in fields(PublisherSettings)}
    if unknown:
        raise Invalid(f"unknown settings: {', '.join(sorted(unknown))}")
    return PublisherSettings(**keywords)
