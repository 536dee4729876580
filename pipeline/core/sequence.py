"""Exactly once between a publisher and a task: numbers of batches, and the memory of the numbers that were folded.

Sequences rise by one per producer and partition. The memory of a task is a *set*, not "the last one": when batch 5 fails
while batch 6 succeeds, the re-sent 5 is new and must be folded. The set stays small because every batch carries its
producer's `floor`, the lowest sequence that could still be sent: below it everything is settled. (The idea of an
acknowledgement of acknowledgements is QUIC's, RFC 9000 section 13.2.4.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

import msgspec

from pipeline.errors import BadRecord

GAP_COUNT_MAX = 1_000
"""Upper limit of gaps in one producer's folded sequences. A correct publisher has at most one per unacknowledged batch."""
SEQUENCE_STEP_MAX = 100_000
"""Number of batches that a producer may have given up, so that its sequences are ahead of its batches in the log."""
EPOCH_STEP_MAX = 1_000_000
"""Number of times that a spool may be opened between two batches for one partition."""

Counter = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Folded(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Sequences of one producer that a partition has folded: all below `next_sequence`, and `beyond`."""

    epoch: Counter = 0
    next_sequence: Counter = 0
    beyond: list[tuple[Counter, Counter]] = []
    """Half-open ranges above `next_sequence`, sorted, apart from each other and from `next_sequence`."""
    seen_at_ms: Counter = 0
    """Time of the producer's newest batch: when it was accepted or when it was folded, whichever is later."""
    seen_offset: Counter = 0
    """Offset of the producer's newest batch."""
    closed: bool = False
    """True if the producer has said that it sends nothing more."""

    def has(self, sequence: int) -> bool:
        """Return whether `sequence` was folded or is settled."""
        if sequence < self.next_sequence:
            return True
        i = bisect_right(self.beyond, (sequence, 2**63))
        return i > 0 and sequence < self.beyond[i - 1][1]

    @property
    def end(self) -> int:
        """Sequence behind the highest that was folded."""
        return self.beyond[-1][1] if self.beyond else self.next_sequence

    def is_step(self, sequence: int, offset: int) -> bool:
        """Return whether a correct publisher can have come to `sequence` at `offset` of the log.

        Each of a producer's batches is a record, so its sequences rise by no more than the offsets do, and by the batches
        that it gave up. In a topic that was made anew offsets begin again, and every sequence is possible.
        """
        return offset < self.seen_offset or sequence <= self.end + (offset - self.seen_offset) + SEQUENCE_STEP_MAX

    def check_step(self, sequence: int, epoch: int, offset: int) -> None:
        """Raise `BadRecord` if a known producer's batch is further ahead than a correct publisher can be."""
        if not self.is_step(sequence, offset):
            raise BadRecord(f"sequence {sequence} jumps: the producer's sequences end at {self.end}")
        if epoch > self.epoch + EPOCH_STEP_MAX:
            raise BadRecord(f"epoch {epoch} jumps: the producer's epoch is {self.epoch}")

    def still_closed(self, sequence: int, epoch: int) -> bool:
        """Return whether the producer stays closed after a batch that does not close it: one from before its last."""
        return self.closed and sequence < self.end and epoch <= self.epoch

    def with_folded(self, sequence: int, floor: int, epoch: int, seen_at_ms: int, seen_offset: int = 0) -> Folded:
        """Return this memory after folding a new `sequence`. Raises `BadRecord` if there would be too many gaps."""
        ranges = sorted([*self.beyond, (sequence, sequence + 1)])
        next_sequence = max(self.next_sequence, floor)
        beyond: list[tuple[int, int]] = []
        for start, end in ranges:
            if start <= next_sequence:
                next_sequence = max(next_sequence, end)
            elif beyond and start <= beyond[-1][1]:
                beyond[-1] = (beyond[-1][0], max(beyond[-1][1], end))
            else:
                beyond.append((start, end))
        if len(beyond) > GAP_COUNT_MAX:
            raise BadRecord(f"over {GAP_COUNT_MAX} gaps in the sequences of one producer")
        return Folded(max(self.epoch, epoch), next_sequence, beyond, max(self.seen_at_ms, seen_at_ms), seen_offset)


class Sealed(msgspec.Struct, frozen=True):
    """An encoded batch, which never changes and keeps its partition and sequence until it is acknowledged."""

    partition: int
    sequence: int
    value: bytes
    """Encoded batch; empty if the bytes are kept elsewhere (see `Outbox.drop_value`)."""
    entry_count: int


class Outbox:
    """A producer's sealed, unacknowledged batches. One thread at a time."""

    def __init__(self, producer_id: str, epoch: int) -> None:
        self.producer_id = producer_id
        self.epoch = epoch
        self.bytes_total = 0
        """Bytes of all sealed batches that are not acknowledged."""
        self._next: dict[int, int] = {}
        self._unacked: dict[int, dict[int, Sealed]] = {}

    @classmethod
    def restored(cls, producer_id: str, epoch: int, next_sequences: Mapping[int, int], batches: Iterable[Sealed]) -> Outbox:
        """Return the outbox of a producer that has unacknowledged `batches` from before, in the order of sequences."""
        outbox = cls(producer_id, epoch)
        outbox._next = dict(next_sequences)
        for sealed in batches:
            if sealed.sequence >= outbox._next.get(sealed.partition, 0):
                raise AssertionError(f"sequence {sealed.sequence} of partition {sealed.partition} is still to come")
            outbox._unacked.setdefault(sealed.partition, {})[sealed.sequence] = sealed
            outbox.bytes_total += len(sealed.value)
        return outbox

    def __len__(self) -> int:
        return sum(map(len, self._unacked.values()))

    def next_numbers(self, partition: int) -> tuple[int, int]:
        """Return `(sequence, floor)` for the next batch for `partition`; `add` uses the sequence up."""
        sequence = self._next.get(partition, 0)
        return sequence, min(self._unacked.get(partition, ()), default=sequence)

    def add(self, sealed: Sealed) -> None:
        """Keep a batch that was sealed with `next_numbers`, until `acknowledge`."""
        if sealed.sequence != self._next.get(sealed.partition, 0):
            raise AssertionError(f"sequence {sealed.sequence} sealed out of order")
        self._next[sealed.partition] = sealed.sequence + 1
        self._unacked.setdefault(sealed.partition, {})[sealed.sequence] = sealed
        self.bytes_total += len(sealed.value)

    def acknowledge(self, partition: int, sequence: int) -> Sealed | None:
        """Forget and return a batch that the log has accepted, or never will; None if it was forgotten before."""
        sealed = self._unacked.get(partition, {}).pop(sequence, None)
        if sealed is not None:
            self.bytes_total -= len(sealed.value)
        return sealed

    def drop_value(self, partition: int, sequence: int) -> Sealed | None:
        """Empty the value of a batch whose bytes are kept elsewhere; return the batch as it was, None if there is none."""
        batches = self._unacked.get(partition, {})
        sealed = batches.get(sequence)
        if sealed is None or not sealed.value:
            return None
        batches[sequence] = Sealed(partition, sequence, b"", sealed.entry_count)
        self.bytes_total -= len(sealed.value)
        return sealed

    def next_sequences(self) -> dict[int, int]:
        """Return, by partition, the sequence behind every batch that was sealed so far."""
        return dict(self._next)

    def settled(self, next_sequences: Mapping[int, int]) -> bool:
        """Return whether every batch below these sequences was acknowledged or given up."""
        return all(min(self._unacked.get(p, ()), default=n) >= n for p, n in next_sequences.items())

    def pending(self) -> Iterator[Sealed]:
        """Yield all unacknowledged batches, each partition's in the order of its sequences."""
        for sealed in [*self._unacked.values()]:
            yield from [*sealed.values()]
