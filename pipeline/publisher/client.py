"""The publisher, as an app has it: views to record to, `flush`, `close`. The threads behind it are in `runtime`."""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import pipeline.metrics as m
import pipeline.publisher.fork as fork
from pipeline import native
from pipeline.core.kinds import KIND_NAMES
from pipeline.core.kinds.base import value_bytes
from pipeline.core.query import describe
from pipeline.core.record import Definition, canonical, check_definition, spread_of
from pipeline.core.token import Token
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, LogWriter, Resting
from pipeline.publisher.async_flush import AsyncFlushes
from pipeline.publisher.environment import closest
from pipeline.publisher.flusher import table_bytes
from pipeline.publisher.local import LocalView
from pipeline.publisher.runtime import Runtime
from pipeline.publisher.view import check_value
from pipeline.publisher.views import (
    VIEW_TYPES,
    BaseView,
    DistinctView,
    HistogramView,
    LastView,
    ObservedView,
    SumView,
    Table,
    TopKView,
    record_table,
)
from pipeline.settings import PublisherKeywords, PublisherSettings
from pipeline.threads import are_green, guarded, in_hub

if TYPE_CHECKING:
    from pipeline.publisher.spool.publisher import PublisherSpool
    from pipeline.publisher.spool.ring import Segment

_log = logging.getLogger(__name__)
_VIEWS_MAX = 10_000
_SWEEPS = 3
"""Number of flushes that a close repeats for deltas that other threads were just recording."""
_BATCH_MARGIN = 900
"""The most bytes that a batch of one series takes beyond its value, unless its labels are very long."""

ViewT = TypeVar("ViewT", bound=BaseView)


class ViewKeywords(TypedDict, total=False):
    """Options of every view; see `BasePublisher.sum`."""

    labels: Sequence[str]
    window_s: int | None
    retention_s: int | None
    spread: int | None


