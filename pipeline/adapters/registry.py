"""Metrics of publishers in a registry of the app that they are part of.

All publishers of a registry share its families. The label `publisher` tells them apart: it is a number from 0 on, which is
free again once its publisher is closed, so that label values stay few however many publishers come and go. The families are
prometheus_client's own, so they are in the files of its multiprocess mode, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pipeline.errors import Invalid
from pipeline.metrics import OF_PUBLISHERS, Metric
from pipeline.threads import fork_gate

Registry = CollectorRegistry
_LABEL = "publisher"
_known: WeakKeyDictionary[Any, _Families] = WeakKeyDictionary()


class _Families:
    """Families of one registry."""

    def __init__(self, registry: Registry) -> None:
        self.by_metric: dict[Metric, Any] = {}
        self.taken: set[int] = set()
        """Numbers of the open publishers."""
        try:
            for metric in OF_PUBLISHERS:
                self.by_metric[metric] = _family(metric, registry)
        except ValueError as error:  # a metric of this name is there
            for family in self.by_metric.values():
                registry.unregister(family)
            raise Invalid(f"registry: {error}") from None


class RegistryMetrics:
    """`metrics.Metrics` of one publisher, in a shared registry. Safe from any thread, and from forks."""

    def __init__(self, registry: Registry) -> None:
        if not isinstance(registry, Registry):
            raise Invalid(f"registry: one of prometheus_client is needed, got {type(registry).__name__}")
        self._bound: dict[tuple[object, ...], Any] = {}
        self._changes: deque[Callable[[], object]] = deque()
        self._toucher = 0
        """Identifier of the thread that makes changes at the moment, or 0."""
        self._closed = False
        with fork_gate:
            families = _known.get(registry)
            if families is None:
                families = _known[registry] = _Families(registry)
            self._families = families
            self._number = next(number for number in range(len(families.taken) + 1) if number not in families.taken)
            families.taken.add(self._number)
            for metric in OF_PUBLISHERS:
                if not metric.labels:
                    self._series(metric, ())  # so that it is shown before it moves

    def _series(self, metric: Metric, labels: tuple[object, ...]) -> Any:
        key = (metric.name, *labels)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._families.by_metric[metric].labels(*labels, self._number)
        return bound

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        self._touch(lambda: self._series(metric, labels).inc(amount))

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        self._touch(lambda: self._series(metric, labels).set(value))

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        self._touch(lambda: self._series(metric, labels).observe(value))

    def _touch(self, change: Callable[[], object]) -> None:
        """Make a change, or leave it to a call of this method that the present signal handler or finaliser has interrupted.

        The locks of prometheus_client can't be taken twice by one thread.
        """
        self._changes.append(change)
        me = threading.get_ident()
        if self._toucher == me:
            return
        with fork_gate:
            self._toucher = me
            try:
                while self._changes:
                    change = self._changes.popleft()
                    if not self._closed:
                        change()
            finally:
                self._toucher = 0

    def forget(self, partition: int) -> None:
        """Do nothing: a publisher has no gauges of partitions."""

    def close(self) -> None:
        """Set the gauges to 0 and free the number; the next publisher with it continues its counters. Idempotent."""
        self._touch(self._leave)

    def _leave(self) -> None:
        for metric in OF_PUBLISHERS:
            if metric.type == "gauge":
                self._series(metric, ()).set(0)
        self._closed = True
        self._families.taken.discard(self._number)


def publishers_families(registry: object) -> Collection[object]:
    """Return the collectors in a registry that belong to publishers."""
    families = _known.get(registry)
    return frozenset(families.by_metric.values()) if families is not None else frozenset()


def _family(metric: Metric, registry: Registry) -> Any:
    labels = (*metric.labels, _LABEL)
    if metric.type == "histogram":
        return Histogram(metric.name, metric.help, labels, buckets=metric.buckets, registry=registry)
    if metric.type == "counter":
        return Counter(metric.name, metric.help, labels, registry=registry)
    shown_as_largest = metric.name.endswith(("_seconds", "_ratio"))  # of several processes; the rest can be added up
    mode: Any = "livemax" if shown_as_largest else "livesum"
    return Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode=mode)
