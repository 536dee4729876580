"""All settings: name, default, meaning and bounds.

Plain data, so that a publisher inside somebody's app loads nothing for it. `pipeline.config` reads settings from
`pipeline.toml`, the environment (`PIPELINE_*`) and flags; a `Publisher` takes its own as keywords, and the rest from
`publisher.environment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from pipeline.errors import Invalid
from pipeline.secret import Secret, with_secrets
from pipeline.settings.base import DURABILITY, ON_FULL, Durability, OnFull, check_value, default_of
from pipeline.settings.base import Checked as _Checked
from pipeline.settings.base import setting as _setting
from pipeline.settings.publisher import PublisherSettings
from pipeline.settings.worker import IngestSettings, LogSettings, WorkerSettings

__all__ = [
    "DURABILITY",
    "ENV_PREFIX",
    "FILE",
    "FILE_VARIABLE",
    "GROUPS",
    "HOLD_VARIABLE",
    "ON_FULL",
    "OTHER_VARIABLES",
    "SECRETS",
    "ClientKeywords",
    "ClientSettings",
    "Durability",
    "IngestSettings",
    "KafkaSettings",
    "LogSettings",
    "OnFull",
    "PublisherKeywords",
    "PublisherSettings",
    "QuerySettings",
    "WorkerSettings",
    "check_value",
    "default_of",
    "held",
]

ENV_PREFIX = "PIPELINE_"
FILE = "pipeline.toml"
FILE_VARIABLE = "PIPELINE_CONFIG"
HOLD_VARIABLE = "PIPELINE_HOLD"
OTHER_VARIABLES = frozenset(
    {
        FILE_VARIABLE,
        HOLD_VARIABLE,
        "PIPELINE_LONG_TESTS",
        "PIPELINE_NATIVE",
        "PIPELINE_REQUIRE_KAFKA",
        "PIPELINE_TEST_KAFKA",
    }
)
"""Variables with our prefix that are not settings."""


@dataclass(frozen=True)
class KafkaSettings(_Checked):
    """Settings of all connections to brokers; each is also a keyword of `Publisher`."""

    kafka: Mapping[str, Any] = _setting(
        {},
        "further options of librdkafka, by its names (`security.protocol`, `sasl.*`, `ssl.*`...); a table, or JSON. A "
        "secret such as `sasl.password` can be in a file, which `sasl.password_file` names",
    )
    kafka_timeout_ms: int = _setting(
        30_000, "how long a call may take to which no other limit applies: at start, for offsets, for topics", least=100
    )
    metadata_refresh_ms: int = _setting(2_000, "how often publishers, workers and servers look for new partitions", least=10)
    transaction_timeout_ms: int = _setting(
        15_000,
        "the broker aborts a commit that is open for longer; a dead owner holds followers up for so long",
        least=1_000,
    )


@dataclass(frozen=True)
class ClientSettings(_Checked):
    """Settings of all connections to servers of this package; each is also a keyword of `Publisher` and `Reader`."""

    token: Secret = _setting(  # noqa: RUF009  # a Secret can't be changed
        Secret(), "access token for servers that have a `tokens_file`; in PIPELINE_TOKEN, never on a command line"
    )
    token_file: str = _setting(
        "", "file with the access token, in place of `token`; read again when a server refuses the token"
    )
    answer_bytes_max: int = _setting(
        268_435_456, "bytes of one answer, or of one event of a stream; reading stops there, with an error", least=65_536
    )
    ca_file: str = _setting(
        "",
        "file of the authorities (PEM) that sign the certificates of `https://` servers; none: those the system trusts",
    )
    client_cert_file: str = _setting(
        "",
        "file of this client's certificate and those between it and its authority, for servers with a `tls_client_ca_file`",
    )
    client_key_file: str = _setting("", "file of the key of `client_cert_file`; none: it is in the same file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.client_key_file and not self.client_cert_file:
            raise Invalid("client_key_file needs client_cert_file")
        if self.token and self.token_file:
            raise Invalid("token and token_file: one of them")


class ClientKeywords(TypedDict, total=False):
    """The settings that `Reader` and `AsyncReader` take as keywords: those of `ClientSettings`."""

    token: str | Secret
    token_file: str
    answer_bytes_max: int
    ca_file: str
    client_cert_file: str
    client_key_file: str


class PublisherKeywords(ClientKeywords, total=False):
    """The settings that `Publisher` takes as keywords, for type checkers and editors.

    Names and types are those of `PublisherSettings`, `KafkaSettings` and `ClientSettings`, which also have the defaults,
    bounds and meanings; tests/publisher/test_keywords.py holds them together.
    """

    flush_interval_ms: int
    flush_interval_min_ms: int
    snapshot_interval_ms: int
    local_series_max: int
    batch_bytes_max: int
    buffer_bytes_max: int
    on_full: OnFull
    block_timeout_ms: int
    durability: Durability
    spool_dir: str
    spool_bytes_max: int
    fsync_interval_ms: int
    request_timeout_ms: int
    retry_backoff_ms: int
    retry_backoff_max_ms: int
    close_timeout_ms: int
    series_idle_ms: int
    series_max: int
    ts_ahead_max_ms: int
    producer_ttl_ms: int
    spread: int
    kafka: Mapping[str, Any]
    kafka_timeout_ms: int
    metadata_refresh_ms: int
    transaction_timeout_ms: int


@dataclass(frozen=True)
class QuerySettings(_Checked):
    """Settings of the HTTP server."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "port to listen on; 0 picks a free one", least=0, most=65_535)
    tokens_file: str = _setting(
        "",
        "file of access tokens, which `pipeline tokens` writes: requests need one of them; read again when it changes. "
        "Without it every request may do everything",
    )
    tls_cert_file: str = _setting(
        "",
        "file of the server's certificate (PEM) and those between it and its authority: the server speaks TLS only. This "
        "and the next two are read again when they change",
    )
    tls_key_file: str = _setting("", "file of the key of `tls_cert_file`; none: it is in the same file")
    tls_client_ca_file: str = _setting(
        "", "file of the authorities that sign the certificates of clients: without such a certificate no client is answered"
    )
    insecure: bool = _setting(
        False,
        "listen beyond loopback without a `tokens_file` or `tls_client_ca_file`, for a network without strangers: whoever "
        "reaches the port may do everything. For StatsD, which knows neither, it is needed in any case",
    )
    allowed_hosts: str = _setting(
        "",
        "names by which clients know this server, beside IP addresses, `localhost`, that in `host` and, beyond loopback, "
        "this machine's own: separated by commas; `*`: any. A request with another `Host` is refused with 421. With tokens "
        "or TLS any will do",
    )
    cors_origins: str = _setting(
        "",
        "origins such as `https://grafana.example` whose pages may use this server, separated by commas; others are refused "
        "with 403",
    )
    body_bytes_max: int = _setting(
        16_777_216, "largest request body; more is refused with 413", least=1_024, most=16_777_216
    )
    deltas_max: int = _setting(
        100_000,
        "deltas in one POST /v1/deltas; samples, and as many types, in one POST /v1/openmetrics; more is refused with 413",
        least=1,
    )
    batches_max: int = _setting(1_000, "batches in one POST /v1/batches; more is refused with 413", least=1)
    bodies_bytes_max: int = _setting(
        67_108_864,
        "memory of all request bodies; three quarters of it are for those over `large_body_bytes`; one more is refused with "
        "503",
        least=33_554_432,
    )
    large_body_bytes: int = _setting(
        102_400, "a larger body waits until fewer than `large_bodies_max` of its like are worked on", least=1_024
    )
    large_bodies_max: int = _setting(
        2,
        "large bodies that are decoded and appended at once; one that waits for 10 s is refused with 503",
        least=1,
        most=16,
    )
    fair_bytes_max: int = _setting(
        4_194_304,
        "bytes of this server's writes that are not folded; beyond it, a writer that has more than its equal part of it "
        "waits up to `fair_wait_ms` before each of its writes, while others write and while there is folding",
        least=1,
    )
    fair_wait_ms: int = _setting(
        8_000, "how long a writer waits at most so that others are folded soon; below its own time limit. 0: not", least=0
    )
    openmetrics_line_bytes_max: int = _setting(
        8_192, "longest line of POST /v1/openmetrics; a longer one is left out and counted", least=64, most=65_536
    )
    otlp_resource_attributes: str = _setting(
        "service.name",
        "resource attributes of POST /v1/metrics that become labels, separated by commas; the same on all servers",
    )
    otlp_totals: bool = _setting(
        False,
        "take totals (cumulative temporality) at POST /v1/metrics, and at the paths of a Pushgateway, of a server of "
        "Kafka's log: only where no other server gets any. `pipeline up` always takes them",
    )
    otlp_streams_max: int = _setting(
        100_000,
        "streams of totals that are remembered; one that was forgotten counts anew from its next total, which is left out",
        least=1,
    )
    idempotency_keys_max: int = _setting(
        100_000,
        "keys of `Idempotency-Key` whose bodies a server remembers, to refuse another body with 422; the oldest make room, "
        "and a repeat counts once all the same",
        least=1,
    )
    idempotent_partitions: int = _setting(
        1,
        "requests with an `Idempotency-Key` go to one of the first so many partitions, by the key; to be the same on all "
        "servers, and to be changed only while no request is repeated",
        least=1,
        most=1_024,
    )
    limit_default: int = _setting(10_000, "series in an answer when the request has no `limit`", least=1)
    limit_max: int = _setting(1_000_000, "largest `limit`", least=1)
    points_max: int = _setting(
        11_000, "points of one series in a read of a view with windows; more is refused with 400", least=1
    )
    answer_points_max: int = _setting(
        1_000_000,
        "points of all series that such a read merges or answers with, and samples of POST /api/v1/read; more is refused "
        "with 400",
        least=1,
    )
    queries_max: int = _setting(64, "queries of one POST /v1/query; more is refused with 400", least=1)
    matchers_max: int = _setting(
        64,
        "`where`, `by` and `q`, or `view`, parameters of one read; matchers of POST /api/v1/read",
        least=1,
    )
    regex_bytes_max: int = _setting(1_000, "longest regular expression in `where` and in matchers", least=1)
    timeout_ms_default: int = _setting(
        10_000, "how long a read waits and works when the request has no `timeout_ms`", least=1
    )
    timeout_ms_max: int = _setting(60_000, "largest `timeout_ms`", least=1)
    cpu_ms_max: int = _setting(
        20_000,
        "CPU time of all threads that work for one request; a read that needs more is refused with 400, a write with 413",
        least=1,
    )
    openmetrics_series_max: int = _setting(
        50_000,
        "series in an answer of GET /v1/openmetrics, each histogram 33; views that do not fit are left out, each as a whole",
        least=1,
    )
    remote_read_bytes_max: int = _setting(
        67_108_864, "bytes of an answer of POST /api/v1/read, before compression; more is refused with 400", least=1_024
    )
    read_thread_count: int = _setting(4, "scans that run at once; point reads need no thread", least=1, most=256)
    gather_bytes_max: int = _setting(
        67_108_864,
        "bytes of states that a server gives to one read of `serve --gather`; more is refused with 400",
        least=65_536,
    )
    gather_interval_ms: int = _setting(
        250, "how often `serve --gather` asks each server which partitions it has and how stale they are", least=10
    )
    reads_waiting_max: int = _setting(
        256, "reads that run or wait for a thread, equal ones once; one more is refused with 503", least=1
    )
    large_answer_series: int = _setting(
        50_000,
        "an answer that can have more series waits until fewer than `large_answers_max` of its like are made",
        least=1,
    )
    large_answers_max: int = _setting(
        2, "large answers that are made at once; one that waits longer than its `timeout_ms` is 503", least=1, most=256
    )
    waits_max: int = _setting(
        256,
        "reads that wait for newer data (`after`, `max_staleness_ms`), for which they need no thread; if there is one more, "
        "the one that has waited for longest is refused with 503",
        least=1,
    )
    answer_cache_bytes: int = _setting(
        67_108_864,
        "memory of answers that are kept for equal reads of the same commit, at most half for one; those not asked for "
        "longest make room. 0: none, and equal reads share only what is under way",
        least=0,
    )
    cursor_bytes_max: int = _setting(
        134_217_728,
        "memory of pages that cursors name; lists of pages not used for longest make room, and their cursors are 410. One "
        "that is larger is refused with 400",
        least=1,
    )
    cursor_ttl_ms: int = _setting(60_000, "how long pages are kept without use; after that their cursors are 410", least=1)
    compress_bytes_min: int = _setting(
        1_024, "answers and lists of views from this size on are compressed for clients that accept gzip or zstd", least=1
    )
    sockets_max: int = _setting(
        4_096,
        "open connections, at most half of the files that the process may open; at the limit the connection that has waited "
        "longest for its client makes room, and where none waits a few more are taken for health and metrics only",
        least=1,
        most=65_536,
    )
    sockets_per_address_max: int = _setting(
        3_072, "open connections from one address, or from one IPv6 network of 64 bits; the same", least=1, most=65_536
    )
    head_bytes_max: int = _setting(
        65_536,
        "bytes of a request's line and headers together, and of the trailers behind a chunked body; more is refused with "
        "431 (or 414, if the URL alone is larger), and the connection is closed",
        least=1_024,
        most=65_536,
    )
    idle_timeout_ms: int = _setting(60_000, "a connection without a request for so long is closed", least=100)
    head_timeout_ms: int = _setting(
        10_000,
        "time for the whole head of a request, from its first byte, or for a connection's first from the start; then 408",
        least=100,
    )
    body_timeout_ms: int = _setting(
        60_000, "time for the whole body of a request, from the end of its head; then 408", least=100
    )
    write_timeout_ms: int = _setting(
        30_000, "a client that takes neither 64 KB of its answer nor the rest within this time is cut off", least=100
    )
    buffered_bytes_max: int = _setting(
        268_435_456,
        "bytes of answers that clients have not taken, and of requests before their turn, all connections together; beyond "
        "it the client that reads most slowly is cut off, but those that take 1 MB a second only beyond twice of it",
        least=1_048_576,
    )
    connections_max: int = _setting(
        1_000,
        "open requests whose bodies are there, without streams; one more is refused with 503, but for `/healthz`, `/readyz` "
        "and `/metrics`",
        least=1,
    )
    streams_max: int = _setting(2_000, "open streams, beside `connections_max`; one more is refused with 503", least=1)
    stream_queries_max: int = _setting(
        100, "different reads that are streamed, each computed once a commit; one more is refused with 503", least=1
    )
    streams_per_client_max: int = _setting(
        1_500, "open streams of one access token or, without tokens, of one address; one more is refused with 503", least=1
    )
    stream_queries_per_client_max: int = _setting(
        75,
        "different reads that are streamed because one access token or address was first to ask for them; one more is "
        "refused with 503",
        least=1,
    )
    stream_interval_ms: int = _setting(200, "shortest time between two updates of a stream", least=10)
    stream_heartbeat_ms: int = _setting(
        2_000, "usual longest time without an event in a stream; half as long again while an answer takes long", least=100
    )
    stream_stalled_ms: int = _setting(30_000, "a stream whose reader takes nothing for so long is ended", least=100)
    compaction_lag_ms: int = _setting(
        0,
        "min.compaction.lag.ms of the changelog, for a server that may not see it (DESCRIBE_CONFIGS); 0: it must see it",
        least=0,
    )
    end_offsets_interval_ms: int = _setting(
        100, "how often a query server asks Kafka where the log ends: the least staleness that it can state", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tls_key_file", "tls_client_ca_file"):
            if getattr(self, name) and not self.tls_cert_file:
                raise Invalid(f"{name} needs tls_cert_file")


GROUPS: tuple[type[_Checked], ...] = (
    PublisherSettings,
    ClientSettings,
    KafkaSettings,
    LogSettings,
    WorkerSettings,
    QuerySettings,
    IngestSettings,
)
"""All groups of settings. A name in two groups has one meaning and one default, and is set for both at once."""
SECRETS = frozenset(item.name for group in GROUPS for item in fields(group) if isinstance(default_of(item), Secret))
"""Settings that hold a secret; the table `kafka` may hold others."""


def held(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which texts that are secrets are of type `Secret`; a value of a wrong type stays as it is."""

    def of(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return with_secrets(value)
        return Secret(value) if name in SECRETS and isinstance(value, str) else value

    return {name: of(name, value) for name, value in settings.items()}