class BasePublisher:
    """A publisher on any `LogWriter`; `pipeline.Publisher` makes one from a URL. Safe from any thread.

    Recording, flushing and closing are also safe in signal handlers and finalisers. A forked child starts clean: views and
    series of its parent work there, and record for a producer of its own.
    """

    def __init__(self, writer: LogWriter, clock: Clock, settings: PublisherSettings, metrics: Metrics = NO_METRICS) -> None:
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        for reason in ("buffer_full", "closed", "rejected"):
            metrics.inc(m.PUBLISHER_DROPPED, 0, reason)  # so that an alert sees the first one as a rise
        metrics.set(m.PUBLISHER_BUFFER_MAX, settings.buffer_bytes_max)
        if settings.spool_dir:
            metrics.set(m.PUBLISHER_SPOOL_MAX, settings.spool_bytes_max)
        self._views: dict[str, Any] = {}
        self._table = Table(
            bytes_max=table_bytes(settings),
            check=self._check,
            opening=self._opening,
            full=self._full,
            now_ms=clock.now_ms,
            now_ns=getattr(clock, "now_ns", None),
            ts_ahead_max_ms=settings.ts_ahead_max_ms,
            local_series_max=settings.local_series_max,
            journal=_Journal(self) if settings.durability != "memory" else None,
        )
        self._closed = False
        self._inherited = False
        self._start()
        fork.join(self)
        if self._runtime.spool is not None:
            self._runtime.spool.open()  # so that a folder that can't be used is an error here
            if not fork.is_prefork():
                self._runtime.start_threads()

    def _start(self, parent: Runtime | None = None) -> None:
        self._closing_lock = threading.RLock()
        self._closing = self._closed
        self._used = False
        self._green = are_green()
        self._async_flushes = AsyncFlushes(self._flush_awake, self._clock)
        self._runtime = Runtime(self._writer, self._clock, self._settings, self._metrics, self._views, parent, self._table)

    def start_clean(self) -> None:
        """Begin anew in a forked child: what is buffered is its parent's to send."""
        self._inherited = True
        self._start(self._runtime)
        self._table.forget()

    @property
    def notices_forks(self) -> bool:
        """True if every series is new to the table in a forked child, so that its first delta comes to `check_fork`."""
        return native.in_use()

    def keep(self) -> bool:
        """Go on with what the parent recorded and gives away; return False if `start_clean` must be called instead."""
        if self._runtime.spool is not None or not self._runtime.rests() or not self._table.keep():
            return False  # what is in a spool is sent by whoever finds it
        self.wake()
        return True

    def wake(self) -> None:
        """Have threads run, if there is something to do for them: uWSGI has forked."""
        if self._used or self._runtime.spool is not None:
            self._runtime.start_threads()

    def _rest(self) -> bool:
        """End all threads for now, because uWSGI is about to fork; return whether they have ended."""
        return self._runtime.rest() and (not isinstance(self._writer, Resting) or self._writer.rest())

    def hold(self) -> None:
        """Keep the table as it is until `release`: the process is about to fork."""
        self._table.hold()

    def release(self) -> None:
        """Undo `hold`, in the parent."""
        self._table.release()

    def _check(self, kind: str, monotone: bool, value: object) -> Any:
        """Return the plain value of a delta; `Invalid` if it is none, or too large for any batch that the log takes."""
        plain = check_value(kind, monotone, value)
        size = value_bytes(plain)
        if size and size + _BATCH_MARGIN > (most := self._runtime.account.message_bytes_max):
            raise Invalid(f"a value of {size} bytes; the log takes batches of up to {most} only")
        return plain

    def _full(self, size: int, count: int) -> bool:
        return self._runtime.full(size, count)  # a forked child has another one

    def _opening(self) -> None:
        """Prepare for a new series: raise `Invalid` if the publisher is closed, and see to it that the threads run."""
        fork.check_fork()
        if self._closing:
            raise Invalid("this publisher is closed")
        if not self._used:
            if self._green != are_green():  # patched since, as gunicorn's gevent workers are after the fork: other locks
                self.start_clean()
            self._used = True
            fork.drain_when_child_ends()
        if not fork.is_prefork():
            self._runtime.start_threads()
        self._runtime.account.add_series()

    def _local(self, view: Any) -> LocalView:
        fork.check_fork()
        taken_s = self._runtime.flusher.taken_s  # first: states that are newer than it says are no lie
        states = self._table.local(view)
        now_s = self._clock.monotonic_s
        return LocalView(view.definition, canonical(view.definition), states, taken_s, now_s, complete=states.complete)

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

    # All kinds have the same keywords: `window_s`, the length of windows in seconds (None or 0: there are none);
    # `retention_s`, the seconds for which a window is kept after its end, or a series without windows after its last delta
    # (None or 0: for ever); and `spread`, the number of partitions over which each series is spread (None: the setting), so
    # that a series that many processes record to does not have to be folded by one worker. Answers are the same.

    def sum(
        self,
        view: str,
        *,
        labels: Sequence[str] = (),
        window_s: int | None = None,
        retention_s: int | None = None,
        spread: int | None = None,
        monotone: bool = False,
    ) -> SumView:
        """Return the view of this name: the total of what is added. `labels` are its label names, in the order of keys.

        A `monotone` view takes no negative number, so it never falls: Prometheus sees it as a counter. With `window_s` there
        is one total for each window of so many seconds, which is kept for `retention_s` after its end; without `retention_s`
        it is kept for ever. With `spread` the deltas of a series take turns among so many partitions.
        """
        return self._view(SumView, "sum", view, labels, window_s, retention_s, spread, monotone)

    def min(self, view: str, **options: Unpack[ViewKeywords]) -> ObservedView:
        """Return the view of this name: the smallest observation. Options are as in `sum`."""
        return self._view(ObservedView, "min", view, **options)

    def max(self, view: str, **options: Unpack[ViewKeywords]) -> ObservedView:
        """Return the view of this name: the largest observation. Options are as in `sum`."""
        return self._view(ObservedView, "max", view, **options)

    def mean(self, view: str, **options: Unpack[ViewKeywords]) -> ObservedView:
        """Return the view of this name: the mean of all observations. Options are as in `sum`."""
        return self._view(ObservedView, "mean", view, **options)

    def last(self, view: str, **options: Unpack[ViewKeywords]) -> LastView:
        """Return the view of this name: the newest value that was set. Options are as in `sum`."""
        return self._view(LastView, "last", view, **options)

    def histogram(self, view: str, **options: Unpack[ViewKeywords]) -> HistogramView:
        """Return the view of this name: the distribution of all observations, of which reads can ask any quantile.

        Options are as in `sum`.
        """
        return self._view(HistogramView, "histogram", view, **options)

    def distinct(self, view: str, **options: Unpack[ViewKeywords]) -> DistinctView:
        """Return the view of this name: how many different items were observed, exact or estimated with bounds.

        Options are as in `sum`.
        """
        return self._view(DistinctView, "distinct", view, **options)

    def topk(self, view: str, **options: Unpack[ViewKeywords]) -> TopKView:
        """Return the view of this name: the items that were added most often, with bounds of their counts.

        Options are as in `sum`.
        """
        return self._view(TopKView, "topk", view, **options)

    def view(
        self,
        kind: str,
        view: str,
        *,
        labels: Sequence[str] = (),
        window_s: int | None = None,
        retention_s: int | None = None,
        spread: int | None = None,
        monotone: bool = False,
    ) -> BaseView:
        """Return the view of this name and of a kind that is only known at run time."""
        return self._view(BaseView, kind, view, labels, window_s, retention_s, spread, monotone)

    def define(self, definition: Definition, spread: int | None = None) -> BaseView:
        """Return the view of a definition that is only known at run time; see `view`."""
        return self.view(
            definition.kind,
            definition.view,
            labels=definition.labels,
            window_s=definition.window_s,
            retention_s=definition.retention_s,
            spread=spread,
            monotone=definition.monotone,
        )

    def _view(
        self,
        _: type[ViewT],
        kind: str,
        view: str,
        labels: Sequence[str] = (),
        window_s: int | None = None,
        retention_s: int | None = None,
        spread: int | None = None,
        monotone: bool = False,
    ) -> ViewT:
        fork.check_fork()
        if self._closing:
            raise Invalid("this publisher is closed")
        definition = _definition(kind, view, labels, window_s, retention_s, monotone)
        known: Any = self._views.get(definition.view)
        wanted = spread_of(definition, spread, self._settings.spread)
        if known is None:
            if len(self._views) >= _VIEWS_MAX:
                raise Invalid(f"over {_VIEWS_MAX} views")
            known = self._views.setdefault(definition.view, self._new_view(definition, wanted))
        if known.definition != definition:
            raise Invalid(f"view {definition.view} is {describe(known.definition)} here; not {describe(definition)}")
        if spread is not None and known.spread != wanted:
            raise Invalid(f"view {definition.view} is spread over {known.spread} partitions here; not {wanted}")
        found: ViewT = known
        return found

    def _new_view(self, definition: Definition, spread: int) -> Any:
        view = self._table.define(definition, self._settings.series_max, VIEW_TYPES[definition.kind], spread)
        view.read_local, view.monotonic_s = self._local, self._clock.monotonic_s
        return view

    def local(self) -> dict[str, LocalView]:
        """Return what this process has recorded since it started, by view: see `view.local()`."""
        return {name: view.local() for name, view in [*self._views.items()]}

    def record_batch(self, view: BaseView, columns: Any, *, ignore: Iterable[str] = ()) -> int:
        """Record rows at once: one column for each label name, `value`, and `ts_ms` if rows have times, in `columns`.

        Rows of last views and of views with windows can have times: ms since 1970, or dates with an offset from UTC.

        `columns` is a mapping, a data frame of pandas or Polars, or an Arrow table or record batch. A column is a sequence,
        a NumPy array, or one of those libraries; a single value stands for every row. Columns that the view does not know
        are refused, because a name may be misspelled, but for those that `ignore` names. Without `ts_ms` rows are of
        now, and in a last view the last row of a series counts.

        All rows are checked first: `Invalid` names the column and the row, of missing values too, and means that nothing was
        recorded. `BufferFull` says how many were. Returns how many rows were recorded: fewer if `on_full` has them dropped.
        """
        if not isinstance(view, BaseView):
            raise Invalid(f"a view of this publisher is needed, got {type(view).__name__}")
        if self._views.get(view.definition.view) is not view:
            raise Invalid(f"view {view.definition.view} is not of this publisher")
        return record_table(view, columns, ignore)

    # Flushing and closing

    def flush(self, timeout_s: float = 10.0) -> Token:
        """Wait until everything recorded before the call is acknowledged; the token lets a read wait for it.

        Raises `Unavailable` after `timeout_s`; the deltas stay buffered and are sent all the same. Raises `Invalid` if
        batches were rejected for good since the last flush: what was in them is gone, and counted.
        """
        fork.check_fork()
        if self._closed:
            raise Invalid("this publisher is closed")
        return self._flush(timeout_s)

    def _flush(self, timeout_s: float) -> Token:
        if self._runtime.in_own_thread:
            raise Invalid("the publisher's own threads can't wait for it")  # a finaliser or log handler was run by one
        if self._runtime.is_held:
            raise Unavailable("this has interrupted its own thread while it was recording, for which the others wait")
        if in_hub():
            raise Unavailable("a callback or signal handler in the hub of green threads can't wait for them")
        if not self._used:
            return self._runtime.sender.token
        token = self._flush_awake(timeout_s)
        self._async_flushes.raise_missed()
        return token

    def _flush_awake(self, timeout_s: float) -> Token:
        with fork.awake(self._rest):
            return self._runtime.flush(timeout_s)

    async def flush_async(self, timeout_s: float = 10.0) -> Token:
        """Do as `flush` does, for a coroutine: the event loop goes on meanwhile.

        A task that is cancelled here stops waiting at once; what it has recorded is sent all the same, and an error that
        nobody has seen is raised by the next flush. Recording needs no such method: `add` waits for no network, and for
        memory only if `on_full` says so.
        """
        fork.check_fork()
        if self._closed:
            raise Invalid("this publisher is closed")
        if not self._used:
            return self._runtime.sender.token
        runtime = self._runtime
        return await self._async_flushes.flush(timeout_s, lambda: runtime.late(f"not acknowledged within {timeout_s} s"))

    def close(self, timeout_s: float | None = None) -> Token:
        """Flush, then end threads and connections; from then on recording raises `Invalid`. Closing twice is fine.

        Raises as `flush` does, at the end: what was not acknowledged until then is lost, and counted, unless it waits in a
        spool. In a signal handler that has interrupted a write to the spool, another thread closes it.
        """
        fork.check_fork()
        running = self._runtime
        if running.in_own_thread or running.is_held or in_hub():  # a finaliser, run there by chance, or a signal handler
            _thread.start_new_thread(guarded(_log, "pipeline-closer", self.close), (timeout_s,))  # `Thread.start` would wait
            return running.sender.token
        with running.locks_released(), self._closing_lock:  # a second thread waits for the first
            if self._closed:
                return self._runtime.sender.token
            return self._close(self._settings.close_timeout_ms / 1000 if timeout_s is None else timeout_s)

    def _close(self, timeout_s: float) -> Token:
        self._closing = True
        self._table.close()
        end_s = self._clock.monotonic_s() + timeout_s
        try:
            token = self._flush(timeout_s)
            for _ in range(_SWEEPS):  # for deltas that threads were just recording when the table was closed
                if not self._table.waiting_count:
                    break
                token = self._flush(timeout_s)
            self._runtime.say_closed(timeout_s)
            self._runtime.wait_for_rescue(end_s - self._clock.monotonic_s())
            return token
        except Unavailable:
            if self._closed:  # by a signal handler, in the midst of this
                return self._runtime.sender.token
            raise
        finally:
            self._release()

    def _release(self) -> None:
        if self._closed:
            return
        self._closed = True
        fork.leave(self)
        if lost := self._runtime.stop():
            self._metrics.inc(m.PUBLISHER_DROPPED, lost, "closed")
        if self._used or not self._inherited:  # connections that only the parent has used are the parent's to close
            self._writer.close()

    def stats(self) -> dict[str, int]:
        """Return counts: deltas drained, batches and entries acknowledged, batches rejected, waiting, series and bytes."""
        fork.check_fork()
        return self._runtime.stats()


