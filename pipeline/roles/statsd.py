"""The StatsD gateway: sockets, the mapping of lines to views, a publisher, and `/metrics` beside them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.config import Config
from pipeline.connect import Publisher
from pipeline.core.answer import IngestStatus, Status
from pipeline.core.record import Definition
from pipeline.errors import Forbidden, Invalid, NotReady, PipelineError, Unavailable
from pipeline.ingest.statsd import StatsdSink
from pipeline.ingest.statsd_server import StatsdServer
from pipeline.metrics import NO_METRICS, READY, Metrics
from pipeline.query.api import create_operations_app
from pipeline.query.cross_origin import is_loopback
from pipeline.roles.http_server import HttpServer, bind, open_tls, url_of
from pipeline.roles.service import open_access
from pipeline.settings import ClientSettings, QuerySettings
from pipeline.threads import guarded

_log = logging.getLogger(__name__)
_CONTACT_S = 2.0


class StatsdGateway:
    """Receives StatsD lines on `host:port`, UDP and TCP, and publishes them to `url`.

    `labels` are the labels of a metric, by its Prometheus name; with a `metrics_port` there are `/metrics`, `/healthz`,
    `/readyz` and `/v1/status`. `warn` gets what a person should know before lines arrive.
    """

    def __init__(
        self,
        config: Config,
        url: str,
        host: str,
        port: int,
        *,
        labels: Mapping[str, Sequence[str]],
        metrics_port: int | None,
        warn: Callable[[str], None],
    ) -> None:
        metrics: Metrics = NO_METRICS if metrics_port is None else PrometheusMetrics()
        settings = asdict(config.publisher) | asdict(config.kafka) | asdict(config.client)
        if config.publisher.on_full == "block":  # a publisher that waits reads no packets, and nobody counts the lost ones
            settings["on_full"] = "raise"
        self.publisher = Publisher(url, metrics=metrics, **settings)
        self._timeout_s = config.publisher.close_timeout_ms / 1000
        self._operations: _Operations | None = None
        try:
            clock = SystemClock()
            known = _known_views(url, config.client, warn)
            self.sink = StatsdSink(self.publisher, clock, config.ingest, metrics, known=known, labels=labels)
            self._server = StatsdServer(host, port, config.ingest, self.sink, clock, metrics)
            try:
                if not (config.query.insecure or is_loopback(self.address[0])):
                    raise Invalid(
                        f"{host}:{port} can be reached from other machines, and StatsD has no way to say who sends: "
                        "use --host 127.0.0.1, or --insecure where the network lets no stranger in"
                    )
                if metrics_port is not None and isinstance(metrics, PrometheusMetrics):
                    query = replace(config.query, host=host, port=metrics_port)
                    self._operations = _Operations(query, metrics, clock, self._status)
            except BaseException:
                self._server.stop()
                raise
        except BaseException:
            self.close()
            raise
        wanted, granted = config.ingest.ingest_receive_buffer_bytes, self.receive_buffer_bytes
        if granted < wanted:
            warn(f"the kernel grants {granted:,} of {wanted:,} bytes for packets that wait (net.core.rmem_max)")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that lines are received on."""
        return self._server.address

    @property
    def receive_buffer_bytes(self) -> int:
        """Size of the UDP receive buffer that the kernel grants."""
        return self._server.receive_buffer_bytes

    @property
    def metrics_url(self) -> str | None:
        """URL of the server of `/metrics`."""
        return None if self._operations is None else self._operations.url

    @property
    def failed(self) -> bool:
        """Return whether receiving has failed."""
        return self._server.failed

    def start(self) -> None:
        """Begin to receive."""
        self._server.start()

    def stop(self) -> tuple[str | None, str]:
        """Receive no more, publish the rest; return what went wrong, or None, and the token of everything."""
        drained = self._server.stop(self._timeout_s)
        failure, token = self._publish_rest()
        if failure is None and (self.failed or not drained):
            failure = "receiving failed; what was recorded before is published"
        if self._operations is not None:
            self._operations.stop()
        return failure, token

    def _publish_rest(self) -> tuple[str | None, str]:
        try:
            if not self.sink.close():
                self.publisher.flush(self._timeout_s)
                self.sink.close()
            return None, str(self.publisher.flush(self._timeout_s))
        except PipelineError as error:
            return f"not everything was published: {error}", ""

    def close(self) -> None:
        """Close the publisher at once; `stop` has reported what is not acknowledged."""
        with suppress(PipelineError):
            self.publisher.close(timeout_s=0)

    def _status(self) -> IngestStatus:
        counts = {"lines": self.sink.line_count, "left_out": dict(self.sink.refused), **self.publisher.stats()}
        left_out = {"ingest_left_out": found} if (found := self.sink.left_out.status()) else {}
        status = {"role": "ingest", "ready": True, "partition_count": 0, "partitions": [], **counts, **left_out}
        return msgspec.convert(status, IngestStatus)


class _Operations:
    """The HTTP server of `/metrics` and `/v1/status`, in a thread of its own."""

    def __init__(
        self, settings: QuerySettings, metrics: PrometheusMetrics, clock: SystemClock, status: Callable[[], Status]
    ) -> None:
        access, tls = open_access(settings, metrics), open_tls(settings, metrics)
        metrics.show_info("ingest")
        metrics.set(READY, 1)
        self._listener = bind(settings)
        self.url = url_of(self._listener, settings)
        app = create_operations_app(settings, metrics, clock, status, lambda: True, access)
        self._server = HttpServer(app, self._listener, settings, metrics, tls)
        run = guarded(_log, "pipeline-http", self._server.run, metrics)
        self._thread = threading.Thread(target=run, name="pipeline-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.stop()
        self._thread.join(10.0)
        self._listener.close()


def _known_views(url: str, settings: ClientSettings, warn: Callable[[str], None]) -> dict[str, Definition]:
    """Return the views that a server has, by name, if it can be asked now: lines are fitted to them."""
    if not url.startswith("http"):
        return {}
    try:
        with HttpReader(url, timeout_s=_CONTACT_S, settings=settings) as reader:
            found = reader.views()
    except (NotReady, Unavailable, Forbidden) as error:
        warn(f"the server's views are not known ({error}): labels are those of --labels, or of the first line")
        return {}
    return {it.name: it.definition for it in reversed(found)}  # the definition that answers comes first
