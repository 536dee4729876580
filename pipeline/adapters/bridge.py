"""Publishes the metrics of a prometheus_client registry as deltas.

A registry holds totals, and a bridge publishes their increases since the last collection. A value counts as published only
once its delta is recorded, so that a full buffer delays an increase and loses none. A total that falls, or that has another
time of creation, was cleared, and counts from 0 again. One that is gone for a while goes on where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample
from prometheus_client.values import ValueClass

from pipeline.adapters.registry import publishers_families
from pipeline.errors import BufferFull, Invalid, PipelineError
from pipeline.left_out import LeftOut
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import Failures, PeriodicThread, guarded

_PROTOCOL = "bridge"
_FORK_TIMEOUT_S = 10.0
_JOIN_S = 5.0
_LAST_TRIES = 100
"""Most attempts, at the end, to flush and publish the increases that a full buffer delays."""
_REPORTED_MAX = 1_000
_EXAMPLES_MAX = 20
_GONE_MAX = 10_000
"""Most series of a collector that are remembered while it does not show them."""
_ADDED: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total", ""),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}
"""By type of family, the suffixes of samples that only rise."""
_OF_ALL = (
    "a MultiProcessCollector shows the totals of all processes, which every process would publish: bridge the registry that "
    "the metrics are in, in each process"
)
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


class _Published:
    """Samples of a collector, as they are published."""

    def __init__(self, collector: object) -> None:
        self.values: dict[Key, float] = {}
        self.created: dict[Key, float] = {}
        """By `_group`, the times of creation."""
        self.gone: dict[Key, None] = {}
        """Keys in `values` that the last look has not found, the oldest first."""
        own = isinstance(collector, MetricWrapperBase) and not getattr(ValueClass, "_multiprocess", False)
        self.gone_max = 0 if own else _GONE_MAX
        """Series that are remembered while the collector does not show them. A metric of prometheus_client has cleared
        them; in its multiprocess mode, and with other collectors, they can come back with their old values."""
        self.barred: set[Key] = set()
        """Keys of series that another collector has shown first."""


class _Found(NamedTuple):
    """Content of a look at a collector."""

    samples: list[_BridgedSample]
    created: dict[Key, float]
    unclear: set[Key]
    """Keys of samples that are there, and can't be published as they are now."""


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
        if _shows_all_processes(registry):
            raise Invalid(_OF_ALL)
        self._publisher = publisher
        self.registry = registry
        self._target = _Target(registry)
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
        self._published: WeakKeyDictionary[Any, _Published] = WeakKeyDictionary()
        self._start()
        if from_now:
            self._skip_present()
        self._watch_children()
        if may_run:
            self._thread.start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._closing = threading.RLock()
        self._collecting = 0
        """Identifier of the thread that collects at the moment, or 0."""
        self.left_out = LeftOut(_log, self._clock, self._metrics, _EXAMPLES_MAX)
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
                elsewhere: set[Key] = set()
                for collector in self._collectors():
                    published = self._published.setdefault(collector, _Published(collector))
                    found = self._look_at(collector, published, elsewhere)
                    if found is not None:
                        self._publish(published, found)
            except BufferFull as error:  # each further series would wait as long
                self.left_out.add(_PROTOCOL, "buffer_full", f"the bridge waits: {error}")
                return False
            finally:
                self._collecting = 0
                self.left_out.tick()
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
            self.left_out.close()

    def start_clean(self) -> None:
        """Leave everything that was counted before a fork to the parent. Called in the child, before anything else.

        Another thread takes the values, because a metric whose lock was held at the fork can never be read in the child. No
        other thread runs in the child meanwhile, so the values are those at the fork.
        """
        if self._closed:
            return
        self._cells = {}
        self._published = WeakKeyDictionary()
        self.left_out = LeftOut(
            _log, self._clock, self._metrics, _EXAMPLES_MAX
        )  # the lock of the other may be held for ever
        thread = threading.Thread(
            target=self._guarded_skip,
            name="pipeline-bridge-look",
            daemon=True,
        )
        thread.start()
        thread.join(_FORK_TIMEOUT_S)
        if thread.is_alive():
            self._closed = True
            left_out = LeftOut(_log, self._clock, self._metrics)
            left_out.add(_PROTOCOL, "fork", "a metric was in use at the fork: the child's metrics are not published")
            return
        self._start()
        self._thread.start()

    def _skip_present(self) -> None:
        """Note the present values as published."""
        for collector in self._collectors():
            published = _Published(collector)
            found = self._look_at(collector, published, set())
            if found is not None:
                published.values = {it.key: it.value for it in found.samples}
                published.created = found.created
                self._published[collector] = published

    def _collectors(self) -> list[Any]:
        """Return the collectors of the registry, so that each can fail alone, except those of publishers."""
        known = getattr(self.registry, "_collector_to_names", None)
        if known is None:
            return [self.registry]
        with self.registry._lock:  # type: ignore[attr-defined]  # as its own `collect` does
            collectors = [*known]
        own = publishers_families(self.registry)  # each collection would change them, and so cause another delta
        return [self._target, *[it for it in collectors if it not in own and not self._is_of_all(it)]]

    def _is_of_all(self, collector: Any) -> bool:
        """Return whether a collector shows what other processes count, which is left out."""
        if not isinstance(collector, MultiProcessCollector):
            return False
        self._refuse("multiprocess", "a collector", _OF_ALL)
        return True

    def _look_at(self, collector: Collector, published: _Published, elsewhere: set[Key]) -> _Found | None:
        """Return the samples of a collector; None if it fails. The keys in `elsewhere` are those of other collectors."""
        now_s = self._clock.rising_ns() / 1e9
        try:
            families = [*collector.collect()]
        except Exception as error:
            name = type(collector).__name__
            self.left_out.add(_PROTOCOL, "collector", name)
            if self._report_first("collector", name):
                _log.exception("collector %s: %s; it is left out, and tried again", name, error)
            return None
        return self._found(families, published.barred, elsewhere, now_s)

    def _found(self, families: Iterable[Metric], barred: set[Key], elsewhere: set[Key], now_s: float) -> _Found:
        """Return what can be published of these families, of a look that has begun at `now_s`."""
        samples: dict[Key, _BridgedSample] = {}
        created: dict[Key, float] = {}
        unclear: set[Key] = set()
        for family in families:
            suffixes = _ADDED.get(family.type, ())
            added = {family.name + end: family.name + (end or "_total") for end in suffixes}
            for sample in family.samples:
                key = _key(sample)
                if suffixes and sample.name == f"{family.name}_created":
                    if sample.value < now_s:  # else it is when it is asked for, which tells nothing
                        created[family.name, key[1]] = sample.value
                    continue
                rises = sample.name in added
                if rises:
                    key = added[sample.name], key[1]
                elif suffixes:
                    quantile = family.type == "summary" and sample.name == family.name
                    why = "quantiles can't be added up" if quantile else f"a {family.type} has no such sample"
                    self._refuse("quantile" if quantile else "suffix", sample.name, why)
                    continue
                elif not self._gauges:
                    continue
                if not isfinite(sample.value):
                    self._refuse("value", sample.name, f"{sample.value} is not finite")
                    unclear.add(key)
                elif key in elsewhere or key in barred:
                    barred.add(key)
                    unclear.add(key)
                    self._refuse("twice", sample.name, "another collector has the same series")
                elif key in samples and samples[key].value != sample.value:
                    unclear.add(key)
                    self._refuse("twice", sample.name, "its collector has one series twice")
                else:
                    samples[key] = _BridgedSample(key, sample.value, rises)
        elsewhere |= samples.keys() | unclear
        return _Found([it for key, it in samples.items() if key not in unclear], created, unclear)

    def _publish(self, published: _Published, found: _Found) -> None:
        """Publish every difference from what is published, and update that series by series."""
        values, created = published.values, published.created
        cleared = {
            _group(it.key)
            for it in found.samples
            if it.rises and it.value < values.get(it.key, 0) and not _is_sum(it.key)
        }  # fmt: skip
        cleared |= {group for group, at in found.created.items() if created.get(group, at) != at}
        for it in found.samples:
            if cleared and it.rises and it.key in values and _group(it.key) in cleared:
                values[it.key] = 0  # all of them first: a delayed one must not look as if it fell again
        created |= found.created
        for it in found.samples:
            if self._publish_one(values.get(it.key), it):
                values[it.key] = it.value
            published.gone.pop(it.key, None)
        if len(found.samples) < len(values):
            self._forget_gone(published, {it.key for it in found.samples} | found.unclear)

    def _forget_gone(self, published: _Published, there: set[Key]) -> None:
        """Forget series that a collector does not show any more, the oldest first, but for `gone_max` of them."""
        for key in published.values.keys() - there - published.gone.keys():
            published.gone[key] = None
            self._cells.pop(key, None)
        while len(published.gone) > published.gone_max:
            key = next(iter(published.gone))
            del published.gone[key], published.values[key]
            published.created.pop(_group(key), None)

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
            self.left_out.add(_PROTOCOL, reason, f"{name} is not published: {why}")

    def _report_first(self, reason: str, name: str) -> bool:
        if (reason, name) in self._reported or len(self._reported) >= _REPORTED_MAX:
            return False
        self._reported.add((reason, name))
        return True


