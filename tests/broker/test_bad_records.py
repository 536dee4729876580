"""Bytes on `deltas` that are no batch: each goes to the dead letters, once, and harms no neighbour."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from confluent_kafka import Producer

import pipeline.metrics as m
from pipeline import Publisher
from pipeline.core.codec import VERSION, DeadLetter, decode_letter, encode_batch
from pipeline.core.record import Batch, Definition, Group, series_suffix
from pipeline.topics import load
from tests.broker.inside import Counted, folding, serving, sums, wait_folded
from tests.broker.kafka import App, create_topics
from tests.broker.log import raw_records

PARTITIONS = 2


def batch(partition: int, sequence: int, value: int = 1) -> bytes:
    """Return a good batch of one series."""
    group = Group(Definition("sales", "sum", ("key",)), [series_suffix(("a",))], [value])
    return encode_batch(Batch("p", 0, partition, sequence, 0, 0, [group]))


def sealed(rest: bytes) -> bytes:
    """Return any bytes with a right version and checksum in front."""
    return VERSION + int(google_crc32c.value(rest)).to_bytes(4, "big") + rest


def produce(app: App, values: list[tuple[int, bytes | None]], **options: Any) -> list[tuple[int, int]]:
    """Append values as they are, in order; return the partition and offset of each."""
    producer = Producer(
        {"bootstrap.servers": app.bootstrap, "enable.idempotence": True, "message.max.bytes": 20_000_000, **options}
    )
    places: list[tuple[int, int]] = []

    def delivered(error: object, message: Any) -> None:
        assert error is None, error
        places.append((message.partition(), message.offset()))

    for partition, value in values:
        producer.produce(app.topic("deltas"), value, partition=partition, on_delivery=delivered)
        assert producer.flush(30) == 0
    return places


def letters(app: App) -> list[DeadLetter]:
    """Return all dead letters, each of which must lie in its record's partition, under a key with its place and topic."""
    found = []
    topics = set()
    for record in raw_records(app.bootstrap, app.topic("dead-letters")):
        letter = decode_letter(record.value or b"")
        topic, _, place = (record.key or b"").partition(b".")
        topics.add(topic)
        assert place == b"%d-%d" % (letter.partition, letter.offset)
        assert record.partition == letter.partition
        found.append(letter)
    assert len(topics) <= 1
    return found


def bad_values() -> list[tuple[str, bytes | None]]:
    """Return bad values, each with a word of the reason that is expected."""
    rng = random.Random(11)
    good = batch(0, 0)
    return [
        ("version byte missing", None),
        ("version byte missing", b""),
        ("version byte ff", b"\xff" + good[1:]),
        ("version byte 01", b"\x01" + good[1:]),
        ("version byte 03", b"\x03" + good[1:]),
        ("batch", good[:-1]),
        ("batch", good[: len(good) // 2]),
        ("batch", good + b"\x00"),
        ("batch", VERSION),
        ("batch for partition 1", batch(1, 0)),
        ("version byte", b"\x00" + rng.randbytes(1_000_000)),
        ("batch", VERSION + rng.randbytes(1_000_000)),
        ("checksum", VERSION + bytes(4) + good[5:]),
        *[("", sealed(bytes(4) + rng.randbytes(rng.randrange(1, 200)))) for _ in range(50)],
    ]


def test_each_bad_record_is_a_dead_letter_once(app: App, tmp_path: Path) -> None:
    """A dead letter has reason, place and bytes; neighbours count; a worker that begins anew writes none again."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    bad = bad_values()
    values = [(0, batch(0, 0))]
    for number, (_, value) in enumerate(bad):
        values += [(0, value), (0, batch(0, number + 1))]  # type: ignore[list-item]
    values.append((1, batch(1, 0, 1_000)))
    places = produce(app, values)
    expected = {("a",): 1_000 + len(bad) + 1}
    with folding(app, tmp_path / "one") as worker:
        wait_folded(worker)
        assert isinstance(worker._metrics, Counted)
        assert worker._metrics.of(m.DEAD_LETTERS) == len(bad)
    found = letters(app)
    wanted = [(place, value) for place, (_, value) in zip(places[1::2], bad, strict=False)]
    assert [((letter.partition, letter.offset), letter.value) for letter in found] == wanted
    for letter, (reason, _) in zip(found, bad, strict=True):
        assert letter.reason
        assert reason in letter.reason
        assert letter.at_ms > 1_600_000_000_000
    for data in ("one", "two"):  # restarted, and restored from nothing but the changelog
        with folding(app, tmp_path / data) as worker:
            produce(app, [(0, batch(0, 0)), (1, b"junk")])  # a duplicate is no bad record
            wait_folded(worker)
            assert sums({n: it.store for n, it in worker.partitions.items()}, "sales") == expected
    assert letters(app)[: len(bad)] == found
    assert [letter.value for letter in letters(app)[len(bad) :]] == [b"junk"] * 2
    with serving(app, tmp_path / "server") as server:
        assert sums(server.stores(), "sales") == expected


def test_the_largest_record_fits(app: App, tmp_path: Path) -> None:
    """The largest record that the deltas topic takes, compressed or not, is kept whole as a dead letter."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    limit = load()["deltas"].kafka["max.message.bytes"]
    rng = random.Random(5)
    sizes = [limit - 200, 12_000_000]  # one as it is, one that lz4 makes small
    values = [rng.randbytes(sizes[0]), bytes(sizes[1])]
    produce(app, [(0, values[0])], **{"compression.type": "none"})
    produce(app, [(0, values[1])], **{"compression.type": "lz4"})
    with Publisher(app.url) as publisher:
        publisher.sum("sales", labels=("key",)).add(1, key="a")
    with folding(app, tmp_path / "one") as worker:
        wait_folded(worker)
    assert [letter.value for letter in letters(app)] == values


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_letter_that_is_too_large_goes_without_its_bytes(app: App, tmp_path: Path, size: int) -> None:
    """A letter beyond the topic's limit keeps its reason, which says so, without the bytes; a smaller one keeps them."""
    create_topics(app.bootstrap, app.app, PARTITIONS, dead_letters={"max.message.bytes": "50000"})
    rng = random.Random(3)
    large, small = rng.randbytes(size), rng.randbytes(40_000)
    places = produce(app, [(0, large), (0, small), (0, batch(0, 0))])
    with folding(app, tmp_path / "one") as worker:
        wait_folded(worker)
        assert sums({n: it.store for n, it in worker.partitions.items()}, "sales") == {("a",): 1}
    left, kept = letters(app)
    assert (left.partition, left.offset) == places[0]
    assert left.value is None
    assert "version byte" in left.reason
    assert f"left out: its {size} bytes" in left.reason
    assert kept.value == small
