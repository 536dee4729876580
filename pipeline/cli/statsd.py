"""`pipeline ingest statsd`: sockets, mapping and publisher, joined, with a status line and a report at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import msgspec
from rich.progress import Progress, TextColumn

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader as Reader
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.cli import console
from pipeline.cli.server import HttpServer, bind, url_of
from pipeline.cli.signals import Stop, stopping_on_signals
from pipeline.config import Config
from pipeline.connect import Publisher
from pipeline.core.record import Definition
from pipeline.core.statsd import prometheus_name
from pipeline.errors import Invalid, NotReady, PipelineError, Unavailable
from pipeline.ingest.statsd import StatsdSink
from pipeline.ingest.statsd_server import StatsdServer
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.query.api import create_operations_app
from pipeline.threads import guarded

_log = logging.getLogger(__name__)
_SHOW_S = 0.2
_CONTACT_S = 2.0


class StatsdRequest(msgspec.Struct, frozen=True):
    """What the command line asks for."""

    url: str
    host: str
    port: int
    labels: Mapping[str, Sequence[str]]
    """By the metric's Prometheus name."""
    metrics_port: int | None
    as_json: bool


class Ready(msgspec.Struct):
    """The first line of `--json`."""

    host: str
    port: int
    to: str
    receive_buffer_bytes: int
    metrics_url: str | None = None


class StatsdReport(msgspec.Struct):
    """What became of a run: the last line of `--json`."""

    complete: bool
    """Whether everything that was recorded is acknowledged."""
    lines: int
    """That came in, those that were left out among them."""
    left_out: dict[str, int]
    """By reason."""
    deltas: int
    entries: int
    batches: int
    token: str
    seconds: float
    error: str | None = None


