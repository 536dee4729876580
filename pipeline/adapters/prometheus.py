"""Text for Prometheus to scrape: the program's own metrics, and the views, both by prometheus_client's encoders.

Every value is written as a float64, which is what Prometheus stores: an int beyond 2**53 is rounded, and one beyond all
floats is infinite, because its digits would make Prometheus refuse the whole scrape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from math import inf
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

import pipeline.native as native
from pipeline.adapters import prometheus_protobuf
from pipeline.core.classic import ClassicHistogram, joined
from pipeline.core.exposition import (
    OMITTED,
    OMITTED_HELP,
    STALENESS,
    STALENESS_HELP,
    ClassicBuckets,
    Exposed,
    Exposition,
    about,
    bound_text,
    family_name,
    sample_value,
)
from pipeline.core.kinds import KINDS
from pipeline.metrics import CATALOGUE, INFO, NAMES, PARTITION_GAUGES, Metric


class PrometheusMetrics:
    """`metrics.Metrics` with a registry of its own, so that two servers in one process do not collide. Safe from any thread.

    Families without labels exist from the start, as 0. Series are kept until `forget`, so label values must be few.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._families: dict[Metric, Any] = {metric: self._family(metric) for metric in CATALOGUE}
        self._bound: dict[tuple[object, ...], Any] = {}
        self._lock = threading.Lock()
        self.before_render: Callable[[], None] = lambda: None
        """Sets the gauges that are measured when somebody asks for them."""
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _family(self, metric: Metric) -> Any:
        if metric.type == "histogram":
            return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)
        family = Counter if metric.type == "counter" else Gauge
        return family(metric.name, metric.help, metric.labels, registry=self.registry)

    def _series(self, metric: Metric, labels: tuple[object, ...]) -> Any:
        key = (metric.name, *labels)
        bound = self._bound.get(key)
        if bound is None:
            family = self._families[metric]
            with self._lock:
                bound = self._bound[key] = family.labels(*labels) if labels else family
        return bound

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        self._series(metric, labels).inc(amount)

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        self._series(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        self._series(metric, labels).observe(value)

    def forget(self, partition: int) -> None:
        """Remove the gauges of a partition."""
        with self._lock:  # a series that is bound between the two calls would never be shown
            for metric in PARTITION_GAUGES:
                if self._bound.pop((metric.name, partition), None) is not None:
                    self._families[metric].remove(partition)

    def show_info(self, role: str) -> None:
        """Set `pipeline_info` of this process."""
        self.set(INFO, 1, role, version("delta-pipeline"), "yes" if native.in_use() else "no")

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text, and its media type, in the format that the Accept header prefers."""
        self.before_render()
        encode, media_type = encoder_for(accept)
        return encode(self.registry), media_type


def encoder_for(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Return the encoder that an Accept header prefers, and its media type; for a wrong header that of the text format."""
    try:
        return choose_encoder(accept)
    except TypeError:  # a version that is no number
        return choose_encoder("")


class _ViewFamilies(Collector):
    """Families of one scrape, made one by one while they are written."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition

    def collect(self) -> Iterator[Family]:
        it = self._exposition
        stale = Family(STALENESS, STALENESS_HELP, "gauge")
        stale.add_sample(STALENESS, {}, it.staleness_s)
        yield stale
        omitted = Family(OMITTED, OMITTED_HELP, "gauge")
        for view, reason in it.omitted.items():
            omitted.add_sample(OMITTED, {"view": view, "reason": reason}, 1)
        yield omitted
        for shown in joined(it, NAMES):
            yield _classic(shown) if isinstance(shown, ClassicHistogram) else _family(shown)


def _classic(histogram: ClassicHistogram) -> Family:
    name = histogram.name
    family = Family(name, histogram.about, "histogram")
    for it in histogram.series:
        of = dict(zip(histogram.labels, it.labels, strict=True))
        family.samples += [Sample(f"{name}_bucket", {**of, "le": text}, count) for text, _, count in it.buckets]
        if it.sum is not None:  # OpenMetrics has no count without a sum
            family.samples.append(Sample(f"{name}_count", of, it.buckets[-1][2]))
            family.samples.append(Sample(f"{name}_sum", of, it.sum))
    return family


def _family(exposed: Exposed) -> Family:
    definition = exposed.definition
    if definition.kind == "histogram":
        return _histogram(exposed)
    name = family_name(definition)
    kind, sample = ("counter", f"{name}_total") if definition.monotone else ("gauge", name)
    family = Family(name, about(definition), kind)
    for labels, answer in zip(exposed.labels, exposed.values, strict=True):
        value = sample_value(KINDS[definition.kind].number(answer))
        if value is not None:
            family.samples.append(Sample(sample, dict(zip(definition.labels, labels, strict=True)), value))
    return family


def _histogram(exposed: Exposed) -> Family:
    """Return a family of classic buckets; a window's counts do not go on in the next one, so they are a gauge's."""
    definition, name = exposed.definition, exposed.definition.view
    kind, prefix = ("gaugehistogram", "g") if definition.window_s else ("histogram", "")
    family = Family(name, about(definition), kind)
    classic = ClassicBuckets(exposed.values)
    bounds = [bound_text(bound) for bound in (*classic.bounds, inf)]
    # OpenMetrics has no sum beside buckets below zero, because it would not be a counter; nor a count without a sum.
    below_zero = bool(classic.bounds) and classic.bounds[0] < 0
    for labels, state in zip(exposed.labels, exposed.values, strict=True):
        of = dict(zip(definition.labels, labels, strict=True))
        counts = classic.counts(state)
        for bound, count in zip(bounds, counts, strict=True):
            family.samples.append(Sample(f"{name}_bucket", {**of, "le": bound}, count))
        if prefix or not below_zero:
            total = sample_value(KINDS["sum"].answer(state[0])) or 0
            family.samples.append(Sample(f"{name}_{prefix}count", of, counts[-1]))
            family.samples.append(Sample(f"{name}_{prefix}sum", of, total if below_zero else max(total, 0)))
    return family


def render_views(exposition: Exposition, accept: str = "") -> tuple[bytes, str]:
    """Return the scrape, and its media type, in the format that the Accept header prefers: one of text, or protobuf."""
    if prometheus_protobuf.is_preferred(accept):
        return prometheus_protobuf.encode_families(exposition), prometheus_protobuf.MEDIA_TYPE
    encode, media_type = encoder_for(accept)
    return encode(_ViewFamilies(exposition)), media_type
