"""The table: a process's unsent states. This is the plain one, and the specification of the native one.

Recording appends to a queue, which is one step that no signal handler, finaliser or other thread can interrupt. A thread
that finds the queue long merges it into the states, under a lock. If it holds the lock already, because it is in a signal
handler or finaliser that has interrupted a merge, it leaves the work to that merge. So recording is allowed anywhere, and
never waits for a drain.

Neither table owns a thread, a clock or a log. The publisher passes in what the table may not decide:

- `check(kind, monotone, value)` returns a value as a plain number (for a `last` view also text, bool or None), or raises
  `Invalid`. It is called for every value that is not plain already: see `check_value`.
- `opening()` is called before a series comes in, before every record after `close()`, and when it is found that the process
  was forked and nobody has called `forget`. Its errors reach the caller who records.
- `full(bytes_needed, delta_count)` is called when something does not fit in `bytes_max`. It returns True to try again, False
  to drop the delta. Its errors reach the caller who records. A series that is evicted while a thread records to it comes
  back without being asked for, so that its delta is kept: at most one for each thread beyond `bytes_max`.
- `now_ms()` returns the time, and `now_ns()`, where it is given, the same in nanoseconds at less cost. If that is the
  system's own `time.time_ns`, the native table reads the clock without a call.
- `journal` is given if deltas are to outlive the process: see `Journal`. Each delta is then recorded to the table and to a
  ring, both or neither, and a drain states where the ring ended: everything before that was drained, nothing behind it was.

All of these are called without a lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.core.kinds import KINDS, State, check_ahead
from pipeline.core.record import Definition, overflow_suffix
from pipeline.publisher.batching import Draft, Routed, cut, encode, partition_of
from pipeline.publisher.totals import Local, Totals
from pipeline.publisher.view import NS_PER_MS, QUEUE_MAX, AddView, BaseView, ObserveView, SetView, Slot

if TYPE_CHECKING:
    from pipeline.publisher.spool.ring import Segment

SERIES_BYTES = 520
"""The memory of a series beyond its suffix (measured; see tests/contracts)."""
T = TypeVar("T")
_Waiting = dict[Slot, list[Any]]
"""State and number of deltas of each series, in the order in which the series were first recorded."""


class Journal(Protocol):
    """A record of deltas that outlives the process: `pipeline.publisher.spool` keeps it in files.

    The errors of both methods reach the caller who records. If they return None, the delta is dropped.
    """

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        """Return a new number for a series, by which its deltas are recorded from then on."""
        ...

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        """Return the segment of a shard's ring after number `full` (-1: the first), with room for `length` bytes."""
        ...