def parse_labels(pairs: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=A,B` as the labels of a metric, names and tags made Prometheus names."""
    labels: dict[str, list[str]] = {}
    for pair in pairs:
        source, equals, tags = pair.partition("=")
        name = prometheus_name(source.strip())
        found = [prometheus_name(tag.strip()) for tag in tags.split(",") if tag.strip()]
        if not equals or name is None or None in found:
            raise Invalid(f"--labels {pair:.100}: NAME=TAG,TAG is needed")
        if name in labels:
            raise Invalid(f"--labels {pair:.100}: the labels of {name} were given before")
        labels[name] = sorted({tag for tag in found if tag is not None})
    return labels


def run_statsd(request: StatsdRequest, config: Config) -> int:
    """Receive until SIGINT or SIGTERM, publish the rest, print what became of it; the exit code."""
    metrics: Metrics = NO_METRICS if request.metrics_port is None else PrometheusMetrics()
    with stopping_on_signals() as stop:
        settings = asdict(config.publisher) | asdict(config.kafka)
        if config.publisher.on_full == "block":  # who waits does not read, and nobody counts what the kernel drops then
            settings["on_full"] = "raise"
        publisher = Publisher(request.url, metrics=metrics, **settings)
        try:
            return _StatsdRun(request, config, publisher, metrics, stop).run()
        finally:
            with suppress(PipelineError):  # what is not acknowledged by now was reported
                publisher.close(timeout_s=0)


class _StatsdRun:
    def __init__(self, request: StatsdRequest, config: Config, publisher: Publisher, metrics: Metrics, stop: Stop) -> None:
        self._request = request
        self._publisher = publisher
        self._timeout_s = config.publisher.close_timeout_ms / 1000
        self._stop = stop
        self._clock = SystemClock()
        self._started_s = self._clock.monotonic_s()
        known = _known_views(request.url)
        self._sink = StatsdSink(publisher, self._clock, config.ingest, metrics, known=known, labels=request.labels)
        self._server = StatsdServer(request.host, request.port, config.ingest, self._sink, self._clock, metrics)
        try:
            self._operations = self._serve_operations(config, metrics)
        except BaseException:
            self._server.stop()
            raise
        wanted = config.ingest.ingest_receive_buffer_bytes
        self._granted = self._server.receive_buffer_bytes
        if self._granted < wanted:
            said = f"the kernel grants {self._granted:,} of {wanted:,} bytes for packets that wait (net.core.rmem_max)"
            console.err.print(said, markup=False, soft_wrap=True)

    def run(self) -> int:
        """Until a signal comes, or receiving fails."""
        self._announce()
        self._server.start()
        progress = Progress(
            TextColumn("{task.fields[lines]:,} lines, {task.fields[rate]:,.0f}/s, {task.fields[left_out]:,} left out"),
            console=console.err,
            disable=not console.err.is_terminal,
            transient=True,
        )
        with progress:
            task = progress.add_task("", lines=0, rate=0.0, left_out=0)
            lines, at_s = 0, self._started_s
            while not self._stop.wait(_SHOW_S) and not self._server.failed:
                now_s, count = self._clock.monotonic_s(), self._sink.line_count
                rate = (count - lines) / max(now_s - at_s, 0.001)
                lines, at_s = count, now_s
                progress.update(task, lines=count, rate=rate, left_out=self._sink.refused.total())
        drained = self._server.stop(self._timeout_s)
        failure, token = self._finish()
        if self._server.failed or not drained:
            failure = "receiving failed; what was recorded before is published" if failure is None else failure
        if self._operations is not None:
            self._operations.stop()
        return self._end(failure, token)

    def _finish(self) -> tuple[str | None, str]:
        """Publish all of it; what went wrong, and the token."""
        try:
            if not self._sink.close():
                self._publisher.flush(self._timeout_s)
                self._sink.close()
            return None, str(self._publisher.flush(self._timeout_s))
        except PipelineError as error:
            return f"not everything was published: {error}", ""

    def _announce(self) -> None:
        host, port = self._server.address
        url = None if self._operations is None else self._operations.url
        if self._request.as_json:
            console.print_json(Ready(host, port, self._request.url, self._granted, url))
        else:
            shown = f"[{host}]" if ":" in host else host
            more = f", metrics at {url}/metrics" if url else ""
            print(f"StatsD on {shown}:{port}, UDP and TCP, to {self._request.url}{more}  (Ctrl-C stops)", flush=True)

    def _end(self, failure: str | None, token: str) -> int:
        seconds = round(self._clock.monotonic_s() - self._started_s, 3)
        stats, sink = self._publisher.stats(), self._sink
        if failure is not None:
            console.print_error(failure)
        if self._request.as_json:
            counts = stats["deltas"], stats["entries"], stats["batches"]
            left_out = dict(sorted(sink.refused.items()))
            console.print_json(StatsdReport(failure is None, sink.line_count, left_out, *counts, token, seconds, failure))
        else:
            merged = f"{stats['deltas']:,} deltas in {stats['entries']:,} entries of {stats['batches']:,} batches"
            console.out.print(f"{sink.line_count:,} lines, {merged}, {seconds:.1f} s", soft_wrap=True)
            if sink.refused:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in sink.refused.most_common())
                console.out.print(f"left out {sink.refused.total():,}: {reasons}", markup=False, soft_wrap=True)
            if token:
                console.out.print(f"token {token}", markup=False, soft_wrap=True)
        return console.OK if failure is None else console.FAILED

    def _serve_operations(self, config: Config, metrics: Metrics) -> _Operations | None:
        if self._request.metrics_port is None or not isinstance(metrics, PrometheusMetrics):
            return None
        settings = replace(config.query, host=self._request.host, port=self._request.metrics_port)
        return _Operations(settings, metrics, self._clock, self._status)

    def _status(self) -> dict[str, Any]:
        sink = self._sink
        said = {"lines": sink.line_count, "left_out": dict(sink.refused), **self._publisher.stats()}
        return {"role": "ingest", "ready": True, "partition_count": 0, "partitions": [], **said}


class _Operations:
    """`/metrics` and its like, from a thread of their own."""

    def __init__(self, settings: Any, metrics: PrometheusMetrics, clock: SystemClock, status: Any) -> None:
        self._listener = bind(settings)
        self.url = url_of(self._listener)
        app = create_operations_app(settings, metrics, clock, status, lambda: True)
        self._server = HttpServer(app, self._listener, settings)
        self._thread = threading.Thread(
            target=guarded(_log, "pipeline-http", self._server.run, metrics), name="pipeline-http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.stop()
        self._thread.join(10.0)
        self._listener.close()


def _known_views(url: str) -> dict[str, Definition]:
    """The views that a server has, by name, if it can be asked now: lines are fitted to them."""
    if not url.startswith("http"):
        return {}
    try:
        with Reader(url, timeout_s=_CONTACT_S) as reader:
            found = reader.views()
    except (NotReady, Unavailable) as error:
        said = f"the server's views are not known ({error}): labels are those of --labels, or of the first line"
        console.err.print(console.printable(said), markup=False, soft_wrap=True)
        return {}
    return {
        view.name: Definition(view.name, view.kind, tuple(view.labels), view.window_s or 0, view.monotone) for view in found
    }