class _Target:
    """A collector of the `target_info` of a registry, which none of its collectors shows."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Return the family, if there is one."""
        labels = self._registry.get_target_info()
        if not labels:
            return []
        family = Metric("target", "Target metadata", "info")
        family.add_sample("target_info", labels, 1)
        return [family]


def _shows_all_processes(registry: Any) -> bool:
    """Return whether a registry, or one within it, has a collector of the files that several processes write."""
    if isinstance(registry, MultiProcessCollector):
        return True
    collectors = [*getattr(registry, "_collector_to_names", ())]
    within = getattr(registry, "_registry", None)
    return any(map(_shows_all_processes, [*collectors, *[within] * (within is not None)]))


def default_registry() -> Collector:
    """Return the default registry of prometheus_client."""
    return REGISTRY


def _key(sample: Sample) -> Key:
    return sample.name, tuple(sorted(sample.labels.items()))


def _is_sum(key: Key) -> bool:
    """Return whether a total can fall without having been cleared: a sum does by negative observations."""
    return key[0].endswith("_sum")


def _group(key: Key) -> Key:
    """Return the key that total, buckets, sum and count of one series share: they are created and cleared together."""
    name, labels = key
    for suffix in ("_total", "_bucket", "_sum", "_count"):
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return name, tuple([label for label in labels if label[0] != "le"])


def _plain(value: Any) -> int | float:
    return int(value) if isinstance(value, float) and value.is_integer() else value
