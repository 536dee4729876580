"""The broker's cleaner runs on a changelog, and what it leaves restores exactly, deletions included."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource

from pipeline import Publisher
from pipeline.core.record import TAG_PRODUCER, prefix_end
from pipeline.ports import Store
from tests.broker.inside import folding, serving, sums, wait_folded
from tests.broker.kafka import App, admin_client, create_topics
from tests.broker.log import Raw, raw_records
from tests.support import wait_until

PARTITIONS = 2
SMALL_SEGMENTS = {"segment.ms": "200", "segment.bytes": "1048576", "min.compaction.lag.ms": "3600000"}
"""Settings for many segments that are not cleaned yet, so that the test can tell what the cleaner removes."""
CLEANED_AT_ONCE = {
    "min.cleanable.dirty.ratio": "0.01",
    "min.compaction.lag.ms": "0",
    "max.compaction.lag.ms": "200",
    "delete.retention.ms": "100",
}
TTL_MS = 1_000
ROUNDS = 12
LATER = 20
"""Number of series that suffices for every partition to have some."""


def produced(stores: dict[int, Store]) -> set[bytes]:
    """Return the producers that stores remember."""
    return {key for store in stores.values() for key, _ in store.snapshot().scan(TAG_PRODUCER, prefix_end(TAG_PRODUCER))}


def alive(records: list[Raw]) -> dict[tuple[int, bytes], bytes | None]:
    """Return the newest value of each key."""
    return {(record.partition, record.key or b""): record.value for record in records}


def alter(bootstrap: str, topic: str, settings: dict[str, str]) -> None:
    """Set topic settings, by Kafka's names."""
    admin = admin_client(bootstrap)
    entries = [ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(30)


@pytest.mark.timeout(120)
def test_restore_from_a_compacted_changelog(app: App, tmp_path: Path) -> None:
    """Superseded entries and tombstones are gone from the topic; a fresh worker and server hold the right state."""
    create_topics(app.bootstrap, app.app, PARTITIONS, changelog=SMALL_SEGMENTS)
    expected: Counter[tuple[str, ...]] = Counter()
    settings: dict[str, Any] = {"producer_ttl_ms": TTL_MS, "closed_producer_ttl_ms": TTL_MS}

    def publish(number: int) -> None:
        with Publisher(app.url) as publisher:  # a producer for each round: all but the last are forgotten
            view = publisher.sum("sales", labels=("key",))
            for key in range(number % 3, 300, 3):
                view.add(number + 1, key=str(key))
                expected[str(key),] += number + 1

    with folding(app, tmp_path / "one", **settings) as worker:
        for number in range(ROUNDS):
            publish(number)
            wait_folded(worker)
        time.sleep(2 * TTL_MS / 1000)  # so long must a producer be silent
        publish(ROUNDS)
        wait_folded(worker)
        last_producers = produced({n: it.store for n, it in worker.partitions.items()})
        assert len(last_producers) == 1
        topic = app.topic("changelog")
        before = raw_records(app.bootstrap, topic)
        deleted = {place for place, value in alive(before).items() if value is None}
        assert len(deleted) >= ROUNDS, "tombstones of producers"

        newest = {(record.partition, record.key): record.offset for record in before}
        superseded = {record[:2] for record in before if newest[record.partition, record.key] > record.offset}
        gone_soon = superseded | {record[:2] for record in before if record.value is None}
        assert len(superseded) > 300
        alter(app.bootstrap, topic, CLEANED_AT_ONCE)

        def cleaned() -> bool:
            with Publisher(app.url) as publisher:  # the open segment is never cleaned: new records close it
                view = publisher.sum("later", labels=("key",))
                for key in range(LATER):
                    view.add(1, key=str(key))
            expected["later",] += 1
            time.sleep(0.25)
            return not gone_soon & {record[:2] for record in raw_records(app.bootstrap, topic)}

        wait_until(cleaned, "the cleaner", 60)
        wait_folded(worker)
    later = expected.pop(("later",))
    after = raw_records(app.bootstrap, topic)
    assert not {(record.partition, record.key) for record in after} & deleted, "of what was deleted nothing is left"
    right = dict(expected)
    # Else a follower that pauses would begin anew, and a server would not even start.
    alter(app.bootstrap, topic, {"delete.retention.ms": "86400000", "max.compaction.lag.ms": "9223372036854775807"})
    alter(app.bootstrap, topic, {"min.compaction.lag.ms": "600000"})
    with folding(app, tmp_path / "fresh", **settings) as worker, serving(app, tmp_path / "server") as server:
        for stores in ({n: it.store for n, it in worker.partitions.items()}, dict(server.stores())):
            assert sums(stores, "sales") == right
            assert sums(stores, "later") == {(str(key),): later for key in range(LATER)}
            assert not produced(stores) & {key for _, key in deleted}
        with Publisher(app.url) as publisher:
            publisher.sum("sales", labels=("key",)).add(5, key="0")
        right["0",] += 5
        wait_folded(worker)
        wait_until(lambda: sums(dict(server.stores()), "sales") == right, "a server that follows on")
