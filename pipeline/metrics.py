"""The catalogue of metrics of all roles, and the port by which they are recorded.

`adapters/prometheus.py` turns the catalogue into Prometheus families; `NO_METRICS` is the default that records nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol


class Metric(NamedTuple):
    """A family. Names follow Prometheus' conventions: base units, counters end in `_total`."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_P = ("partition",)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

INFO = Metric(
    "pipeline_info", "gauge", "1: the process runs; what it is stands in the labels.", ("role", "version", "native")
)
READY = Metric(
    "pipeline_ready", "gauge", "1 if the process has restored its state and works, 0 until then: what /readyz says."
)
DISK_BYTES = Metric("pipeline_disk_bytes", "gauge", "Size of the file system that holds the state folder.")
DISK_FREE = Metric("pipeline_disk_free_bytes", "gauge", "Bytes of it that the process can still write.")

BATCHES_FOLDED = Metric("pipeline_batches_folded_total", "counter", "Batches folded into the state.", _P)
ENTRIES_FOLDED = Metric(
    "pipeline_entries_folded_total", "counter", "Merged deltas folded, one for each series of a batch.", _P
)
BATCHES_DUPLICATE = Metric(
    "pipeline_batches_duplicate_total", "counter", "Batches dropped because they were folded before.", _P
)
BATCHES_STALE = Metric("pipeline_batches_stale_total", "counter", "Batches refused because of an old producer epoch.", _P)
DEAD_LETTERS = Metric("pipeline_dead_letters_total", "counter", "Records and groups written to the dead-letter topic.", _P)
GROUPS_REFUSED = Metric(
    "pipeline_groups_refused_total", "counter", "Groups of batches that became dead letters by themselves.", _P
)
ENTRIES_EXPIRED = Metric(
    "pipeline_entries_expired_total", "counter", "Entries that became dead letters, because their windows have expired.", _P
)
SERIES_EXPIRED = Metric(
    "pipeline_series_expired_total", "counter", "Series deleted at the end of their view's retention.", _P
)
SERIES_OVERFLOWED = Metric(
    "pipeline_series_overflowed_total", "counter", "Entries merged into an overflow series, at series_max.", _P
)
PRODUCERS_FORGOTTEN = Metric(
    "pipeline_producers_forgotten_total", "counter", "Producers forgotten because they were silent for producer_ttl_ms.", _P
)
ENTRIES_COMMITTED = Metric(
    "pipeline_entries_committed_total", "counter", "Series entries written to changelog and store.", _P
)
COMMITS = Metric("pipeline_commits_total", "counter", "Commits.", _P)
COMMIT_SECONDS = Metric(
    "pipeline_commit_seconds", "histogram", "Time from freezing an overlay to its being durable.", (), _SECONDS
)
COMMIT_BOUND = Metric(
    "pipeline_commit_entries_max",
    "gauge",
    "Entries that may be folded before a commit, so that it ends within its timeout; learned from how long commits take.",
    _P,
)
NATIVE_PRODUCE = Metric(
    "pipeline_native_produce",
    "gauge",
    "1 if the native core produces the messages of a commit, thousands in one call; 0 if they are produced one by one.",
)
OVERLAY_FULL = Metric("pipeline_overlay_full_total", "counter", "Commits made early because the overlay was full.", _P)
NEXT_OFFSET = Metric(
    "pipeline_position_next_offset", "gauge", "First record of the deltas topic that is not in the state.", _P
)
LAG = Metric("pipeline_lag_records", "gauge", "Records behind: high watermark of the deltas topic less next offset.", _P)
HELD_UP = Metric(
    "pipeline_held_up_records",
    "gauge",
    "Records of the deltas topic that can't be read, because a transaction that is none of ours is open in front of them.",
    _P,
)
RETENTION_MARGIN = Metric(
    "pipeline_retention_margin_records",
    "gauge",
    "Records between the log's start and next offset; below 0 records are lost.",
    _P,
)
START_OFFSET = Metric("pipeline_log_start_offset", "gauge", "First record of the deltas topic that retention has left.", _P)
RESTORE_ENTRIES = Metric(
    "pipeline_restore_entries_total", "counter", "Changelog records applied by restores, and by servers that follow.", _P
)
RESTORE_REMAINING = Metric(
    "pipeline_restore_remaining_records", "gauge", "Changelog records that a restore has still to read.", _P
)
STALLS = Metric(
    "pipeline_stalls_total",
    "counter",
    "Partitions that stood still with lag for stall_timeout_ms, and threads; the process ends then.",
)
THREAD_ERRORS = Metric(
    "pipeline_thread_errors_total",
    "counter",
    "Exceptions that nobody expected, by the thread that raised them; the log has their tracebacks.",
    ("thread",),
)
FENCED = Metric(
    "pipeline_fenced_total", "counter", "Partitions lost because another worker took them over before this one let go."
)
CHANGELOG_FOREIGN = Metric(
    "pipeline_changelog_foreign_records_total",
    "counter",
    "Changelog records that were left out because no owner of the partition wrote them.",
    _P,
)
DELTAS_HOLES = Metric(
    "pipeline_deltas_holes_total",
    "counter",
    "Offsets of the deltas topic that hold no record: ends of transactions of others, or records that the log has lost.",
    _P,
)
STORES_REBUILT = Metric(
    "pipeline_stores_rebuilt_total", "counter", "Stores deleted and restored because they could not be trusted.", _P
)
LOG_APPENDED = Metric("pipeline_log_appended_total", "counter", "Records appended to the embedded log.", ("topic",))
LOG_BYTES = Metric(
    "pipeline_log_appended_bytes_total", "counter", "Bytes of keys and values appended to the embedded log.", ("topic",)
)
LOG_REMOVED = Metric("pipeline_log_removed_total", "counter", "Records removed from the embedded log.", ("topic", "by"))
LOG_LOST = Metric(
    "pipeline_log_lost_total", "counter", "Records of the embedded log that were gone when it was opened.", ("topic",)
)
STORES_SET_ASIDE = Metric(
    "pipeline_stores_set_aside_total",
    "counter",
    "Stores that were ahead of their changelog, kept under another name and restored from what it says.",
    _P,
)
REQUESTS = Metric("pipeline_http_requests_total", "counter", "HTTP requests answered.", ("path", "status"))
REQUEST_SECONDS = Metric(
    "pipeline_http_request_seconds", "histogram", "Time to answer an HTTP request.", ("path",), _SECONDS
)
ACCESS_REFUSED = Metric(
    "pipeline_access_refused_total",
    "counter",
    "Requests refused for want of rights: the access token was missing, malformed, unknown or expired, lacked a scope, or is"
    " bound to other views or labels (bounds).",
    ("reason",),
)
TOKENS = Metric("pipeline_access_tokens", "gauge", "Access tokens in the tokens_file that the server goes by.")
TOKENS_UNREADABLE = Metric(
    "pipeline_tokens_file_errors_total",
    "counter",
    "Times that the tokens_file had changed and could not be read: the tokens that were read before go on to count.",
)
TLS_UNREADABLE = Metric(
    "pipeline_tls_file_errors_total",
    "counter",
    "Times that the files of the server's TLS had changed and could not be used: those that were read before go on.",
)
GATHER_SERVER_UP = Metric(
    "pipeline_gather_server_up", "gauge", "With `serve --gather`, 1 for a server that answers, else 0.", ("server",)
)
CONNECTIONS = Metric("pipeline_http_connections_open", "gauge", "Open connections of the HTTP server.")
CONNECTIONS_MAX = Metric(
    "pipeline_http_connections_max", "gauge", "Most of them: sockets_max, or half of the files that the process may open."
)
CONNECTIONS_CUT = Metric(
    "pipeline_http_connections_cut_total",
    "counter",
    "Connections that the HTTP server closed, by the setting whose limit they had reached.",
    ("limit",),
)
STREAMS = Metric("pipeline_streams_open", "gauge", "Open streams of answers.")
STREAMS_STALLED = Metric(
    "pipeline_streams_stalled_total", "counter", "Streams ended because their readers took nothing for stream_stalled_ms."
)
REQUESTS_REFUSED = Metric(
    "pipeline_requests_refused_total",
    "counter",
    "Requests refused before anything is read of them: host, one that this server is not known as; origin, a page of another"
    " site.",
    ("reason",),
)
BODIES_REFUSED = Metric(
    "pipeline_bodies_refused_total", "counter", "Requests refused because of the bodies of others.", ("limit",)
)
WRITES_DELAYED = Metric(
    "pipeline_writes_delayed_total", "counter", "Writes that waited because their writer has much that is not folded yet."
)
READS_REFUSED = Metric("pipeline_reads_refused_total", "counter", "Reads refused at a limit.", ("limit",))
ANSWERS = Metric(
    "pipeline_answers_total",
    "counter",
    "Answers but those of a few keys: computed, joined (one computation, several reads), kept, unchanged (304), or streamed"
    " (one computation, all streams of a read).",
    ("how",),
)
ANSWERS_KEPT = Metric(
    "pipeline_answers_kept_bytes", "gauge", "Memory of answers that are kept for reads of the same commit."
)
CURSOR_BYTES = Metric("pipeline_cursor_bytes", "gauge", "Memory of pages that cursors name.")
CURSORS_LOST = Metric(
    "pipeline_cursors_lost_total",
    "counter",
    "Lists of pages dropped: expired (not used for cursor_ttl_ms) or evicted (cursor_bytes_max).",
    ("why",),
)
STALENESS = Metric(
    "pipeline_staleness_seconds", "gauge", "Upper bound on the age of anything accepted but not in answers.", _P
)
DELTAS_INGESTED = Metric("pipeline_deltas_ingested_total", "counter", "Deltas accepted by POST /v1/deltas.")
BATCHES_INGESTED = Metric("pipeline_batches_ingested_total", "counter", "Batches accepted by POST /v1/batches.")
INGEST_LINES = Metric(
    "pipeline_ingest_lines_total",
    "counter",
    "Lines of StatsD, and samples of POST /v1/openmetrics, that came in, the malformed among them.",
    ("protocol",),
)
TOTAL_STREAMS = Metric(
    "pipeline_otlp_streams", "gauge", "Streams of totals that are remembered; at otlp_streams_max the oldest are forgotten."
)
INGEST_MALFORMED = Metric(
    "pipeline_ingest_malformed_total",
    "counter",
    "Lines and samples that were left out, packets and connections that were refused, series that a bridge left out.",
    ("protocol", "reason"),
)
PUBLISHER_DELTAS = Metric("pipeline_publisher_deltas_total", "counter", "Deltas drained from buffers.")
PUBLISHER_BATCHES = Metric("pipeline_publisher_batches_total", "counter", "Batches acknowledged.")
PUBLISHER_RETRIES = Metric("pipeline_publisher_retries_total", "counter", "Attempts to send that failed and are repeated.")
PUBLISHER_DROPPED = Metric(
    "pipeline_publisher_dropped_total",
    "counter",
    "Deltas given up: buffer_full, closed; and batches that the log refused for good: rejected.",
    ("reason",),
)
PUBLISHER_BLOCKED = Metric("pipeline_publisher_blocked_total", "counter", "Times that a caller waited at buffer_bytes_max.")
PUBLISHER_REFUSED = Metric(
    "pipeline_publisher_refused_total", "counter", "Deltas refused with BufferFull: their caller was told."
)
PUBLISHER_MERGED_AWAY = Metric(
    "pipeline_publisher_merged_away_total",
    "counter",
    "Deltas that merged with others of their series before they were sealed.",
)
PUBLISHER_BUFFER_MAX = Metric("pipeline_publisher_buffer_bytes_max", "gauge", "The setting buffer_bytes_max.")
PUBLISHER_SPOOL_BYTES = Metric("pipeline_publisher_spool_bytes", "gauge", "Bytes of this process's spool on disk.")
PUBLISHER_SPOOL_MAX = Metric("pipeline_publisher_spool_bytes_max", "gauge", "The setting spool_bytes_max.")
PUBLISHER_SPILLED = Metric("pipeline_publisher_spilled_total", "counter", "Batches whose bytes went to the spool.")
PUBLISHER_FLUSH = Metric(
    "pipeline_publisher_flush_seconds", "histogram", "Time to merge and seal what waited, each flush.", (), _SECONDS
)
PUBLISHER_ACKNOWLEDGED = Metric(
    "pipeline_publisher_acknowledge_seconds",
    "histogram",
    "Time from sending batches to their acknowledgement.",
    (),
    _SECONDS,
)
PUBLISHER_IN_FLIGHT = Metric("pipeline_publisher_batches_waiting", "gauge", "Batches sealed and not acknowledged.")
PUBLISHER_LINGER = Metric("pipeline_publisher_linger_seconds", "gauge", "Time between flushes, as tuned.")
PUBLISHER_SNAPSHOT_AGE = Metric(
    "pipeline_publisher_snapshot_age_seconds", "gauge", "Age of what local() returns, at a flush."
)
PUBLISHER_RESCUED = Metric(
    "pipeline_publisher_rescued_total", "counter", "Batches of processes that are gone, sent from their spools."
)
PUBLISHER_OVERFLOWED = Metric(
    "pipeline_publisher_series_overflowed_total",
    "counter",
    "Times that a new label set was merged into an overflow series, because its view has series_max of them.",
)
PUBLISHER_HELD_BACK = Metric(
    "pipeline_publisher_batches_held_back",
    "gauge",
    "Batches not sent again, because tasks may have forgotten by now that they have folded them (producer_ttl_ms).",
)
PUBLISHER_BYTES = Metric(
    "pipeline_publisher_buffer_bytes", "gauge", "Memory account of buffered series and unacknowledged batches."
)
PUBLISHER_SERIES = Metric("pipeline_publisher_series", "gauge", "Series that are buffered now.")
AGENT_ERRORS = Metric(
    "pipeline_agent_errors_total",
    "counter",
    "Events at which an agent raised, and messages that could not be decoded for it.",
    ("topic", "reason"),
)
AGENT_COMMITS_FAILED = Metric(
    "pipeline_agent_commits_failed_total",
    "counter",
    "Commits of agents' source offsets put off, because what they recorded was not acknowledged or no broker took them.",
)
CHANGES = Metric("pipeline_changes_total", "counter", "Changes of a view that an agent has taken in.", ("view", "partition"))

