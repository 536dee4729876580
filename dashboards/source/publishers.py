"""The dashboard *Publishers*: apps that record deltas, their memory, spools and gateways."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

import pipeline.metrics as m
from dashboards.source.parts import Panel, Query, board, graph, heat_of, of, per_second, quantiles, with_panels


def publishers() -> models.Dashboard:
    """Return the dashboard."""
    about = "Apps that record deltas and expose the metrics of their publisher: what is sent, waits, and is given up."
    made = board("publishers", "Publishers", about, m.PUBLISHER_BATCHES)
    return with_panels(made, [*_sent(), *_trouble(), *_memory(), *_spool(), *_ingest()])


def _by_instance(metric: m.Metric, legend: str = "{{instance}}") -> Query:
    return Query(f"sum by (instance) ({of(metric)})", legend)


def _sent() -> list[str | Panel]:
    merged = f"sum(rate({of(m.PUBLISHER_MERGED_AWAY)}[$__rate_interval]))"
    deltas = f"sum(rate({of(m.PUBLISHER_DELTAS)}[$__rate_interval]))"
    return [
        "Sent",
        graph(
            "Published, per second",
            "Deltas that publishers drained from their buffers, and batches that were acknowledged. No data: no app "
            "that exposes its publisher's metrics is scraped.",
            [per_second(m.PUBLISHER_DELTAS, "deltas"), per_second(m.PUBLISHER_BATCHES, "batches")],
            unit="cps",
        ),
        graph(
            "Merged before they are sent",
            "Part of the deltas that merged with others of their series in the process. Near 0: each delta costs an "
            "entry in the log; longer flush intervals, or fewer labels, would spare it.",
            Query(f"{merged} / {deltas}", "merged"),
            unit="percentunit",
        ),
        graph(
            "Time between flushes",
            "As tuned between flush_interval_min_ms and flush_interval_ms; and the age of what local() returns.",
            [
                Query(f"max({of(m.PUBLISHER_LINGER)})", "between flushes"),
                Query(f"max({of(m.PUBLISHER_SNAPSHOT_AGE)})", "age of local()"),
            ],
            unit="s",
        ),
        heat_of(
            "Time to acknowledge",
            "From sending batches to their acknowledgement. High: the broker or the gateway is slow, or far away.",
            m.PUBLISHER_ACKNOWLEDGED,
            width=8,
        ),
        graph(
            "Time to acknowledge, quantiles",
            "The same as quantiles; see there. Above request_timeout_ms batches are sent again.",
            quantiles(m.PUBLISHER_ACKNOWLEDGED),
            unit="s",
        ),
        graph(
            "Time to flush",
            "Time to merge and seal what waited, each flush. High: very many series, or an app that leaves no CPU.",
            quantiles(m.PUBLISHER_FLUSH),
            unit="s",
        ),
    ]


def _trouble() -> list[str | Panel]:
    return [
        "What should be 0",
        graph(
            "Given up, per second",
            "Deltas that are lost to the views, by reason: buffer_full, closed, rejected. The app's log says why.",
            per_second(m.PUBLISHER_DROPPED, "{{reason}}", "reason"),
            unit="cps",
            alert="PipelinePublisherDropping",
        ),
        graph(
            "Retries and waits, per second",
            "Retries: attempts to send that failed and are repeated; the broker or the server is away. Blocked: a "
            "caller waited at buffer_bytes_max. Refused: the caller was told BufferFull.",
            [
                per_second(m.PUBLISHER_RETRIES, "retries"),
                per_second(m.PUBLISHER_BLOCKED, "blocked"),
                per_second(m.PUBLISHER_REFUSED, "refused"),
            ],
            unit="cps",
            alert="PipelinePublisherStuck",
        ),
        graph(
            "Held back",
            "Batches not sent again, because workers may have forgotten by now that they have folded them "
            "(producer_ttl_ms).",
            _by_instance(m.PUBLISHER_HELD_BACK),
            alert="PipelinePublisherHoldsBack",
        ),
    ]


def _memory() -> list[str | Panel]:
    return [
        "Memory",
        graph(
            "Buffered",
            "Memory of buffered series and unacknowledged batches, and its limit. It grows while nothing is "
            "acknowledged; at the limit on_full says what happens.",
            [_by_instance(m.PUBLISHER_BYTES), Query(f"max({of(m.PUBLISHER_BUFFER_MAX)})", "largest buffer_bytes_max")],
            unit="bytes",
        ),
        graph(
            "Series",
            "Series that are buffered now, and label sets a second that merged into an overflow series at series_max.",
            [_by_instance(m.PUBLISHER_SERIES), per_second(m.PUBLISHER_OVERFLOWED, "overflowed, per second")],
            alert="PipelineSeriesOverflow",
        ),
        graph(
            "Batches that wait",
            "Batches sealed and not acknowledged. It rises and does not fall: nothing is acknowledged.",
            _by_instance(m.PUBLISHER_IN_FLIGHT),
            alert="PipelinePublisherStuck",
        ),
    ]


def _spool() -> list[str | Panel]:
    return [
        "Spool (apps with spool_dir)",
        graph(
            "On disk",
            "Bytes of the spools, and the largest spool_bytes_max. They fill while the log is away.",
            [_by_instance(m.PUBLISHER_SPOOL_BYTES), Query(f"max({of(m.PUBLISHER_SPOOL_MAX)})", "largest spool_bytes_max")],
            unit="bytes",
            width=12,
            alert="PipelineSpoolFilling",
        ),
        graph(
            "Batches, per second",
            "Spilled: their bytes went to the spool because memory was short. Rescued: left by processes that are gone,"
            " and sent.",
            [per_second(m.PUBLISHER_SPILLED, "spilled"), per_second(m.PUBLISHER_RESCUED, "rescued")],
            unit="cps",
            width=12,
        ),
    ]


def _ingest() -> list[str | Panel]:
    return [
        "StatsD, OpenMetrics and bridges",
        graph(
            "Lines, per second",
            "Lines of StatsD, and samples of POST /v1/openmetrics, that came in, the malformed among them.",
            per_second(m.INGEST_LINES, "{{protocol}}", "protocol", always=True),
            unit="cps",
            width=12,
        ),
        graph(
            "Left out, per second",
            "Lines, packets, connections and series that were left out, by protocol and reason. pipeline docs ingest "
            "explains them.",
            per_second(m.INGEST_MALFORMED, "{{protocol}} {{reason}}", "protocol, reason", always=True),
            unit="cps",
            width=12,
        ),
    ]
