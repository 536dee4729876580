"""`Publisher`, the public class that publishes to a URL.

Drivers load only for the kind of URL that needs them: an app that publishes over HTTP loads no RocksDB and no web framework.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.adapters.clock import SystemClock
from pipeline.core.token import Token
from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import LogWriter
from pipeline.publisher.client import BasePublisher, publisher_settings
from pipeline.publisher.environment import find_settings
from pipeline.publisher.fork import check_fork, drain_when_child_ends, is_prefork
from pipeline.secret import redacted_url
from pipeline.settings import ClientSettings, KafkaSettings, PublisherKeywords, PublisherSettings, held
from pipeline.threads import in_hub

if TYPE_CHECKING:
    from pipeline.adapters.bridge import Bridge, Collector
    from pipeline.adapters.registry import Registry, RegistryMetrics

_log = logging.getLogger(__name__)


def log_writer(
    url: str, settings: PublisherSettings, kafka: KafkaSettings, client: ClientSettings | None = None
) -> LogWriter:
    """Return the log that a publisher's batches go to.

    `kafka://host:port[,host:port...][/app]`, `http://host:port` (a server of this package), or `embedded:FOLDER` (a log in
    this process).
    """
    if not isinstance(url, str):
        raise Invalid(f"a URL is text, got {type(url).__name__}")
    scheme, _, rest = url.partition(":")
    if scheme in ("http", "https"):
        from pipeline.adapters.http import HttpLogWriter

        return HttpLogWriter(url, settings=client)
    if scheme == "embedded" and rest:
        from pipeline.adapters.shared_log import open_shared_log

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
    raise Invalid(
        f"unknown URL {redacted_url(url)!r:.200}; known: kafka://host:port[/app], http://host:port, embedded:FOLDER"
    )


def _taken(found: dict[str, Any], group: type[Any]) -> dict[str, Any]:
    """Take the settings of a group out of those that were found."""
    return {item.name: found.pop(item.name) for item in fields(group) if item.name in found}


def _metrics_in(registry: Registry, metrics: Metrics) -> RegistryMetrics:
    from pipeline.adapters.registry import RegistryMetrics

    if metrics is not NO_METRICS:
        raise Invalid("metrics and registry: only one of them can have the publisher's metrics")
    return RegistryMetrics(registry)


class Publisher(BasePublisher):
    """Publishes deltas from any thread, at about the cost of a dictionary update.

        with Publisher("http://localhost:8080") as pub:  # or "kafka://localhost:9092"
            revenue = pub.sum("revenue", labels=("region", "product"))
            revenue.add(12.5, region="eu", product="tea")
            cell = revenue.labels("eu", "tea")  # keep it: recording to it is the fast path
            cell.add(12.5)
            token = pub.flush()  # acknowledged: it survives kill -9 of the server

    `url` is `kafka://host:port[,host:port...][/app]` of brokers, `http://host:port` of a server, or
    `embedded:FOLDER`, a log in this process that `pipeline up --data FOLDER` folds. Keywords are the publisher and
    Kafka settings (`pipeline docs settings`); others are read from the environment (`PIPELINE_*`), then from
    `pipeline.toml`. `registry` is one of prometheus_client, which then shows the publisher's own metrics with a label
    `publisher` for each. Deltas since the last flush are lost if this process is killed; `close()`, leaving the `with`
    block, and the end of the interpreter flush them.

    Raises `Invalid` for a wrong URL or setting; `Unavailable` if an embedded log can't be opened. A server that does not
    answer is no error here: deltas wait for it.
    """

    def __init__(
        self,
        url: str,
        *,
        metrics: Metrics = NO_METRICS,
        registry: Registry | None = None,
        **settings: Unpack[PublisherKeywords],
    ) -> None:
        given = held(settings)
        del settings  # a traceback with local variables would show it
        connected = KafkaSettings if str(url).startswith("kafka:") else ClientSettings
        found = {**find_settings(given, (PublisherSettings, connected)), **given}
        kafka, client = KafkaSettings(**_taken(found, KafkaSettings)), ClientSettings(**_taken(found, ClientSettings))
        checked = publisher_settings(found)
        self._bridges: list[Bridge] = []
        self._shown = None if registry is None else _metrics_in(registry, metrics)
        try:
            super().__init__(log_writer(url, checked, kafka, client), SystemClock(), checked, self._shown or metrics)
        except BaseException:
            self._leave_registry()
            raise

    def _leave_registry(self) -> None:
        if self._shown is not None:
            self._shown.close()

    def bridge(
        self,
        registry: Collector | None = None,
        *,
        interval_ms: int = 1_000,
        gauges: bool = True,
        from_now: bool = False,
    ) -> Bridge:
        """Publish the metrics of a prometheus_client registry (None: the default one) from now on, in a thread.

        Counters, and the buckets, sums and counts of histograms and summaries, become monotone sums of the same names, to
        which every process adds its own counts since its start; with `from_now` only those from now on. Other samples are
        newest values, and those of different processes overwrite each other; without `gauges` they are left out. A forked
        child publishes its own counts since the fork.

        `close()` of the handle or of this publisher publishes the rest, as does the end of the interpreter. Names and labels
        that no view can have are left out, logged and counted. A second bridge of a registry is refused: it would count
        twice.
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
            may_run=not is_prefork(),
        )
        self._bridges.append(bridge)
        return bridge

    def close(self, timeout_s: float | None = None) -> Token:
        """See `BasePublisher.close`; bridges publish the rest before, in the same time."""
        check_fork()
        end_s = self._clock.monotonic_s() + (self._settings.close_timeout_ms / 1000 if timeout_s is None else timeout_s)

        def left_s() -> float:
            return max(0.0, end_s - self._clock.monotonic_s())

        if not self._runtime.in_own_thread and not in_hub():
            with self._runtime.locks_released():  # in a signal handler this thread can hold what a bridge's thread waits for
                for bridge in [*self._bridges]:
                    try:
                        bridge.close(left_s())
                    except Exception:  # the deltas must be flushed all the same
                        _log.exception("closing a bridge")
        try:
            return super().close(left_s() if self._bridges else timeout_s)
        finally:
            if self._closed:
                self._leave_registry()

    def start_clean(self) -> None:
        """See `BasePublisher.start_clean`; bridges go on in the child."""
        super().start_clean()
        for bridge in [*self._bridges]:
            bridge.start_clean()

    def wake(self) -> None:
        """See `BasePublisher.wake`; bridges begin too."""
        super().wake()
        for bridge in [*self._bridges]:
            bridge.wake()
