"""What the logs themselves say at the end: each batch is folded once, however often it is in the log."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from pipeline.core.codec import decode_batch, decode_folded
from pipeline.core.record import TAG_PRODUCER
from pipeline.topics import CHANGELOG, DELTAS
from tests.broker.drive import records
from tests.broker.kafka import App


class Audit(NamedTuple):
    """Records of deltas, and how many of them are copies of an earlier one; what is wrong."""

    record_count: int
    copy_count: int
    wrong: list[str]


def audit(app: App) -> Audit:
    """Compare the sequences in deltas with those that the last committed state of each partition says are folded."""
    sent: dict[tuple[int, str], set[int]] = defaultdict(set)
    count = copies = 0
    for record in records(app, DELTAS):
        batch = decode_batch(record.value())
        sequences = sent[record.partition(), batch.producer_id]
        count, copies = count + 1, copies + (batch.sequence in sequences)
        sequences.add(batch.sequence)
    folded = {}
    for record in records(app, CHANGELOG):
        key, value = record.key(), record.value()
        if key[:1] == TAG_PRODUCER and value is not None:
            folded[record.partition(), key[1:].decode()] = decode_folded(value)
    wrong = []
    for (partition, producer), sequences in sent.items():
        known = folded.get((partition, producer))
        if known is None:
            wrong.append(f"partition {partition}: nothing of producer {producer} is folded")
            continue
        missing = sorted(sequence for sequence in sequences if not known.has(sequence))
        if missing or known.beyond or known.next_sequence != max(sequences) + 1:
            wrong.append(f"partition {partition}, producer {producer}: {known} of {len(sequences)}, missing {missing[:5]}")
    wrong += [f"partition {it[0]}: folded of producer {it[1]}, which sent nothing" for it in folded.keys() - sent.keys()]
    return Audit(count, copies, wrong)
