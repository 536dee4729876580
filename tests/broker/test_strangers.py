"""Foreign records in a changelog of a real broker are repaired by an idle owner, and not adopted by a new one."""

from __future__ import annotations

from pathlib import Path

import pytest
from confluent_kafka import Producer

from pipeline import Publisher
from pipeline.core.record import TAG_SERIES
from pipeline.errors import RecordsLost
from tests.broker.inside import folding, serving, sums, wait_folded
from tests.broker.kafka import App, create_topics
from tests.broker.log import Raw, raw_records
from tests.broker.test_compaction import CLEANED_AT_ONCE, SMALL_SEGMENTS, alter
from tests.support import wait_until


def write(app: App, key: bytes, value: bytes | None) -> None:
    """Write a record to the changelog as a stranger does."""
    producer = Producer({"bootstrap.servers": app.bootstrap, "log_level": 0})
    producer.produce(app.topic("changelog"), value, key, partition=0)
    assert producer.flush(30) == 0


def entries(app: App) -> dict[bytes | None, Raw]:
    """Return the newest record of each key."""
    return {record.key: record for record in raw_records(app.bootstrap, app.topic("changelog"))}


def series(app: App) -> bytes:
    return next(key for key in entries(app) if key is not None and key.startswith(TAG_SERIES))


@pytest.mark.long
@pytest.mark.timeout(120)
def test_what_a_stranger_covers_up(app: App, tmp_path: Path) -> None:
    """An idle owner writes its entries over a stranger's; without one, a worker whose disk can't tell them waits."""
    create_topics(app.bootstrap, app.app, 1, changelog=SMALL_SEGMENTS)
    with folding(app, tmp_path / "one") as worker:
        with Publisher(app.url) as publisher:
            publisher.sum("sales").add(7)
        wait_folded(worker)
        key = series(app)
        ours = entries(app)[key].value
        write(app, key, None)
        wait_until(lambda: entries(app)[key].value == ours, "the repair")
    write(app, key, b"noise")
    alter(app.bootstrap, app.topic("changelog"), CLEANED_AT_ONCE)

    def cleaned() -> bool:
        write(app, b"k", b"")  # the open segment is never cleaned: new records close it
        return all(
            record.key != key or record.value == b"noise" for record in raw_records(app.bootstrap, app.topic("changelog"))
        )

    wait_until(cleaned, "the cleaner", 60)
    kept = {"delete.retention.ms": "86400000", "max.compaction.lag.ms": "9223372036854775807"}
    alter(app.bootstrap, app.topic("changelog"), kept)
    with pytest.raises(RecordsLost, match=r"written over 1 entries \(view sales\)"), folding(app, tmp_path / "empty"):
        pass
    assert entries(app)[key].value == b"noise"
    with folding(app, tmp_path / "one") as worker:
        wait_until(lambda: entries(app)[key].value == ours, "the repair by the disk that has it")
        assert sums({0: worker.partitions[0].store}, "sales") == {(): 7}
    alter(app.bootstrap, app.topic("changelog"), {"min.compaction.lag.ms": "600000"})  # else no server starts
    with folding(app, tmp_path / "empty"), serving(app, tmp_path / "server") as server:
        assert sums(dict(server.stores()), "sales") == {(): 7}
