"""Publishes the metrics of a prometheus_client registry as deltas.

A registry holds totals, and a bridge publishes their increases since the last collection. A value counts as published only
once its delta is recorded, so that a full buffer delays an increase and loses none. A total that falls was cleared, and
counts from 0 again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, Metric
from prometheus_client.samples import Sample

import pipeline.metrics as m
from pipeline.adapters.registry import publishers_families
from pipeline.errors import BufferFull, Invalid, PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import Failures, PeriodicThread, guarded

_PROTOCOL = "bridge"
_FORK_TIMEOUT_S = 10.0
_JOIN_S = 5.0
_LAST_TRIES = 100
"""Most attempts, at the end, to flush and publish the increases that a full buffer delays."""
_REPORTED_MAX = 1_000
_ADDED: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}
"""By type of family, the suffixes of samples that only rise."""
_log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]


class Collector(Protocol):
    """A registry, or one of its collectors."""

    def collect(self) -> Iterable[Metric]: ...


class BridgeTarget(Protocol):
    """The methods of a publisher that a bridge calls."""

    def sum(self, view: str, *, labels: tuple[str, ...], monotone: bool) -> Any: ...

    def last(self, view: str, *, labels: tuple[str, ...]) -> Any: ...

    def flush(self, timeout_s: float) -> Any: ...


class _BridgedSample(NamedTuple):
    """A sample to publish."""

    key: Key
    value: float
    rises: bool
    """True for a total, whose increase is published; False for a value that is published as it is."""


class Bridge:
    """Publishes a registry every `interval_ms` from a thread of its own. Get it from `Publisher.bridge`.

    An exception in one collector is logged and counted; the other collectors are published all the same.
    """

    def __init__(
        self,
        publisher: BridgeTarget,
        registry: Collector,
        *,
        clock: Clock,
        interval_ms: int,
        gauges: bool = True,
        from_now: bool = False,
        metrics: Metrics = NO_METRICS,
        drain_when_child_ends: Callable[[], None] = lambda: None,
        may_run: bool = True,
    ) -> None:
        """Start publishing; with `may_run` False not before `wake` is called."""
        if type(interval_ms) is not int or interval_ms < 1:
            raise Invalid(f"interval_ms is a whole number from 1, got {interval_ms!r:.50}")
        if not callable(getattr(registry, "collect", None)):
            raise Invalid(f"a registry of prometheus_client is needed, got {type(registry).__name__}")
        self._publisher = publisher
        self.registry = registry
        self._clock = clock
        self._interval_s = interval_ms / 1000
        self._gauges = gauges
        self._metrics = metrics
        self._drain_when_child_ends = drain_when_child_ends
        # Made once, and not in a forked child: they touch metrics, whose locks may be held there for ever.
        self._failures = Failures(_log, "pipeline-bridge", metrics)
        self._guarded_skip = guarded(_log, "pipeline-bridge-look", self._skip_present, metrics)
        self._closed = False
        self._cells: dict[Key, Any] = {}
        self._reported: set[tuple[str, str]] = set()
        self._values: WeakKeyDictionary[Any, dict[Key, float]] = WeakKeyDictionary()
        """By collector, the published values of its samples."""
        if from_now:
            self._skip_present()
        self._watch_children()
        self._start()
        if may_run:
            self._thread.start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._closing = threading.RLock()
        self._collecting = 0
        """Identifier of the thread that collects at the moment, or 0."""
        self._thread = PeriodicThread(
            "pipeline-bridge",
            self.collect,
            log=_log,
            clock=self._clock,
            metrics=self._metrics,
            interval_s=self._interval_s,
            waits_first=True,
            outage_message="the bridge waits",
            failures=self._failures,
        )

    def wake(self) -> None:
        """Start the thread if it does not run."""
        if not self._closed and not self._thread.started:
            self._thread.start()

    def _watch_children(self) -> None:
        """Register the drain at the end of the process, and again in each child of `multiprocessing`, which ends without
        `atexit`.
        """
        from multiprocessing import util

        self._drain_when_child_ends()
        util.register_after_fork(self, lambda bridge: bridge._drain_when_child_ends())

    def collect(self) -> bool:
        """Publish the increases since the last call; return False if some wait because the buffer is full.

        Safe from any thread. A call from within another one of the same thread returns at once.
        """
        me = threading.get_ident()
        if self._collecting == me:  # a signal handler or a collector came here from within
            return True
        with self._lock:
            self._collecting = me
            try:
                for collector in self._collectors():
                    families = self._families(collector)
                    if families is not None:
                        self._publish(self._values.setdefault(collector, {}), families)
            except BufferFull as error:  # each further series would wait as long
                self._metrics.inc(m.INGEST_MALFORMED, 1, _PROTOCOL, "buffer_full")
                if self._report_first("buffer_full", ""):
                    _log.warning("the bridge waits: %s", error)
                return False
            finally:
                self._collecting = 0
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Publish everything for the last time, and wait for room in the buffer for so long at most. Idempotent."""
        with self._closing:  # a second thread waits for the first; both locks can be taken again, by a signal handler
            if self._closed:
                return
            end_s = self._clock.monotonic_s() + timeout_s
            self._thread.stop(_JOIN_S)
            for _ in range(_LAST_TRIES):
                if self.collect():
                    break
                try:
                    self._publisher.flush(max(0.0, end_s - self._clock.monotonic_s()))
                except PipelineError as error:
                    _log.error("the bridge's rest is lost: %s", error)
                    break
            self._closed = True

    def start_clean(self) -> None:
        """Leave everything that was counted before a fork to the parent. Called in the child, before anything else.

        Another thread takes the values, because a metric whose lock was held at the fork can never be read in the child. No
        other thread runs in the child meanwhile, so the values are those at the fork.
        """
        if self._closed:
            return
        self._cells = {}
        self._values = WeakKeyDictionary()
        thread = threading.Thread(
            target=self._guarded_skip,
            name="pipeline-bridge-look",
            daemon=True,
        )
        thread.start()
        thread.join(_FORK_TIMEOUT_S)
        if thread.is_alive():
            self._closed = True
            self._metrics.inc(m.INGEST_MALFORMED, 1, _PROTOCOL, "fork")
            _log.error("a metric was in use when this process was forked: the child's metrics are not published")
            return
        self._start()
        self._thread.start()

    def _skip_present(self) -> None:
        """Note the present values as published."""
        for collector in self._collectors():
            families = self._families(collector)
            if families is not None:
                self._values[collector] = {it.key: it.value for it in self._found(families)}

    def _collectors(self) -> list[Any]:
        """Return the collectors of the registry, so that each can fail alone, except those of publishers."""
        known = getattr(self.registry, "_collector_to_names", None)
        if known is None:
            return [self.registry]
        with self.registry._lock:  # type: ignore[attr-defined]  # as its own `collect` does
            collectors = [*known]
        own = publishers_families(self.registry)  # each collection would change them, and so cause another delta
        return [it for it in collectors if it not in own]

    def _families(self, collector: Collector) -> list[Metric] | None:
        try:
            return [*collector.collect()]
        except Exception as error:
            name = type(collector).__name__
            self._metrics.inc(m.INGEST_MALFORMED, 1, _PROTOCOL, "collector")
            if self._report_first("collector", name):
                _log.exception("collector %s: %s; it is left out, and tried again", name, error)
            return None

    def _found(self, families: Iterable[Metric]) -> Iterator[_BridgedSample]:
        for family in families:
            added = tuple([family.name + end for end in _ADDED.get(family.type, ())])
            for sample in family.samples:
                rises = sample.name in added
                if not rises and (added or not self._gauges):
                    continue  # when it was created, or a quantile, which can't be added up
                if isfinite(sample.value):
                    yield _BridgedSample(_key(sample), sample.value, rises)
                else:
                    self._refuse("value", sample.name, f"{sample.value} is not finite")

    def _publish(self, values: dict[Key, float], families: list[Metric]) -> None:
        """Publish every difference from `values`, and update `values` series by series."""
        found = [*self._found(families)]
        cleared = {_group(it.key) for it in found if it.rises and it.value < values.get(it.key, 0) and not _is_sum(it.key)}
        for it in found:
            if cleared and it.rises and it.key in values and _group(it.key) in cleared:
                values[it.key] = 0  # all of them first: a delayed one must not look as if it fell again
        for it in found:
            if self._publish_one(values.get(it.key), it):
                values[it.key] = it.value
        if len(found) < len(values):  # a series that comes back begins at 0
            for key in values.keys() - {it.key for it in found}:
                del values[key]
                self._cells.pop(key, None)

    def _publish_one(self, before: float | None, it: _BridgedSample) -> bool:
        """Publish one sample; return whether its present value is published now. Raises `BufferFull`."""
        if before == it.value:
            return True
        if it.rises and it.value < (before or 0):
            self._refuse("negative", it.key[0], "it falls: negative observations have no place in a monotone sum")
            return False
        try:
            if it.rises:
                self._cell(it).add(_plain(it.value) - _plain(before or 0))  # exact if both are whole
            else:
                self._cell(it).set(_plain(it.value))
        except BufferFull:
            raise
        except PipelineError as error:
            self._refuse("view", it.key[0], error)
            return False
        return True

    def _cell(self, it: _BridgedSample) -> Any:
        cell = self._cells.get(it.key)
        if cell is None:
            name, labels = it.key
            names = tuple([label for label, _ in labels])
            make = (
                self._publisher.sum(name, labels=names, monotone=True)
                if it.rises
                else self._publisher.last(name, labels=names)
            )
            cell = self._cells[it.key] = make.labels(*[value for _, value in labels])
        return cell

    def _refuse(self, reason: str, name: str, why: object) -> None:
        """Leave a series out; log and count that once for each name."""
        if self._report_first(reason, name):
            self._metrics.inc(m.INGEST_MALFORMED, 1, _PROTOCOL, reason)
            _log.warning("%s is not published: %s", name, why)

    def _report_first(self, reason: str, name: str) -> bool:
        if (reason, name) in self._reported or len(self._reported) >= _REPORTED_MAX:
            return False
        self._reported.add((reason, name))
        return True


def default_registry() -> Collector:
    """Return the default registry of prometheus_client."""
    return REGISTRY


def _key(sample: Sample) -> Key:
    return sample.name, tuple(sorted(sample.labels.items()))


def _is_sum(key: Key) -> bool:
    """Return whether a total can fall without having been cleared: a sum does by negative observations."""
    return key[0].endswith("_sum")


def _group(key: Key) -> Key:
    """Return the key that buckets, sum and count of one series share: they are cleared together."""
    name, labels = key
    name = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
    return name, tuple([label for label in labels if label[0] != "le"])


def _plain(value: Any) -> int | float:
    return int(value) if isinstance(value, float) and value.is_integer() else value
