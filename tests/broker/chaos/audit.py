"""Final checks of the logs themselves: each batch is folded once, however often it is in the log."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from confluent_kafka import Message

from pipeline.core.codec import DeadLetter, decode_folded, decode_letter, receive_batch
from pipeline.core.record import TAG_PRODUCER, Batch
from pipeline.errors import BadRecord
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.broker.drive import records
from tests.broker.kafka import App

SEQUENCE_MAX = 10_000_000
"""Sequence that nobody reaches in a drive: larger ones are refused."""


class Audit(NamedTuple):
    """Records of deltas, the number that copy an earlier one, and all faults found."""

    record_count: int
    copy_count: int
    wrong: list[str]


def letters(app: App) -> list[DeadLetter]:
    """Return all dead letters."""
    return [decode_letter(record.value()) for record in records(app, DEAD_LETTERS) if record.value() is not None]


def _batch(record: Message) -> Batch | None:
    """Return the batch of a record, also if some of its groups are refused; None if the record is refused as a whole."""
    try:
        batch = receive_batch(record.value() or b"").batch
    except BadRecord:
        return None
    refused = batch.partition != record.partition() or max(batch.sequence, batch.epoch) > SEQUENCE_MAX
    return None if refused else batch


def audit(app: App) -> Audit:
    """Compare the sequences in deltas with those that the last committed state of each partition says are folded."""
    sent: dict[tuple[int, str], set[int]] = defaultdict(set)
    count = copies = 0
    for record in records(app, DELTAS):
        batch = _batch(record)
        if batch is None:
            continue
        sequences = sent[record.partition(), batch.producer_id]
        count, copies = count + 1, copies + (batch.sequence in sequences)
        sequences.add(batch.sequence)
    folded = {}
    for record in records(app, CHANGELOG):
        key, value = record.key(), record.value()
        if key[:1] == TAG_PRODUCER:
            folded[record.partition(), key[1:]] = value
    wrong = []
    for (partition, producer), sequences in sent.items():
        value = folded.pop((partition, producer.encode()), None)
        known = None if value is None else decode_folded(value)
        if known is None:
            wrong.append(f"partition {partition}: nothing of producer {producer} is folded")
            continue
        missing = sorted(sequence for sequence in sequences if not known.has(sequence))
        if missing or known.beyond or known.next_sequence != max(sequences) + 1:
            wrong.append(f"partition {partition}, producer {producer}: {known} of {len(sequences)}, missing {missing[:5]}")
    strangers = [it for it, value in folded.items() if value]
    wrong += [f"partition {partition}: folded of producer {key!r}, which sent nothing" for partition, key in strangers]
    return Audit(count, copies, wrong)
