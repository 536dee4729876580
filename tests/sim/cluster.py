"""The log itself: what survives every process, what a reader may see of it, and what can happen to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING

from pipeline.adapters.memory import MemoryLog
from pipeline.ports import Message, Watermarks
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.sim.auditor import Auditor
from tests.sim.clocks import NodeClock, TrueTime
from tests.sim.entries import POSITION, Failure

if TYPE_CHECKING:
    from tests.sim.faults import FaultyTransaction

_WAITS_MAX = 10_000
At = tuple[str, int]
"""A topic and a partition of it."""


class Pin:
    """A foreign transaction that stays open: nobody reads beyond its first record until it ends."""

    def __init__(self, offset: int, patience: int) -> None:
        self.offset = offset
        self.patience = patience
        """Number of times that a reader may wait in vain before the broker aborts the transaction."""


class Cluster:
    """The log, and the owner of each transactional id."""

    def __init__(self, topics: Mapping[str, int], true_time: TrueTime, clock: NodeClock, auditor: Auditor) -> None:
        self.memory = MemoryLog(topics, self._now_ms, log_id="sim")
        self.auditor = auditor
        self.clock = clock
        """Clock that stamps the records of publishers."""
        self.owners: dict[str, FaultyTransaction] = {}
        self.safe_offsets = dict.fromkeys(range(topics[DELTAS]), 0)
        """Offset below which each partition was read or acknowledged: no crash may take that back."""
        self.pins: dict[At, Pin] = {}
        self.ends: list[list[int]] = [[0] for _ in range(topics[DELTAS])]
        """Earlier ends of each partition's changelog, newest last."""
        self._epochs: list[list[tuple[int, int]]] = [[(0, 0)] for _ in range(topics[DELTAS])]
        """Offset at which each leader epoch of a partition of deltas begins: a log that loses its tail gets a new leader."""
        self.superseding = [0] * topics[DELTAS]
        """Offset, by changelog partition, behind the last record in favour of which compaction has removed an older one."""
        self.cuts: list[list[tuple[bytes, int]]] = [[(b"", 0)] for _ in range(topics[DELTAS])]
        """Position records of the newest commits of each partition, and where the changelog ended behind them."""
        self.forged: list[set[int]] = [set() for _ in range(topics[DELTAS])]
        """Offsets of changelog records that no worker wrote."""
        self.foreign = [False] * topics[DELTAS]
        """True for a partition to whose changelog somebody other than a worker has written."""
        self.markers_missing: dict[int, int] = {}
        """By changelog partition without the marker of an acknowledged commit, where the first such commit begins."""
        self._waited_count = 0
        self.letters_missing: dict[int, int] = {}
        """By partition with dead letters that lack their marker, where the first of them stands."""
        self.undone: set[int] = set()
        """Partitions in which the broker has aborted commits that it had acknowledged."""
        self._true_time = true_time
        self._stamping = False

    def _now_ms(self) -> int:
        return self.clock.now_ms() if self._stamping else self._true_time.at_ms

    def deliver(self, message: Message) -> int:
        """Append one record to the topic of deltas, and return its offset."""
        at = self.memory.partition(DELTAS, message.partition)
        at.at_ms = min(at.at_ms, self.clock.now_ms())  # a broker whose clock is set back stamps what comes next so
        self._stamping = True
        (result,) = self.memory.append([message], timeout_s=0)
        self._stamping = False
        assert isinstance(result, int)
        self.auditor.appended(message.partition, at.rows[-1].at_ms, message.value)
        return result - 1

    def skip(self, topic: str, partition: int) -> None:
        """Use up an offset without a record."""
        self.memory.skip(topic, partition)
        if topic == DELTAS:
            self.auditor.skipped(partition)

    def committed(self, partition: int, position: bytes) -> None:
        """Note that a transaction with this position record went through."""
        end_offset = self.memory.watermarks(CHANGELOG, partition).end_offset
        self.ends[partition].append(end_offset)
        self.cuts[partition].append((position, end_offset))
        del self.ends[partition][:-6], self.cuts[partition][:-6]

    def markers_written(self, partition: int, *, in_letters: bool) -> None:
        """Note the markers of a transaction, which stand for those that are missing before them in the same topic, too."""
        self.markers_missing.pop(partition, None)
        if in_letters:
            self.letters_missing.pop(partition, None)

    def leave_out_marker(self, partition: int, entry_count: int, letter_count: int) -> None:
        """Take back the markers of the newest commit, as a broker does that was fenced at the wrong time."""
        at = self.memory.partition(CHANGELOG, partition)
        at.end_offset -= 1
        at.markers.remove(at.end_offset)
        self.markers_missing.setdefault(partition, at.end_offset - entry_count)
        letters = self.memory.partition(DEAD_LETTERS, partition)
        if letter_count:
            self.letters_missing.setdefault(partition, letters.end_offset - letter_count - self.memory.marker_count)

    def abort_with_unmarked(self, partition: int, count: int, *, in_letters: bool) -> None:
        """Abort a transaction of `count` entries, and with it what stands before it in its topics without a marker."""
        begin = self.markers_missing.pop(partition)
        at = self.memory.partition(CHANGELOG, partition)
        self.memory.skip(CHANGELOG, partition, count + 1)
        at.rows = [row for row in at.rows if row.offset < begin or row.offset in self.forged[partition]]
        at.markers.update(range(begin, at.end_offset))
        letters = self.memory.partition(DEAD_LETTERS, partition)
        if in_letters and (first := self.letters_missing.pop(partition, None)) is not None:
            letters.rows = [row for row in letters.rows if row.offset < first]
        self.cuts[partition] = [cut for cut in self.cuts[partition] if cut[1] <= begin]
        self.ends[partition] = [end for end in self.ends[partition] if end <= begin]
        ours = (row.value for row in reversed(at.rows) if row.key == POSITION and row.offset not in self.forged[partition])
        self.undone.add(partition)
        self.auditor.rewound(partition, next(ours, None) or b"")

    def forge(self, partition: int, key: bytes | None, value: bytes | None) -> None:
        """Append a record to the changelog that no worker wrote."""
        (next_offset,) = self.memory.append([Message(CHANGELOG, partition, key, value)], timeout_s=0)
        assert isinstance(next_offset, int)
        self.forged[partition].add(next_offset - 1)
        self.foreign[partition] = True

    def cut(self, topic: str, partition: int, end_offset: int) -> None:
        """Lose the tail of a log, even if readers or publishers were told that it is safe."""
        self.pins.pop((topic, partition), None)
        self._end_at(topic, partition, end_offset)
        if topic == DELTAS:
            self.safe_offsets[partition] = min(self.safe_offsets[partition], end_offset)
        else:
            self.ends[partition] = [end_offset]
            self.cuts[partition] = [cut for cut in self.cuts[partition] if cut[1] <= end_offset]

    def _end_at(self, topic: str, partition: int, end_offset: int) -> None:
        at = self.memory.partition(topic, partition)
        at.rows = [row for row in at.rows if row.offset < end_offset]
        at.markers = {offset for offset in at.markers if offset < end_offset}
        at.end_offset = end_offset
        if topic == CHANGELOG and self.markers_missing.get(partition, -1) >= end_offset:
            del self.markers_missing[partition]
        if topic == DELTAS:
            epochs = self._epochs[partition]
            epochs[:] = [*(it for it in epochs if it[0] < end_offset), (end_offset, epochs[-1][1] + 1)]

    def leader_epoch(self, partition: int, offset: int) -> int:
        """Return the epoch of the leader that accepted a record of deltas."""
        return max(epoch for start, epoch in self._epochs[partition] if start <= offset)

    def is_gone(self, partition: int, next_offset: int, leader_epoch: int) -> bool:
        """Return whether the record below an offset, which had this leader epoch, has been lost."""
        later = [start for start, epoch in self._epochs[partition] if epoch > leader_epoch]
        return leader_epoch >= 0 and bool(later) and next_offset > min(later)

    # Foreign transactions

    def pin(self, topic: str, partition: int, patience: int) -> None:
        """Begin a foreign transaction with a record that will never be committed."""
        if (topic, partition) not in self.pins:
            self.pins[topic, partition] = Pin(self.memory.watermarks(topic, partition).end_offset, patience)
            self.skip(topic, partition)
            if topic == CHANGELOG:
                self.foreign[partition] = True

    def unpin(self, topic: str, partition: int) -> None:
        """Abort the foreign transaction."""
        if self.pins.pop((topic, partition), None) is not None and self.memory.marker_count:
            self.skip(topic, partition)

    def wait_in_vain(self, topic: str, partition: int) -> None:
        """Note that a reader found nothing behind an open transaction, or one without a marker, and let time pass."""
        if topic == CHANGELOG and partition in self.markers_missing:
            self._true_time.at_ms += 1_000
            self._waited_count += 1
            if self._waited_count > _WAITS_MAX:
                raise Failure(f"nobody sees that a marker is missing in changelog-{partition}")
        pin = self.pins.get((topic, partition))
        if pin is not None:
            pin.patience -= 1
            if pin.patience <= 0:
                self.unpin(topic, partition)

    def stable(self, topic: str, partition: int) -> Watermarks:
        """Return the offsets that readers may know."""
        start, end = self.memory.watermarks(topic, partition)
        pin = self.pins.get((topic, partition))
        if pin is not None:
            end = min(pin.offset, end)
        if topic == CHANGELOG:
            end = min(self.markers_missing.get(partition, end), end)
        if topic == DEAD_LETTERS:
            end = min(self.letters_missing.get(partition, end), end)
        return Watermarks(start, max(start, end))

    # Losses

    def tear(self, partition: int, rng: Random) -> int:
        """Lose some of the newest records that nobody has read and nobody was told are safe; return how many."""
        at = self.memory.partition(DELTAS, partition)
        keep = rng.randint(min(self.safe_offsets[partition], at.end_offset), at.end_offset)
        torn = at.end_offset - keep
        if torn:
            self.pins.pop((DELTAS, partition), None)
            self._end_at(DELTAS, partition, keep)
            self.auditor.torn(partition, keep)
        return torn

    def acknowledge(self, partition: int, next_offset: int) -> None:
        self.safe_offsets[partition] = max(self.safe_offsets[partition], next_offset)


class Deposed:
    """A deposed leader that does not know: its clients see the log end where it ended once.

    A client finds the new leader after some calls, or when it is late.
    """

    def __init__(self, ends: Mapping[At, int], calls: int, is_late: Callable[[], bool] = lambda: False) -> None:
        self._ends = dict(ends)
        self._calls = calls
        self._is_late = is_late

    def called(self) -> None:
        """Count one more call."""
        if self._ends:
            self._calls -= 1
            if self._calls <= 0 or self._is_late():
                self._ends = {}

    def end_offset(self, topic: str, partition: int, end_offset: int) -> int:
        """Return the end of the log that this deposed leader reports."""
        return min(end_offset, self._ends.get((topic, partition), end_offset)) if self._ends else end_offset
