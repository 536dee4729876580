"""Reads what a topic of a broker holds, beside the code under test, and folds the batches in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from confluent_kafka import Consumer, TopicPartition

from pipeline.core.codec import decode_batch
from pipeline.core.record import parse_suffix
from pipeline.core.sequence import Folded

WAIT_S = 20.0


class Raw(NamedTuple):
    """One record."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


def raw_records(bootstrap: str, topic: str) -> list[Raw]:
    """Return all committed records that the topic holds now, partition by partition in their order."""
    options = {"bootstrap.servers": bootstrap, "group.id": "unused", "log_level": 0, "error_cb": lambda _: None}
    committed = {"isolation.level": "read_committed", "enable.partition.eof": True, "auto.offset.reset": "earliest"}
    consumer = Consumer({**options, **committed})
    try:
        partitions = consumer.list_topics(topic, timeout=WAIT_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        found: list[Raw] = []
        ended: set[int] = set()
        deadline_s = time.monotonic() + WAIT_S
        while len(ended) < len(partitions):
            assert time.monotonic() < deadline_s, f"no end of {topic} in {WAIT_S} s"
            for message in consumer.consume(10_000, 0.1):
                if message.error() is not None:
                    ended.add(message.partition())
                else:
                    found.append(Raw(message.partition(), message.offset(), message.key(), message.value()))
        return sorted(found, key=lambda record: record[:2])
    finally:
        consumer.close()


class Folding(NamedTuple):
    """Result of folding sum batches so that each sequence counts once."""

    totals: Counter[tuple[str, ...]]
    copies: Counter[tuple[str, int, int]]
    """Number of copies of each (producer, partition, sequence)."""
    in_order: bool
    """True if first copies stand in the order of sequences, within each producer and partition."""


def fold(records: Sequence[Raw]) -> Folding:
    """Fold records as a task does, with `core.sequence` as its memory."""
    memory: dict[tuple[str, int], Folded] = {}
    newest: dict[tuple[str, int], int] = {}
    totals: Counter[tuple[str, ...]] = Counter()
    copies: Counter[tuple[str, int, int]] = Counter()
    in_order = True
    for record in records:
        batch = decode_batch(record.value or b"")
        assert batch.partition == record.partition
        whose = (batch.producer_id, batch.partition)
        copies[*whose, batch.sequence] += 1
        folded = memory.get(whose, Folded())
        if folded.has(batch.sequence):
            continue
        in_order &= batch.sequence > newest.get(whose, -1)
        newest[whose] = batch.sequence
        memory[whose] = folded.with_folded(batch.sequence, batch.floor, batch.epoch, 0)
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                totals[group.definition.view, *parse_suffix(suffix)[1]] += state
    return Folding(totals, copies, in_order)
