"""Agents of the user in a worker: the app that declares them, and the publisher that they record to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.faust.agents import AgentsApp
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.rocks import RocksStores
from pipeline.connect import log_writer
from pipeline.core.codec import DefinitionEntry, decode_definition
from pipeline.core.record import definitions_prefix, prefix_end
from pipeline.errors import BadRecord, Invalid, NotReady, PipelineError, StoreCorrupt, Unavailable, Unreadable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, Message, ReadableStore
from pipeline.publisher.client import BasePublisher
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings
from pipeline.topics import CHANGELOG
from pipeline.worker.changes import ChangeFeed
from pipeline.worker.partition import OwnedPartition

_BLOCK_MS = 1_000
"""Longest wait of a recording call: it blocks Faust's loop, which also takes part in rebalances."""
_STORE_BYTES = 4 * 2**20
"""Bytes of write buffers, and of cached blocks, of an agent's stores."""


def faust_app(*, on_error: str = "skip", **options: Any) -> AgentsApp:
    """An app for agents that `pipeline worker --name NAME -A MODULE:APP` runs: a `faust.App`.

        app = pipeline.faust_app()
        revenue = app.publisher.sum("revenue", labels=("region",))

        @app.agent(app.topic("orders", value_serializer="json"))
        async def record(orders):
            async for order in orders:
                revenue.add(order["amount"], region=order["region"])

    `app.publisher` is the worker's own: views can be declared when the module is imported, and agents record to them. The
    source offset of an event is committed only when what was recorded for it is acknowledged: every event is counted at
    least once. With `on_error="skip"` an event at which an agent raises is logged, counted in `pipeline_agent_errors_total`
    and done; with "stop" the worker ends with exit code 3 and the event is read again. `options` are settings of Faust;
    broker, id and all that membership needs are the worker's, and refused here.
    """
    return AgentsApp(AgentPublisher(), on_error=on_error, **options)


class _NoLog:
    """The log of a publisher before `bind`: every call is `Unavailable`."""

    def partition_count(self, topic: str) -> int:
        raise Unavailable("no worker runs this app")

    message_bytes_max = partition_count

    def topic_id(self, topic: str) -> str:
        raise Unavailable("no worker runs this app")

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        raise Unavailable("no worker runs this app")

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        return [Unavailable("no worker runs this app") for _ in messages]

    def close(self) -> None:
        pass


class AgentPublisher(BasePublisher):
    """A publisher whose views can be declared before it has a log. Recording is `Invalid` until then."""

    def __init__(self) -> None:
        self._bound = False
        super().__init__(_NoLog(), SystemClock(), PublisherSettings())

    def bind(self, url: str, settings: PublisherSettings, kafka: KafkaSettings, metrics: Metrics) -> None:
        """Publish to the log at `url` from now on. May be called once."""
        if self._bound:
            raise Invalid("this app was run by a worker before: an app runs once")
        self._settings = replace(settings, block_timeout_ms=min(settings.block_timeout_ms, _BLOCK_MS))
        self._writer, self._metrics = log_writer(url, self._settings, kafka), metrics
        self.start_clean()
        self._inherited, self._bound = False, True

    @property
    def pressed(self) -> bool:
        """Return whether over half of the buffer is in use while batches wait for their acknowledgement."""
        return self._runtime.is_short_of_memory

    def _opening(self) -> None:
        if not self._bound:
            raise Invalid("deltas can be recorded once `pipeline worker -A` runs this app: in an agent, timer or task")
        super()._opening()


class _GroupOffsets:
    """Progress of an agent, kept as committed offsets of a group without members."""

    def __init__(self, log: KafkaLog, agent: str) -> None:
        self._log = log
        self._group = f"{log.address.app}-changes-{agent}"

    def read(self) -> Mapping[int, int]:
        return self._log.committed_offsets(self._group, CHANGELOG)

    def write(self, next_offsets: Mapping[int, int]) -> None:
        self._log.commit_offsets(self._group, CHANGELOG, next_offsets)


class Feeds:
    """Feeds of changes for all agents that read them.

    `partitions` returns those that the worker folds now; `distrust` has a damaged store rebuilt.
    """

    def __init__(
        self,
        app: AgentsApp,
        *,
        log: KafkaLog,
        data: Path,
        log_settings: LogSettings,
        clock: Clock,
        partitions: Callable[[], Mapping[int, OwnedPartition]],
        distrust: Callable[[int, ReadableStore, StoreCorrupt], None],
        on_fatal: Callable[[BaseException], None],
        metrics: Metrics,
    ) -> None:
        self._partitions = partitions
        self._distrust = distrust
        self._stores: list[RocksStores] = []
        self._feeds: list[ChangeFeed] = []
        small = replace(log_settings, store_write_buffer_bytes=_STORE_BYTES, store_cache_bytes=_STORE_BYTES)
        for agent, channel in app.changes_read().items():
            stores = RocksStores(data / "changes" / re.sub(r"[^A-Za-z0-9._-]", "-", agent), small)
            self._stores.append(stores)
            feed = ChangeFeed(
                channel.view,
                log=log,
                stores=stores,
                clock=clock,
                progresses=_GroupOffsets(log, agent),
                definitions_of=partial(self._definitions_of, channel.view),
                deliver=channel.gate.offer,
                on_fatal=on_fatal,
                metrics=metrics,
            )
            self._feeds.append(feed)

    def _definitions_of(self, view: str, partition: int) -> list[DefinitionEntry]:
        found = self._partitions().get(partition)
        if found is None or not found.started:
            raise NotReady(f"partition {partition} is not restored yet")
        prefix, store = definitions_prefix(view), found.store
        try:
            return [decode_definition(value) for _, value in store.scan(prefix, prefix_end(prefix))]
        except BadRecord as error:
            self._distrust(partition, store, Unreadable(f"partition {partition}, view {view}: {error}", partition))
        except StoreCorrupt as error:
            self._distrust(partition, store, error)
        raise NotReady(f"partition {partition}: its store is damaged; it is rebuilt from the changelog")

    def start(self) -> None:
        """Start the threads; they follow nothing yet."""
        for feed in self._feeds:
            feed.start()

    def follow(self, partitions: frozenset[int]) -> None:
        """Follow these partitions from now on. Does not block."""
        for feed in self._feeds:
            feed.follow(partitions)

    def release(self, timeout_s: float) -> None:
        """Wait until no partition is followed, after `follow` with an empty set."""
        for feed in self._feeds:
            feed.release(timeout_s)

    def stop(self) -> bool:
        """Stop, and return whether that was done in time. May be called twice."""
        self.follow(frozenset())
        done = [feed.stop() for feed in self._feeds]
        if not all(done):
            return False
        for stores in self._stores:
            stores.close()
        return True


def check_topics_read(app: AgentsApp, log: KafkaLog) -> None:
    """Raise `Invalid` if an agent reads a topic that does not exist."""
    read = app.topics_read()
    for topic in log.missing([*read]):
        raise Invalid(f"agent {read[topic]} reads topic {topic}, which does not exist at {log.address.bootstrap}: create it")