class _Journal:
    """The journal of a publisher's table: the spool of the process that runs now."""

    def __init__(self, publisher: BasePublisher) -> None:
        self._publisher = publisher

    def _spool(self) -> PublisherSpool:
        spool = self._publisher._runtime.spool
        assert spool is not None, "a durability beyond memory needs a spool"
        return spool

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        return self._spool().define(definition, suffix)

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        return self._spool().segment(shard, full, length)


PublisherT = TypeVar("PublisherT", bound=BasePublisher)


def _definition(kind: Any, view: Any, labels: Any, window_s: Any, retention_s: Any, monotone: Any) -> Definition:
    """Return a checked definition. Its names are plain text, even if they were given as members of a `StrEnum`."""
    names = (labels,) if isinstance(labels, str) else tuple(labels) if isinstance(labels, Iterable) else (None,)
    if not isinstance(view, str) or not all(isinstance(name, str) for name in names):
        raise Invalid("view and label names are text")
    if not isinstance(kind, str) or kind not in VIEW_TYPES:
        raise Invalid(f"view {view:.200}: unknown kind {kind!r:.50}; known: {', '.join(KIND_NAMES)}")
    for name, seconds in (("window_s", window_s), ("retention_s", retention_s)):
        if seconds is not None and (type(seconds) is not int or seconds < 0):
            raise Invalid(f"view {view:.200}: {name} is a whole number of seconds (0: none), got {seconds!r:.50}")
    if not isinstance(monotone, bool):
        raise Invalid(f"view {view:.200}: monotone is True or False, got {monotone!r:.50}")
    plain_names = tuple(map(str.__str__, names))
    definition = Definition(str.__str__(view), str.__str__(kind), plain_names, window_s or 0, monotone, retention_s or 0)
    check_definition(definition, KIND_NAMES)
    return definition


def publisher_settings(keywords: Mapping[str, Any]) -> PublisherSettings:
    """Return the settings that keywords name, or raise `Invalid` for an unknown name."""
    known = PublisherKeywords.__annotations__.keys()
    if unknown := sorted(keywords.keys() - {item.name for item in fields(PublisherSettings)}):
        raise Invalid(f"unknown settings: {', '.join(unknown)}{closest(unknown[0], known)}")
    return PublisherSettings(**keywords)