class Table:
    """A process's unsent states, and the totals of what it has recorded. All methods may be called from any thread."""

    shard_count = 1
    contended_count = 0

    def __init__(
        self,
        *,
        bytes_max: int,
        check: Callable[[str, bool, object], Any],
        opening: Callable[[], object],
        full: Callable[[int, int], bool],
        now_ms: Callable[[], int],
        now_ns: Callable[[], int] | None = None,
        ts_ahead_max_ms: int = 3_600_000,
        local_series_max: int = 100_000,
        shard_count: int = 0,
        lane_count: int = 0,
        journal: Journal | None = None,
    ) -> None:
        """The module says what is passed in. `shard_count` and `lane_count` are for the native table (0: its own choice)."""
        self.check, self.now_ms = check, now_ms
        self.now_ns = now_ns or (lambda: now_ms() * NS_PER_MS)
        self._opening, self._full, self._journal = opening, full, journal
        self._ring: Any = None
        self._bytes_max, self._ts_ahead_max_ms, self._local_series_max = bytes_max, ts_ahead_max_ms, local_series_max
        self._views: list[BaseView] = []
        self._recorded_ns = 0
        self.queue: deque[tuple[Slot, State]] = deque()
        """Deltas that are not merged yet. A caller that appends one calls `settle` if there are `QUEUE_MAX`."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, empty and open, as a forked child must: the states are the parent's to send. Views and series stay."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._inside: object = None
        """A token of the thread that merges, drains or evicts now; None: no thread does."""
        self.closed = False
        self.queue.clear()
        self._states: _Waiting = {}
        self._drains = 0
        self._next_end_ns: float = inf
        """The end of the window that ends first of those in which there are series, or before it."""
        self._totals = Totals(self._local_series_max)
        self._locals: dict[BaseView, Local] = {}
        self._gone: list[int] = []
        self._cut: tuple[dict[int, tuple[int, int]], list[int]] = {}, []
        self.used_bytes = 0
        if self._journal is not None:
            from pipeline.publisher.spool.ring import Ring, encode_delta  # imported only with a journal

            if self._ring is not None:
                self._ring.segment.limit = 0  # a write that a fork has interrupted must not go on in the child
            self._ring, self._encode = Ring(), encode_delta
        for view in self._views:
            view.leave()

    def keep(self) -> bool:
        """Keep the parent's deltas, in a forked child; return False with a journal, or if a change was under way."""
        if self._journal is not None or not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        self._pid = os.getpid()
        return self._inside is None

    def define(
        self, definition: Definition, series_max: int, view_type: type[BaseView] | None = None, spread: int = 1
    ) -> Any:
        """Return a new view, of `view_type` or of the base class of its kind. Each definition is to be given once.

        Its series are spread over so many partitions; see `batching.partition_of`.
        """
        by_kind = {"add": AddView, "observe": ObserveView, "set": SetView}
        return (view_type or by_kind[KINDS[definition.kind].method])(self, definition, series_max, spread)

    def join(self, view: BaseView) -> None:
        """Add a new view. Batches have the groups of views in this order."""
        view.number = len(self._views)
        self._views.append(view)

    def step_over(self) -> list[Any]:
        """Return the locks that the caller is to release while it waits for a drain, perhaps in a signal handler.

        If the handler has interrupted a merge of its own thread, the merge finds its states replaced, and stops without a
        change.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]  # typeshed does not declare it
            self._states = self._states.copy()
            self._inside = None
        return [self._lock]

    @property
    def series_count(self) -> int:
        """The series that are in the table."""
        return sum([len(view.slots) for view in self._views])

    @property
    def waiting_count(self) -> int:
        """The deltas that wait to be drained."""
        return self._alone(lambda: sum([count for _, count in self._states.values()]), 0)

    # Recording

    def time_of(self, ts_ms: Any) -> tuple[int, int]:
        """Return a checked time (None: now), and now."""
        now = self.now_ms()
        if ts_ms is None:
            return now, now
        KINDS["last"].check(None, ts_ms)
        check_ahead(ts_ms, now, self._ts_ahead_max_ms)
        return ts_ms, now

    def rise(self, now_ms: int) -> int:
        """Return a time of recording in ns, greater than every one before."""
        with self._lock:
            rising, last = now_ms * 1_000_000, self._recorded_ns
            if rising <= last:
                rising = last + 1
            self._recorded_ns = rising
            return rising

    def settle(self) -> None:
        """Merge what is in the queue."""
        if self._pid != os.getpid():
            self._opening()
        self._alone(bool, None)

    def record(self, view: BaseView, suffix: bytes, delta: State) -> bool:
        """Record a delta; return False if it was dropped, because there is no memory for it."""
        heap = view.heap_bytes(delta)
        slot = view.slots.get(suffix)
        if heap or slot is None or self.closed or self._journal is not None:
            if not self._admit(view, suffix, delta, heap):
                return False
        else:
            self.queue.append((slot, delta))  # nothing comes in between: no other thread has closed the table since
        if len(self.queue) >= QUEUE_MAX:
            self.settle()
        return True

    def _admit(self, view: BaseView, suffix: bytes, delta: State, heap: int) -> bool:
        """Record a delta for which memory must be charged, or the journal written; return False if it is dropped."""
        asked = self.closed
        if asked or suffix not in view.slots:
            self._opening()
        payload = self._encode(view.kind_rules.delta_of(delta)) if self._journal is not None else b""
        ring, number, named = self._ring, 0, b""
        settled = False
        while True:
            if ring is not self._ring:  # a callback has forked, and this is the child
                ring, number, named = self._ring, 0, b""
            with self._lock:
                if self.closed and not asked:
                    return self._admit(view, suffix, delta, heap)
                overflow = suffix not in view.slots and view.own_counts.get(suffix[:8], 0) >= view.series_max
                to = overflow_suffix(view.canonical, suffix[:8]) if overflow else suffix
                slot = view.slots.get(to)
                needed = heap if slot is not None else heap + SERIES_BYTES + len(to)
                fits = self.used_bytes + needed <= self._bytes_max
                known = self._journal is None or (slot is not None and slot.number > 0) or (number > 0 and named == to)
                if fits and known:
                    slot = self._enter(view, to)
                    if not slot.number:
                        slot.number, number = number, 0
                    if self._write(slot, delta, payload, heap):
                        view.overflow_count += overflow
                        self._gone += [number] * (number > 0)
                        return True
                    if slot.out:
                        continue
                    full = ring.segment.number
            if not fits and not settled:  # what waits in the queue can take less once it is merged
                settled = True
                self.settle()
            elif not fits:
                if not self._full(needed, 1):
                    return False
                settled = False
            elif not known:
                assert self._journal is not None
                self._gone += [number] * (number > 0)
                number, named = self._journal.define(encode(view.canonical), to) or 0, to
                if not number:
                    return False
            elif not self._extend(ring, full, len(payload)):
                return False

    def _write(self, slot: Slot, delta: State, payload: bytes, heap: int) -> bool:
        """Record a delta to its slot; return False if its ring or the slot is out of use. The caller holds the lock."""
        self.used_bytes += heap
        if self._journal is None:
            self.queue.append((slot, delta))
            return True
        if self._ring.append(slot.number << 2, payload, self.queue, ((slot, delta),), slot):
            return True
        self.used_bytes -= heap
        return False

    def _extend(self, ring: Any, full: int, length: int) -> bool:
        assert self._journal is not None
        segment = self._journal.segment(0, full, length)
        if segment is not None and ring is self._ring:  # or it is that of a parent process
            ring.adopt(segment)
        return segment is not None

    def _enter(self, view: BaseView, suffix: bytes) -> Slot:
        """Return the slot of a series, which may be new. The caller holds the lock."""
        own, size = suffix != overflow_suffix(view.canonical, suffix[:8]), SERIES_BYTES + len(suffix)
        new = Slot(view, suffix, self._drains, open=not self.closed and self._journal is None)
        slot = view.slots.setdefault(suffix, new)
        if slot is new:
            view.own_counts[suffix[:8]] += own
            self.used_bytes += size
            if slot.end_ns < self._next_end_ns:  # noqa: PLR1730  # a call would let others in between
                self._next_end_ns = slot.end_ns
        return slot

    def _alone(self, work: Callable[[], T], otherwise: T) -> T:
        """Merge the queue, and do `work`; return `otherwise` if this very thread is doing such work already."""
        with self._lock:
            if self._inside is not None:
                return otherwise
            self._inside = me = object()
            try:
                self._merge_queue()
                return work()
            finally:
                if self._inside is me:
                    self._inside = None

    def _merge_queue(self) -> None:
        queue, states, popleft = self.queue, self._states, self.queue.popleft
        while queue:
            slot, delta = queue[0]
            item = states.get(slot)
            if item is None:
                if slot.out:  # it was evicted meanwhile
                    slot = self._enter(slot.view, slot.suffix)
                    item = states.setdefault(slot, [None, 0])
                else:
                    states[slot] = item = [None, 0]
            kind = type(delta)
            if states is not self._states:  # a signal handler has forked, or called `step_over`
                return
            old = item[0]
            if slot.adds and kind is float and type(old) is float:
                merged = old + delta  # as `merge` does where nothing is rounded away
                if merged - old == delta and merged - delta == old:
                    item[0] = merged
                    item[1] += 1
                    popleft()
                    continue
            merged, more = delta, 0
            if item[1]:
                merged = slot.view.merge(old, delta)
                heap_bytes = slot.view.heap_bytes
                more = heap_bytes(merged) - heap_bytes(old) - heap_bytes(delta)
            if states is not self._states:  # as above
                return
            # The interpreter runs signal handlers and other threads only after a call and at the end of a loop: so nothing
            # comes in between, and no exception either, from here until the delta has left the queue.
            self.used_bytes += more
            item[0] = merged
            item[1] += 1
            popleft()

    # Draining

    def drain(self, partition_count: int, busy: bytes | None, batch_bytes_max: int, turn: int = 0) -> list[Draft]:
        """Take out waiting states as drafts of up to `batch_bytes_max`, except for partitions whose byte in `busy` is not 0.

        `turn` chooses among the partitions of a series that is spread; of these, a busy one is passed over.
        A series that is larger by itself gets a draft of its own. Drained states count towards the totals. To be called from
        a thread of the publisher's own: in the main thread, an error of a signal handler can take the place of the result.
        """
        if partition_count < 1 or (busy is not None and len(busy) != partition_count):
            raise ValueError("busy has a byte for each of at least one partition")
        if busy is not None and self._journal is not None:
            raise ValueError("with a journal all partitions are drained")
        return self._alone(lambda: self._drain(partition_count, busy or bytes(partition_count), batch_bytes_max, turn), [])

    def _drain(self, partition_count: int, busy: bytes, batch_bytes_max: int, turn: int) -> list[Draft]:
        cut_here = self._merge_to_ring_end()
        kept: _Waiting = {}
        taken: _Waiting = {}
        merged = []
        for slot, item in sorted(self._states.items(), key=lambda pair: pair[0].view.number):
            spread = slot.view.spread
            for later in range(min(spread, partition_count)):
                partition = partition_of(slot.view.prefix, slot.suffix, partition_count, spread, turn + later)
                if not busy[partition]:
                    break
            else:
                kept[slot] = item
                continue
            taken[slot] = item
            merged.append(Routed(partition, slot.view.canonical, slot.suffix, *item))
        result = cut(merged, batch_bytes_max)
        self._states, self._cut = kept, cut_here
        self._drains += 1
        for slot, (state, _) in taken.items():
            slot.seen = self._drains
            self.used_bytes -= slot.view.heap_bytes(state)
            self._totals.add(slot, state)
        return result

    def _merge_to_ring_end(self) -> tuple[dict[int, tuple[int, int]], list[int]]:
        """Merge the queue; return where the ring ended when it was empty, and the series that were gone by then."""
        if self._journal is None:
            return {}, []
        while True:
            self._merge_queue()
            gone, segment = [*self._gone], self._ring.segment
            number, offset = segment.number, segment.offset
            if not self.queue:  # nothing was recorded since `segment` was read: there was no call in between
                return {0: (number, offset)} if number >= 0 else {}, gone

    def waiting_states(self) -> list[tuple[bytes, bytes, State, int]]:
        """Return a copy of the waiting states: encoded definition, suffix, state and number of deltas of each series."""
        return self._alone(self._waiting_states, [])

    def _waiting_states(self) -> list[tuple[bytes, bytes, State, int]]:
        cut_here = self._merge_to_ring_end()
        waiting = [(encode(slot.view.canonical), slot.suffix, *item) for slot, item in self._states.items()]
        self._cut = cut_here
        return waiting

    def cut(self) -> tuple[dict[int, tuple[int, int]], list[int]]:
        """Return, by shard, where its ring ended at the last `drain` or `waiting_states`, and numbers of evicted series.

        All records of these series lie before the positions. Each number is returned once.
        """
        positions, gone = self._cut
        self._cut = positions, []
        del self._gone[: len(gone)]
        return positions, gone

    def ends(self) -> dict[int, tuple[int, int]]:
        """Return, by shard, where its ring ends now: a segment and the offset in it. Takes no lock."""
        end = self._ring.end() if self._ring is not None else None
        return {} if end is None else {0: end}

    def snapshot(self) -> None:
        """Publish the totals of all that was recorded in this process, for `local`."""
        self._alone(self._snapshot, None)

    def _snapshot(self) -> None:
        totals = self._totals.copy()
        for slot, (state, _) in self._states.items():
            totals.add(slot, state)
        self._locals = {view: Local(states, complete=view not in totals.cut) for view, states in totals.states.items()}

    def local(self, view: BaseView) -> Local:
        """Return the totals of a view as of the last snapshot."""
        return self._locals.get(view, Local({}, complete=True))

    def evict(self, silent_drains: int) -> int:
        """Evict series in which nothing waits and in which so many drains found nothing; return how many.

        A bound series comes in again when it is recorded to. Totals stay.
        """
        return self._alone(lambda: self._evict(lambda slot: self._drains - slot.seen >= silent_drains), 0)

    def evict_ended(self) -> int:
        """Evict series in which nothing waits and whose windows have ended; return how many.

        They get no more deltas, but for late ones. Totals stay.
        """
        now_ns = self.now_ms() * NS_PER_MS
        return 0 if now_ns < self._next_end_ns else self._alone(lambda: self._evict_ended(now_ns), 0)

    def _evict_ended(self, now_ns: int) -> int:
        self._next_end_ns = inf  # what comes in from now on lowers it
        gone = self._evict(lambda slot: slot.end_ns <= now_ns)
        for slot in [slot for view in self._views if view.window_ms for slot in [*view.slots.values()]]:
            if slot.end_ns < self._next_end_ns:  # noqa: PLR1730  # a call would let others in between
                self._next_end_ns = slot.end_ns
        return gone

    def _evict(self, wanted: Callable[[Slot], bool]) -> int:
        all_gone = 0
        for view in self._views:
            gone = 0
            for suffix, slot in [*view.slots.items()]:
                if wanted(slot) and slot not in self._states:  # in this order: a call lets others in
                    own, size = suffix != overflow_suffix(view.canonical, suffix[:8]), SERIES_BYTES + len(suffix)
                    del view.slots[suffix]  # before it is left: a handler that finds a slot that is out would wait for ever
                    slot.leave()
                    self._gone += [slot.number] * (slot.number > 0)
                    view.own_counts[suffix[:8]] -= own
                    if not view.own_counts[suffix[:8]]:
                        del view.own_counts[suffix[:8]]
                    self.used_bytes -= size
                    gone += 1
            if gone:
                view.by_labels = {}
            all_gone += gone
        return all_gone

    def close(self) -> None:
        """Have every later record call `opening`, which may refuse it. Waiting states can still be drained."""
        with self._lock:
            self.closed = True
            for view in self._views:
                for slot in [*view.slots.values()]:
                    slot.shut()

    def hold(self) -> None:
        """Wait until no thread drains, evicts or takes a snapshot, and stop all that change the table: before a fork."""
        self._lock.acquire()

    def release(self) -> None:
        """End `hold`, in the parent. A child calls `forget`."""
        self._lock.release()