CATALOGUE: tuple[Metric, ...] = tuple(value for value in [*globals().values()] if isinstance(value, Metric))
"""All metrics."""
_SUFFIXES = {
    "counter": ("", "_total", "_created"),
    "gauge": ("",),
    "histogram": ("", "_bucket", "_count", "_sum", "_created"),
}
NAMES: frozenset[str] = frozenset(
    f"{it.name.removesuffix('_total') if it.type == 'counter' else it.name}{suffix}"
    for it in CATALOGUE
    for suffix in _SUFFIXES[it.type]
)
"""All names that metrics and their samples have."""
OF_PUBLISHERS: tuple[Metric, ...] = (
    *(it for it in CATALOGUE if it.name.startswith("pipeline_publisher_")),
    INGEST_MALFORMED,
    THREAD_ERRORS,
)
"""Metrics that a publisher and its bridges record."""
PARTITION_GAUGES: tuple[Metric, ...] = tuple(it for it in CATALOGUE if it.type == "gauge" and it.labels == _P)
"""Metrics that `Metrics.forget` removes."""


class Metrics(Protocol):
    """Records metrics. Label values stand in the order of the metric's labels. Safe from any thread."""

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        """Raise a counter."""
        ...

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        """Add an observation to a histogram."""
        ...

    def forget(self, partition: int) -> None:
        """Remove the gauges of a partition that this process no longer owns. Counters stay."""
        ...


class _NoMetrics:
    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        """Do nothing."""

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        """Do nothing."""

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        """Do nothing."""

    def forget(self, partition: int) -> None:
        """Do nothing."""


NO_METRICS: Metrics = _NoMetrics()
