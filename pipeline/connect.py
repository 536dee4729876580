"""The public classes that take a URL: `Publisher` and `Reader`.

Drivers load only for the kind of URL that needs them, so that an app which publishes over HTTP loads neither RocksDB nor
a web framework.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpLogWriter, HttpReader
from pipeline.core.token import Token
from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import LogWriter
from pipeline.producer.client import BasePublisher, publisher_settings
from pipeline.producer.process import drain_when_child_ends
from pipeline.settings import KafkaSettings, PublisherSettings

if TYPE_CHECKING:
    from pipeline.adapters.bridge import Bridge, Collector

Reader = HttpReader
_log = logging.getLogger(__name__)


def log_writer(url: str, settings: PublisherSettings, kafka: KafkaSettings) -> LogWriter:
    """Where a publisher's batches go.

    `kafka://host:port[,host:port...][/app]`, `http://host:port` (a server of this package), or `embedded:FOLDER` (a log in
    this process).
    """
    if not isinstance(url, str):
        raise Invalid(f"a URL is text, got {type(url).__name__}")
    scheme, _, rest = url.partition(":")
    if scheme in ("http", "https"):
        return HttpLogWriter(url)
    if scheme == "embedded" and rest:
        from pipeline.engine import open_shared_log

        return open_shared_log(rest)
    if scheme == "kafka":
        import pipeline.adapters.kafka.options as options
        from pipeline.adapters.kafka.writer import KafkaLogWriter

        return KafkaLogWriter(
            options.parse_url(url),
            kafka.kafka,
            SystemClock(),
            timeout_ms=settings.request_timeout_ms,
            metadata_refresh_ms=kafka.metadata_refresh_ms,
        )
    raise Invalid(f"unknown URL {url!r:.200}; known: kafka://host:port[/app], http://host:port, embedded:FOLDER")


class Publisher(BasePublisher):
    """Publishes deltas from any thread, at about the cost of a dictionary update.

        with Publisher("http://localhost:8080") as pub:  # or "kafka://localhost:9092"
            revenue = pub.sum("revenue", labels=("region", "product"))
            revenue.add(12.5, region="eu", product="tea")
            cell = revenue.labels("eu", "tea")  # keep it: recording to it is the fast path
            cell.add(12.5)
            token = pub.flush()  # acknowledged: it survives kill -9 of the server

    `url` is `kafka://host:port[,host:port...][/app]` of brokers, `http://host:port` of a server, or `embedded:FOLDER`, a log
    in this process that `pipeline up --data FOLDER` folds. Keywords are the publisher and Kafka settings (README). What was
    recorded since the last flush is lost if this process is killed; `close()`, leaving the `with` block, and the end of the
    interpreter flush it.

    Raises `Invalid` for a wrong URL or setting; `Unavailable` if an embedded log can't be opened. A server that is away
    is no error here: deltas wait for it.
    """

    def __init__(self, url: str, *, metrics: Metrics = NO_METRICS, **settings: Any) -> None:
        known = {item.name for item in fields(KafkaSettings)}
        kafka = KafkaSettings(**{name: value for name, value in settings.items() if name in known})
        checked = publisher_settings({name: value for name, value in settings.items() if name not in known})
        self._bridges: list[Bridge] = []
        super().__init__(log_writer(url, checked, kafka), SystemClock(), checked, metrics)

    def bridge(
        self,
        registry: Collector | None = None,
        *,
        interval_ms: int = 1_000,
        gauges: bool = True,
        from_now: bool = False,
    ) -> Bridge:
        """Publish what a prometheus_client registry (None: the default one) counts, from now on, in a thread.

        Counters, and the buckets, sums and counts of histograms and summaries, become monotone sums of the same names, to
        which every process adds what it counted itself, everything since it started included; with `from_now`, only what it
        counts from now on. Other samples are newest values, each process' own overwriting the others'; without `gauges`
        they are left out. A forked child publishes what it counts itself: what was counted before the fork is its parent's.

        `close()` of the handle, or of this publisher, publishes the rest; so does the end of the interpreter. Names and
        labels that no view can have are left out, logged and counted. A second bridge of a registry is refused: it would
        count twice.
        """
        from pipeline.adapters.bridge import Bridge, default_registry

        if self._closing:
            raise Invalid("this publisher is closed")
        registry = default_registry() if registry is None else registry
        if not from_now and any(bridge.registry is registry for bridge in self._bridges):
            raise Invalid("this registry was bridged before, which would count it twice; from_now=True counts on")
        bridge = Bridge(
            self,
            registry,
            clock=self._clock,
            interval_ms=interval_ms,
            gauges=gauges,
            from_now=from_now,
            metrics=self._metrics,
            drain_when_child_ends=drain_when_child_ends,
        )
        self._bridges.append(bridge)
        return bridge

    def close(self, timeout_s: float | None = None) -> Token:
        """As of `BasePublisher`; what bridges have still to publish goes first."""
        if not self._running.in_own_thread:
            with self._running.locks_released():  # in a signal handler this thread can hold what a bridge's thread waits for
                for bridge in [*self._bridges]:
                    try:
                        bridge.close()
                    except Exception:  # what was recorded must be flushed all the same
                        _log.exception("closing a bridge")
        return super().close(timeout_s)

    def start_clean(self) -> None:
        """As of `BasePublisher`; bridges go on in the child."""
        super().start_clean()
        for bridge in [*self._bridges]:
            bridge.start_clean()
