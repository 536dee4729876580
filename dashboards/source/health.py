"""The dashboard *Health*: whether deltas become answers, how late, and what to do when they do not."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

import pipeline.metrics as m
from dashboards.source.parts import (
    Panel,
    Query,
    board,
    graph,
    largest,
    last_hour,
    number,
    of,
    ours,
    per_second,
    smallest,
    with_panels,
)


def health() -> models.Dashboard:
    """Return the dashboard."""
    about = "Whether deltas become answers, how late, and what to do when they do not. Descriptions say what red means."
    return with_panels(
        board("health", "Health", about, m.INFO), [*_now(), *_flow(), *_fresh(), *_zero(), *_http(), *_door(), *_processes()]
    )


def _now() -> list[str | Panel]:
    alerts = 'sum(ALERTS{alertname=~"Pipeline.+",alertstate="firing",cluster=~"$cluster",app=~"$app"}) or vector(0)'
    up = ours(of("up"))
    return [
        "Is it right, is it fresh, does it keep up?",
        number(
            "Dead letters, last hour",
            "Records that could not be folded. Their deltas are in no view until the cause is repaired and they are "
            "replayed: pipeline dead-letters ls says why.",
            last_hour(m.DEAD_LETTERS, "records"),
            red=1,
            alert="PipelineDeadLetters",
        ),
        number(
            "Given up by publishers, last hour",
            "Deltas that publishers gave up: they are lost to the views. The app's log says why. 0 also if no app that "
            "exposes its publisher's metrics is scraped.",
            last_hour(m.PUBLISHER_DROPPED, "deltas", always=True),
            red=1,
            alert="PipelinePublisherDropping",
        ),
        number(
            "Staleness",
            "Upper bound on the age of anything that was accepted and is not in answers yet, the worst partition of the"
            " worst server. Red: look at Lag. If lag grows, a worker is down or too slow; if it does not, the servers "
            "do not follow, or the broker is away.",
            Query(f"max({of(m.STALENESS)})", "staleness"),
            unit="s",
            red=60,
            alert="PipelineStale",
        ),
        number(
            "Lag",
            "Records that were published and are not folded, all partitions. Red: more comes in than workers fold, or a"
            " partition has no worker.",
            Query(f"sum(max by (cluster, app, partition) ({of(m.LAG)}))", "records"),
            red=100_000,
            alert="PipelineLag",
        ),
        number(
            "Processes up",
            "Part of the workers, servers and `up` of the last day that Prometheus can scrape. Red: one is down or "
            "can't be reached.",
            Query(f"avg({up})", "up"),
            unit="percentunit",
            red=-1,
            alert="PipelineProcessDown",
        ),
        number(
            "Alerts",
            "Alerts of dashboards/rules.yml that fire now. Each has an entry in the runbook.",
            Query(alerts, "firing"),
            red=1,
        ),
    ]


def _flow() -> list[str | Panel]:
    return [
        "Deltas in, entries out",
        graph(
            "Accepted by servers, per second",
            "What servers took and the log acknowledged: deltas of POST /v1/deltas, batches of POST /v1/batches. "
            "Publishers that write to Kafka directly are not in it. At 0 although apps publish: look at HTTP requests "
            "for 4xx and 5xx.",
            [per_second(m.DELTAS_INGESTED, "deltas"), per_second(m.BATCHES_INGESTED, "batches")],
            unit="cps",
        ),
        graph(
            "Batches folded, per second",
            "Batches that workers folded into the state, by partition. A partition at 0 while its lag grows has no "
            "worker, or its worker waits for the broker.",
            per_second(m.BATCHES_FOLDED, "partition {{partition}}", "partition"),
            unit="cps",
        ),
        graph(
            "Entries, per second",
            "In: merged deltas that were folded, one for each series of a batch. Out: entries written to changelog and "
            "store; the lower, the more often a series repeats within a commit. Out at 0 while in is not: commits do "
            "not end.",
            [per_second(m.ENTRIES_FOLDED, "in: folded"), per_second(m.ENTRIES_COMMITTED, "out: committed")],
            unit="cps",
        ),
    ]


def _fresh() -> list[str | Panel]:
    return [
        "Fresh",
        graph(
            "Lag",
            "Records behind the end of the topic deltas, by partition; also of one whose worker is down, as servers see"
            " it. It grows: more workers, fewer partitions each; or repair the one that is down.",
            largest(m.LAG, "partition {{partition}}"),
            red=100_000,
            alert="PipelineLag",
        ),
        graph(
            "Staleness",
            "By server and partition. All partitions of all servers rise together: the broker is away. One partition on all "
            "servers: its worker. All partitions of one server: that server.",
            largest(m.STALENESS, "{{instance}} partition {{partition}}", "instance, partition"),
            unit="s",
            red=60,
            alert="PipelineStale",
        ),
        graph(
            "Retention margin",
            "Records between the start of the topic deltas and the first one that is not folded. It falls when "
            "retention deletes and folding does not keep up. Below 0 records are lost.",
            smallest(m.RETENTION_MARGIN, "partition {{partition}}"),
            alert="PipelineRetentionMargin",
            from_zero=False,
        ),
    ]


def _zero() -> list[str | Panel]:
    return [
        "What should be 0",
        graph(
            "Dead letters, per second",
            "Records written to the topic dead-letters, by partition. See Dead letters above.",
            per_second(m.DEAD_LETTERS, "partition {{partition}}", "partition"),
            unit="cps",
            alert="PipelineDeadLetters",
        ),
        graph(
            "Batches not counted, per second",
            "Duplicate: folded before; a publisher sent again because it had no answer, which is what makes sending "
            "again safe. Stale: of an old epoch of a producer. Groups refused: each is a dead letter, the rest of its "
            "batch was folded.",
            [
                per_second(m.BATCHES_DUPLICATE, "duplicate"),
                per_second(m.BATCHES_STALE, "stale"),
                per_second(m.GROUPS_REFUSED, "groups refused"),
            ],
            unit="cps",
        ),
        graph(
            "Unexpected errors, last hour",
            "Exceptions that nobody expected, by the thread that raised them. It went on, or the process was started "
            "again; either way it is a bug, or a machine that is short of something: the log has the traceback.",
            last_hour(m.THREAD_ERRORS, "{{instance}} {{thread}}", "instance, thread"),
            alert="PipelineUnexpectedErrors",
        ),
    ]


def _http() -> list[str | Panel]:
    quantile = f"sum by (le, path) (rate({of(m.REQUEST_SECONDS, suffix='_bucket')}[$__rate_interval]))"
    return [
        "HTTP",
        graph(
            "Requests, per second",
            "Requests to the servers, by path and status. 503: restoring, at a limit, or the broker is away; 4xx: what "
            "a client sent is wrong, and the answer says what.",
            per_second(m.REQUESTS, "{{status}} {{path}}", "path, status"),
            unit="reqps",
            alert="PipelineServerErrors",
        ),
        graph(
            "Latency p99",
            "Time to answer, by path. Reads that wait (after, max_staleness_ms) count with their waiting; POST waits "
            "for the broker. High on /v1/views/{view}: scans are too wide, or read_thread_count is too small.",
            Query(f"histogram_quantile(0.99, {quantile})", "{{path}}"),
            unit="s",
        ),
        graph(
            "Reads refused, per second",
            "Requests refused with 503 at a limit: connections_max (open requests) or reads_waiting_max (reads that "
            "wait or run). Start more servers, or raise the setting of that name if there is CPU.",
            per_second(m.READS_REFUSED, "{{limit}}", "limit"),
            unit="reqps",
            alert="PipelineServerErrors",
        ),
        graph(
            "Answers, per second",
            "Answers to scans, by how they were made: computed; joined, one computation for several reads; kept from an"
            " earlier read of the same commit; unchanged, a 304. Mostly computed: reads differ, or commits come faster "
            "than reads.",
            per_second(m.ANSWERS, "{{how}}", "how", always=True),
            unit="reqps",
        ),
        graph(
            "Memory of answers",
            "Answers that are kept for reads of the same commit, and those that clients read page by page, by server.",
            [
                largest(m.ANSWERS_KEPT, "kept {{instance}}", "instance"),
                largest(m.CURSOR_BYTES, "cursors {{instance}}", "instance"),
            ],
            unit="bytes",
        ),
        graph(
            "Cursors lost, per second",
            "Answers that clients read page by page and that were dropped before the last page: expired (not used for "
            "cursor_ttl_ms) or evicted (cursor_bytes_max). The client begins again.",
            per_second(m.CURSORS_LOST, "{{why}}", "why"),
            unit="cps",
        ),
        graph(
            "Open streams",
            "Streams of answers that clients have open, by server.",
            largest(m.STREAMS, "{{instance}}", "instance"),
            width=12,
        ),
        graph(
            "Streams ended, last hour",
            "Streams ended because their readers took nothing for stream_stalled_ms: clients that hang, or a slow network.",
            last_hour(m.STREAMS_STALLED, "{{instance}}", "instance"),
            width=12,
        ),
    ]


def _door() -> list[str | Panel]:
    return [
        "Who is kept out",
        graph(
            "Connections",
            "Open connections of each server, and the most that it takes: sockets_max, or half of the files that the "
            "process may open. At the most, those that have waited longest for their client make room.",
            [
                largest(m.CONNECTIONS, "{{instance}}", "instance"),
                largest(m.CONNECTIONS_MAX, "most {{instance}}", "instance"),
            ],
        ),
        graph(
            "Connections cut, per second",
            "Connections that a server closed, by the setting whose limit they had reached: clients that hang, a slow "
            "network, or an attack.",
            per_second(m.CONNECTIONS_CUT, "{{limit}}", "limit", always=True),
            unit="cps",
        ),
        graph(
            "Requests refused, per second",
            "Requests without the access token or the scope that they need, for a host that the server is not known as, "
            "from a page of another site, or while the bodies of others take all room (by setting).",
            [
                per_second(m.ACCESS_REFUSED, "token: {{reason}}", "reason", always=True),
                per_second(m.REQUESTS_REFUSED, "{{reason}}", "reason", always=True),
                per_second(m.BODIES_REFUSED, "{{limit}}", "limit", always=True),
            ],
            unit="reqps",
        ),
        graph(
            "Writes delayed, per second",
            "Writes that waited for their writer's turn, because much of what it wrote is not folded yet (fair_bytes_max).",
            per_second(m.WRITES_DELAYED, "{{instance}}", "instance"),
            unit="reqps",
            width=12,
        ),
        graph(
            "Files that could not be read, last hour",
            "Changes of the tokens_file or of the files of TLS that a server could not read: it goes by what it read "
            "before. Its log names the file.",
            [
                last_hour(m.TOKENS_UNREADABLE, "tokens", always=True),
                last_hour(m.TLS_UNREADABLE, "TLS", always=True),
            ],
            alert="PipelineTokensUnreadable",
            width=12,
        ),
    ]


def _processes() -> list[str | Panel]:
    ready = Query(of(m.READY), "{{instance}}")
    started = Query(ours(f"changes({of('process_start_time_seconds')}[1h])"), "{{instance}}")
    fds = f"{of('process_open_fds')} / {of('process_max_fds')}"
    return [
        "Processes",
        graph(
            "CPU",
            "Cores that each process uses. A worker at its limit while lag grows: give its partitions to more workers.",
            Query(ours(f"rate({of('process_cpu_seconds_total')}[$__rate_interval])"), "{{instance}}"),
        ),
        graph(
            "Memory",
            "Resident memory. Settings bound it: caches, overlays and write buffers (cache_bytes_max and "
            "overlay_bytes_max are for each partition, store_cache_bytes and store_write_buffer_bytes for all).",
            Query(ours(of("process_resident_memory_bytes")), "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "File descriptors",
            "Part of the allowed file descriptors that is open. Red: raise the limit (ulimit -n), or lower connections_max.",
            Query(ours(fds), "{{instance}}"),
            unit="percentunit",
            red=0.8,
        ),
        graph(
            "Ready",
            "1: the process has restored its state and works; 0: it does not yet, and /readyz says 503.",
            ready,
            alert="PipelineNotReady",
        ),
        graph(
            "Restarts, last hour",
            "Starts beyond the first. Again and again: exit code 3 with `fenced` means that two workers have the same "
            "`--name`, or the same partition in `--partitions`; with stacks in the log, that a partition stood still; "
            "else a commit failed.",
            started,
            alert="PipelineRestartLoop",
        ),
        graph(
            "Versions",
            "Processes by role, version, and whether the native core is in use. Two versions: an upgrade is under way.",
            Query(f"count by (role, version, native) ({of(m.INFO)})", "{{role}} {{version}}, native: {{native}}"),
        ),
    ]
