"""The public classes that take a URL: `Publisher` and `Reader`.

Drivers load only for the kind of URL that needs them, so that an app which publishes over HTTP loads neither RocksDB nor
a web framework.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpLogWriter, HttpReader
from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import LogWriter
from pipeline.producer.client import BasePublisher, publisher_settings
from pipeline.settings import KafkaSettings, PublisherSettings

Reader = HttpReader


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
        super().__init__(log_writer(url, checked, kafka), SystemClock(), checked, metrics)
