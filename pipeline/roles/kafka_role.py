"""Base of the roles on Kafka: a data directory, stores and a connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.kafka.checks import check_changelog, check_topics
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.rocks import RocksStores
from pipeline.errors import Invalid
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.restore import check_format

TOPICS = (DELTAS, CHANGELOG, DEAD_LETTERS)


def check_partitions(numbers: Iterable[int], partition_count: int) -> None:
    """Raise `Invalid` unless the topic of deltas has all these partitions."""
    if unknown := [number for number in sorted(numbers) if not 0 <= number < partition_count]:
        raise Invalid(f"there is no partition {unknown[0]}; topic deltas has {partition_count}")


class KafkaRole:
    """A data directory, stores and a connection to the log. `on_fatal` is called at most once."""

    def __init__(
        self,
        url: str,
        log_settings: LogSettings,
        kafka_settings: KafkaSettings,
        publisher_settings: PublisherSettings,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.clock = SystemClock()
        self._on_fatal = on_fatal
        self._fatal_once = threading.Lock()
        address = parse_url(url)
        self._data = DataDir(log_settings.data, with_log=False, app=address.app)
        try:
            self.log = KafkaLog(
                address, kafka_settings, self.clock, request_timeout_ms=publisher_settings.request_timeout_ms
            )
            self.partition_count = check_topics(self.log, TOPICS)
            self._delete_retention_ms = check_changelog(self.log, topics.load()[CHANGELOG])
            check_format(self.log)
            self._stores = RocksStores(self._data.stores, log_settings, count=self.partition_count)
        except BaseException:
            self._data.close()
            raise

    def _fail(self, error: BaseException) -> None:
        if self._fatal_once.acquire(blocking=False):
            self._on_fatal(error)

    def _close(self) -> None:
        self._stores.close()
        self._data.close()
