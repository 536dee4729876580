"""Metrics of prometheus_client and of OpenTelemetry's SDK on a real broker: what they count is in the views, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from prometheus_client import CollectorRegistry, Counter, Histogram, push_to_gateway

from pipeline import Publisher, Reader
from tests.broker.drive import server, worker
from tests.broker.kafka import App, create_topics
from tests.support import everything

TIMES = 20


def export(url: str, name: str, temporality: AggregationTemporality) -> None:
    """Count with the SDK, and export after every count."""
    preferred = {sdk.Counter: temporality, sdk.Histogram: temporality}
    exporter = OTLPMetricExporter(f"{url}/v1/metrics", preferred_temporality=preferred)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
    provider = sdk.MeterProvider(
        [reader], views=[View(instrument_name=f"{name}.size", aggregation=ExponentialBucketHistogramAggregation())]
    )
    meter = provider.get_meter("test")
    jobs, took = meter.create_counter(f"{name}.jobs"), meter.create_histogram(f"{name}.took")
    size = meter.create_histogram(f"{name}.size")
    for number in range(TIMES):
        jobs.add(2, {"kind": str(number % 3)})
        took.record(number)
        size.record(number)
        assert provider.force_flush()
    provider.shutdown()


@pytest.mark.timeout(180)
def test_what_clients_count_is_in_the_views(app: App, tmp_path: Path) -> None:
    """Deltas and totals of the SDK, a push to the path of a Pushgateway, and a bridge equal what they were told."""
    create_topics(app.bootstrap, app.app, 2)
    with (
        worker(app, tmp_path / "worker"),
        server(app, tmp_path / "server", "--ingest", "--set", "otlp_totals=true") as query,
        Reader(query.url) as reader,
    ):
        export(query.url, "deltas", AggregationTemporality.DELTA)
        export(query.url, "totals", AggregationTemporality.CUMULATIVE)
        for name in ("pushed", "bridged"):
            registry = CollectorRegistry()
            rows = Counter(f"{name}_rows", "x", ["kind"], registry=registry)
            size = Histogram(f"{name}_size", "x", registry=registry)
            with Publisher(app.url) as pub:
                if name == "bridged":
                    pub.bridge(registry)
                for number in range(TIMES):
                    rows.labels(str(number % 3)).inc(2)
                    size.observe(number)
                published = pub.close()
            if name == "pushed":
                push_to_gateway(query.url, "job", registry)
        token = everything(reader) | published  # the server knows the ends of a moment ago
        per_kind = {str(kind): 2 * len(range(kind, TIMES, 3)) for kind in range(3)}
        for view in ("deltas_jobs", "totals_jobs", "pushed_rows_total", "bridged_rows_total"):
            answer = reader.get(view, by=["kind"], after=token, timeout_ms=60_000)
            assert {series.labels["kind"]: series.value for series in answer.series} == per_kind, view
        for view in ("deltas_took", "totals_took", "pushed_size", "bridged_size"):
            of = {
                name: reader.get(f"{view}_{name}", by=[], after=token, timeout_ms=60_000).value()
                for name in ("count", "sum")
            }
            assert of == {"count": TIMES, "sum": sum(range(TIMES))}, view
            under = reader.get(f"{view}_bucket", where={"le": "5.0"}, by=[], after=token, timeout_ms=60_000).value()
            assert under == 6, view
        for view in ("deltas_size", "totals_size"):
            value = reader.get(view, by=[], after=token, timeout_ms=60_000).value()
            assert [value[it] for it in ("count", "sum", "min", "max")] == [TIMES, sum(range(TIMES)), 0, TIMES - 1], view
