"""The publisher, as an app has it: views to record to, `flush`, `close`. What does the work is in `running`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
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
from pipeline.producer.batch import record_columns
from pipeline.producer.buffer import View
from pipeline.producer.running import Running
from pipeline.producer.snapshot import LocalView
from pipeline.producer.views import VIEW_TYPES, LastView, ObserveView, SumView
from pipeline.settings import PublisherSettings

_log = logging.getLogger(__name__)
_VIEWS_MAX = 10_000
_SWEEPS = 3

ViewT = TypeVar("ViewT", bound=View)


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
        for reason in ("buffer_full", "closed", "no_number", "rejected"):
            metrics.inc(m.PUBLISHER_DROPPED, 0, reason)  # so that an alert sees the first one as a rise
        metrics.set(m.PUBLISHER_BUFFER_MAX, settings.buffer_bytes_max)
        if settings.spool_dir:
            metrics.set(m.PUBLISHER_SPOOL_MAX, settings.spool_bytes_max)
        self._views: dict[str, View] = {}
        self._closed = False
        self._inherited = False
        self._start()
        if self._running.own is not None:
            self._running.own.get()  # so that a folder that can't be used is an error here
            self._running.start_threads()
        process.join(self)

    def _start(self, parent: Running | None = None) -> None:
        self._closing_lock = threading.RLock()
        self._closing = self._closed
        self._used = False
        self._running = Running(
            self._writer, self._clock, self._settings, self._metrics, self._views, self._on_register, parent
        )

    def start_clean(self) -> None:
        """What a forked child does first: what is buffered is its parent's to send."""
        self._inherited = True
        self._start(self._running)
        for view in [*self._views.values()]:
            view.forget(self._running.owner)
        if self._running.inherits_handles:
            self._on_register()

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
            new = VIEW_TYPES[definition.kind](definition, self._running.owner)
            known = self._views.setdefault(definition.view, new)
        if known.declared != definition:
            raise Invalid(f"view {definition.view} is {describe(known.declared)} here; not {describe(definition)}")
        return known  # type: ignore[return-value]

    def local(self) -> dict[str, LocalView]:
        """What this process has recorded since it started, by view: see `view.local()`."""
        return {name: view.local() for name, view in [*self._views.items()]}

    def record_batch(self, view: View, columns: Any) -> int:
        """Record rows at once: one column for each label name, `value`, and for last views `ts_ms`, in `columns`.

        `columns` is a mapping, or an Arrow table or record batch. A column is a sequence, a NumPy array, or an Arrow array;
        a single value stands for every row. Without `ts_ms` rows are set as of now, and the last row of a series counts.

        All or nothing: `Invalid` names the column and the row, and like `BufferFull` it means that nothing was recorded.
        Returns how many rows were recorded: 0 if `on_full` has them dropped.
        """
        if not isinstance(view, View):
            raise Invalid(f"a view of this publisher is needed, got {type(view).__name__}")
        if self._views.get(view.definition.view) is not view:
            raise Invalid(f"view {view.definition.view} is not of this publisher")
        return record_columns(view, columns)

    # Flushing and closing

    def flush(self, timeout_s: float = 10.0) -> Token:
        """Wait until everything recorded before the call is acknowledged; the token lets a read wait for it.

        Raises `Unavailable` after `timeout_s`; the deltas stay buffered and are sent all the same. Raises `Invalid` if
        batches were rejected for good since the last flush, or what threads' own handles took turned out to be no
        number: that is gone, and counted.
        """
        if self._closed:
            raise Invalid("this publisher is closed")
        return self._flush(timeout_s)

    def _flush(self, timeout_s: float) -> Token:
        if self._running.in_own_thread:
            raise Invalid("the publisher's own threads can't wait for it")  # a finaliser or log handler was run by one
        if self._running.is_held:
            raise Unavailable("this has interrupted its own thread while it was recording, for which the others wait")
        return self._running.flush(timeout_s) if self._used else self._running.delivery.token

    def close(self, timeout_s: float | None = None) -> Token:
        """Flush, then let go of threads and connections; from then on recording raises `Invalid`. Twice is fine.

        Raises as `flush` does, after letting go: what was not acknowledged until then is lost, and counted, unless it
        waits in a spool. In a signal handler that has interrupted a write to the spool, another thread closes it.
        """
        if self._running.in_own_thread or self._running.is_held:  # a finaliser, run there by chance, or a signal handler
            threading.Thread(target=self.close, args=(timeout_s,), name="pipeline-closer", daemon=True).start()
            return self._running.delivery.token
        with self._running.locks_released(), self._closing_lock:  # a second thread waits for the first
            if self._closed:
                return self._running.delivery.token
            return self._close(self._settings.close_timeout_ms / 1000 if timeout_s is None else timeout_s)

    def _close(self, timeout_s: float) -> Token:
        self._closing = True
        self._running.buffering.close()
        for view in [*self._views.values()]:
            view.shut()
        try:
            token = self._flush(timeout_s)
            for _ in range(_SWEEPS):  # what threads were in the midst of recording when it was shut
                if not self._running.waiting_count():
                    break
                token = self._flush(timeout_s)
            return token
        except Unavailable:
            if self._closed:  # by a signal handler, in the midst of this
                return self._running.delivery.token
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._closed:
            return
        self._closed = True
        process.leave(self)
        if lost := self._running.stop():
            self._metrics.inc(m.PUBLISHER_DROPPED, lost, "closed")
        if self._used or not self._inherited:  # connections that only the parent has used are the parent's to close
            self._writer.close()

    def stats(self) -> dict[str, int]:
        """Deltas drained; batches and entries acknowledged; batches rejected, waiting; bytes of the memory account."""
        return self._running.stats()

    def _on_register(self) -> None:
        if self._closing:
            raise Invalid("this publisher is closed")
        if not self._used:
            self._used = True
            process.drain_when_child_ends()
        self._running.start_threads()


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


def publisher_settings(keywords: Mapping[str, Any]) -> PublisherSettings:
    """Settings from keywords; `Invalid` for a name that is none."""
    unknown = keywords.keys() - {item.name for item in fields(PublisherSettings)}
    if unknown:
        raise Invalid(f"unknown settings: {', '.join(sorted(unknown))}")
    return PublisherSettings(**keywords)
