"""A real worker partition on the embedded log and a RocksDB store, driven by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.adapters.rocks import RocksStores
from pipeline.core.codec import decode_states, encode_batch
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    STORE_META_KEY,
    Batch,
    Definition,
    Group,
    parse_suffix,
    prefix_end,
    series_prefix,
    series_suffix,
)
from pipeline.ports import Log, Message
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic
from pipeline.worker.partition import OwnedPartition
from tests.contracts.support import DAY_MS, DEADLINE_S, EmbeddedLab, appended

WORKER_TOPICS = {
    DELTAS: Topic(DELTAS, 1, "delete", retention_ms=7 * DAY_MS),
    CHANGELOG: Topic(CHANGELOG, 1, "compact", delete_retention_ms=DAY_MS, min_cleanable_dirty_ratio=0.3),
    DEAD_LETTERS: Topic(DEAD_LETTERS, 1, "delete"),
}
VIEW = Definition("clicks", "sum", ("page",))


def publish(log: Log, first_sequence: int, batches: Sequence[Mapping[str, int]]) -> None:
    """Append batches of {page: clicks}, sealed under the sequences from `first_sequence` on."""
    messages = []
    for sequence, deltas in enumerate(batches, start=first_sequence):
        group = Group(VIEW, [series_suffix((page,)) for page in deltas], [*deltas.values()])
        batch = Batch("producer", 0, 0, sequence, 0, 0, [group])
        messages.append(Message(DELTAS, 0, None, encode_batch(batch)))
    appended(log, messages)


def new_partition(lab: EmbeddedLab, stores: RocksStores) -> OwnedPartition:
    """Return the partition, taken over and restored."""
    partition = OwnedPartition(
        0,
        log=lab.log,
        stores=stores,
        clock=lab.clock,
        settings=WorkerSettings(restore_fetch_count_max=37, restore_buffer_entries_max=50),
        delete_retention_ms=DAY_MS,
    )
    partition.start()
    return partition


def fold_all(partition: OwnedPartition, lab: EmbeddedLab, *, record_count_max: int = 1) -> None:
    """Fold and commit, so many records at a time, until nothing is left."""
    reader = lab.log.reader(DELTAS)
    reader.assign({0: partition.task.next_offset})
    while partition.task.next_offset < lab.log.watermarks(DELTAS, 0).end_offset:
        for records in reader.poll(record_count_max=record_count_max, bytes_max=2**20, timeout_s=DEADLINE_S):
            partition.fold(records)
        partition.commit()


def entries(partition: OwnedPartition) -> dict[bytes, bytes]:
    """Return all entries of the partition's store, without those about the store itself."""
    return {key: value for key, value in partition.store.scan(b"", b"\xff\xff") if key != STORE_META_KEY}


def answer(partition: OwnedPartition) -> dict[str, int]:
    """Return the answer of the view."""
    prefix = series_prefix(VIEW)
    found = [*partition.store.scan(prefix, prefix_end(prefix))]
    states = decode_states(KINDS[VIEW.kind], [value for _, value in found])
    return {parse_suffix(key.removeprefix(prefix))[1][0]: state for (key, _), state in zip(found, states, strict=True)}
