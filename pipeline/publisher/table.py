"""The table: a process's unsent states. This is the plain one, and the specification of the native one.

Recording appends to a queue, which no signal handler, finaliser or other thread can find half done; whoever finds the queue
long merges it into the states, under a lock. A thread that comes to the lock inside itself, because a signal handler or a
finaliser runs there, leaves the work to the frame outside. So recording is allowed anywhere, and never waits for a drain.

Neither table owns a thread, a clock or a log. The publisher passes in what the table may not decide:

- `check(kind, monotone, value)` returns the plain number (of a `last` view also text, bool or None) that a value is, or
  raises `Invalid`. It is called for whatever is not plain already: see `check_value`.
- `opening()` is called before a series comes in, before every record after `close()`, and when it is found that the process
  was forked and nobody has called `forget`; what it raises, the call raises.
- `full(bytes_needed, delta_count)` is called when something does not fit in `bytes_max`: True to try again, False to drop
  the delta. The caller of `add` gets what it raises.
- `now_ms()` is the time.
- `journal`, if deltas are to outlive the process: see `Journal`. Then each delta is also recorded to a ring, in one breath
  with being recorded here, and a drain knows where the ring ended: what lies before is in what was drained, or in an earlier
  drain, and what lies behind is not.

All of it is called without a lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from zlib import crc32

from pipeline.core.kinds import KINDS, State, check_ahead
from pipeline.core.record import Definition, overflow_suffix
from pipeline.publisher.batching import Draft, Routed, cut, encode, value_bytes
from pipeline.publisher.view import QUEUE_MAX, SHORT, AddView, BaseView, ObserveView, SetView, Slot

if TYPE_CHECKING:
    from pipeline.publisher.spool.ring import Segment

SERIES_BYTES = 520
"""What a series takes in memory beyond its suffix (measured; see tests/contracts)."""
T = TypeVar("T")
_Waiting = dict[Slot, list[Any]]
"""In the order in which they were recorded first: each series' state and how many deltas are in it."""


def _heap_bytes(value: Any) -> int:
    """Return the memory that a state is charged for: that of texts and of long ints."""
    kind = type(value)
    if kind is float or (kind is int and -SHORT <= value <= SHORT):
        return 0
    size = value_bytes(value)
    return 64 + size if size > 24 else 0


class Journal(Protocol):
    """Where deltas are recorded so that they outlive the process; `pipeline.publisher.spool` has it in files.

    Both methods raise what the call that records is to raise, or return None if the delta is to be dropped.
    """

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        """Return a number for a series, which is never given again; what is recorded by it is the series' from then on."""
        ...

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        """Return where a shard's ring goes on behind segment `full` (-1: at its begin), with a payload of `length` bytes."""
        ...


class Local(Mapping[bytes, State]):
    """The totals of a view as of a snapshot, by suffix. Never changes."""

    def __init__(self, states: Mapping[bytes, State], *, complete: bool) -> None:
        self._states = states
        self.complete = complete
        """False if series were left out, because there are more than `local_series_max`."""

    def __getitem__(self, suffix: bytes) -> State:
        return self._states[suffix]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


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
        ts_ahead_max_ms: int = 3_600_000,
        local_series_max: int = 100_000,
        shard_count: int = 0,
        lane_count: int = 0,
        journal: Journal | None = None,
    ) -> None:
        """See the module for what is passed in; `shard_count` and `lane_count` are the native table's (0: as it likes)."""
        self.check, self.now_ms = check, now_ms
        self._opening, self._full, self._journal = opening, full, journal
        self._ring: Any = None
        self._bytes_max, self._ts_ahead_max_ms, self._local_series_max = bytes_max, ts_ahead_max_ms, local_series_max
        self._views: list[BaseView] = []
        self._recorded_ns = 0
        self.queue: deque[tuple[Slot, State]] = deque()
        """Deltas on their way into the states. Whoever appends one calls `settle` if there are `QUEUE_MAX`."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, empty and open, as a forked child must: the states are the parent's to send. Views and series stay."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._inside: object = None
        """What the thread that merges, drains or evicts is known by."""
        self.closed = False
        self.queue.clear()
        self._states: _Waiting = {}
        self._drains = 0
        self._totals = _Totals(self._local_series_max)
        self._locals: dict[BaseView, Local] = {}
        self._gone: list[int] = []
        self._cut: tuple[dict[int, tuple[int, int]], list[int]] = {}, []
        self.used_bytes = 0
        if self._journal is not None:
            from pipeline.publisher.spool.ring import Ring, encode_delta  # only who has a journal pays for it

            if self._ring is not None:
                self._ring.segment.limit = 0  # whoever was interrupted in a write, in a child, must not go on with it
            self._ring, self._encode = Ring(), encode_delta
        for view in self._views:
            view.leave()

    def keep(self) -> bool:
        """Go on, in a forked child, with what the parent had; False with a journal, or if it was perhaps being changed."""
        if self._journal is not None or not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        self._pid = os.getpid()
        return self._inside is None

    def define(self, definition: Definition, series_max: int, view_type: type[BaseView] | None = None) -> Any:
        """Return a new view, of `view_type` or of the base class of its kind. Each definition is to be given once."""
        by_kind = {"add": AddView, "observe": ObserveView, "set": SetView}
        return (view_type or by_kind[KINDS[definition.kind].method])(self, definition, series_max)

    def join(self, view: BaseView) -> None:
        """Take in a view that was made: batches have the groups of views in this order."""
        view.number = len(self._views)
        self._views.append(view)

    def step_over(self) -> list[Any]:
        """Return the locks that the caller is to release while it waits for a drain, perhaps in a signal handler.

        If it has interrupted its own thread in the midst of a change, that finds its states replaced, and stops short of
        changing anything.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]
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
        """Return the time that was given (None: now), if it is one, and now."""
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
        """Record a delta; False if it was dropped, because there is no memory for it."""
        heap = _heap_bytes(delta)
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
        """Record a delta, charging what it needs, to the series or the overflow series; False if it is dropped."""
        asked = self.closed
        if asked or suffix not in view.slots:
            self._opening()
        payload = self._encode(delta[0] if view.kind == "mean" else delta) if self._journal is not None else b""
        ring, number, named = self._ring, 0, b""
        while True:
            if ring is not self._ring:  # what was called has forked, and this is the child
                ring, number, named = self._ring, 0, b""
            with self._lock:
                if self.closed and not asked:
                    return self._admit(view, suffix, delta, heap)
                overflow = suffix not in view.slots and view.own_count >= view.series_max
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
            if not fits:
                if not self._full(needed, 1):
                    return False
            elif not known:
                self._gone += [number] * (number > 0)
                number, named = self._define(view, to), to
                if not number:
                    return False
            elif not self._extend(ring, full, len(payload)):
                return False

    def _write(self, slot: Slot, delta: State, payload: bytes, heap: int) -> bool:
        """Record a delta to its slot; False if its ring has no room, or the slot is out. The caller holds the lock."""
        self.used_bytes += heap
        if self._journal is None:
            self.queue.append((slot, delta))
            return True
        if self._ring.append(slot.number << 2, payload, self.queue, ((slot, delta),), slot):
            return True
        self.used_bytes -= heap
        return False

    def _define(self, view: BaseView, suffix: bytes) -> int:
        assert self._journal is not None
        return self._journal.define(encode(view.canonical), suffix) or 0

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
            view.own_count += own
            self.used_bytes += size
        return slot

    def _alone(self, work: Callable[[], T], otherwise: T) -> T:
        """Merge what was recorded, and do `work`; return `otherwise` if this very thread is in the midst of such work."""
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
                if slot.out:  # it was let go of since
                    slot = self._enter(slot.view, slot.suffix)
                    item = states.setdefault(slot, [None, 0])
                else:
                    states[slot] = item = [None, 0]
            kind = type(delta)
            if states is not self._states:  # a signal handler has forked, or called `step_over`: another goes on from here
                return
            old = item[0]
            if slot.adds and kind is float and type(old) is float:
                merged = old + delta  # what `merge` does where nothing is rounded away, without the call
                if merged - old == delta and merged - delta == old:
                    item[0] = merged
                    item[1] += 1
                    popleft()
                    continue
            merged, more = delta, 0
            if item[1]:
                merged = slot.view.merge(old, delta)
                more = _heap_bytes(merged) - _heap_bytes(old) - _heap_bytes(delta)
            if states is not self._states:  # as above
                return
            # The interpreter looks for signals, and threads that wait, after a call and at the end of a loop only: so from
            # here until the delta has left the queue, nothing comes in between, and no exception either.
            self.used_bytes += more
            item[0] = merged
            item[1] += 1
            popleft()

    # Draining

    def drain(self, partition_count: int, busy: bytes | None, batch_bytes_max: int) -> list[Draft]:
        """Take out what waits, but for partitions whose byte in `busy` is not 0, as batches of up to `batch_bytes_max`.

        A series that is larger by itself gets a batch by itself. What was taken counts towards the totals. To be called from
        a thread of the publisher's own: in the main thread, what a signal handler raises can take the place of the result.
        """
        if partition_count < 1 or (busy is not None and len(busy) != partition_count):
            raise ValueError("busy has a byte for each of at least one partition")
        if busy is not None and self._journal is not None:
            raise ValueError("with a journal all partitions are drained")
        return self._alone(lambda: self._drain(partition_count, busy or bytes(partition_count), batch_bytes_max), [])

    def _drain(self, partition_count: int, busy: bytes, batch_bytes_max: int) -> list[Draft]:
        cut_here = self._look_at_ring()
        kept: _Waiting = {}
        taken: _Waiting = {}
        merged = []
        for slot, item in sorted(self._states.items(), key=lambda pair: pair[0].view.number):
            partition = crc32(slot.view.prefix + slot.suffix) % partition_count
            if busy[partition]:
                kept[slot] = item
                continue
            taken[slot] = item
            merged.append(Routed(partition, slot.view.canonical, slot.suffix, *item))
        result = cut(merged, batch_bytes_max)
        self._states, self._cut = kept, cut_here
        self._drains += 1
        for slot, (state, _) in taken.items():
            slot.seen = self._drains
            self.used_bytes -= _heap_bytes(state)
            self._totals.add(slot, state)
        return result

    def _look_at_ring(self) -> tuple[dict[int, tuple[int, int]], list[int]]:
        """Merge what was recorded, and return where the ring ends as of that, and the series that are gone."""
        if self._journal is None:
            return {}, []
        while True:
            self._merge_queue()
            gone, segment = [*self._gone], self._ring.segment
            number, offset = segment.number, segment.offset
            if not self.queue:  # nothing came in since `segment` was read: there was no call, and nothing was made
                return {0: (number, offset)} if number >= 0 else {}, gone

    def waiting_states(self) -> list[tuple[bytes, bytes, State, int]]:
        """Return a copy of what waits: of each series its encoded definition, suffix, state and number of deltas."""
        return self._alone(self._waiting_states, [])

    def _waiting_states(self) -> list[tuple[bytes, bytes, State, int]]:
        cut_here = self._look_at_ring()
        waiting = [(encode(slot.view.canonical), slot.suffix, *item) for slot, item in self._states.items()]
        self._cut = cut_here
        return waiting

    def cut(self) -> tuple[dict[int, tuple[int, int]], list[int]]:
        """Return, by shard, where its ring ended at the last `drain` or `waiting_states`, and numbers of series.

        Those are no more in use, and all of their records lie before the positions. Each is returned once.
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
        """Let go of series in which nothing waits and nothing was found by so many drains; return how many.

        A bound series comes in again when it is recorded to. Totals stay.
        """
        return self._alone(lambda: self._evict(silent_drains), 0)

    def _evict(self, silent_drains: int) -> int:
        gone = 0
        for view in self._views:
            for suffix, slot in [*view.slots.items()]:
                if slot not in self._states and self._drains - slot.seen >= silent_drains:
                    own, size = suffix != overflow_suffix(view.canonical, suffix[:8]), SERIES_BYTES + len(suffix)
                    slot.leave()
                    self._gone += [slot.number] * (slot.number > 0)
                    del view.slots[suffix]
                    view.own_count -= own
                    self.used_bytes -= size
                    gone += 1
            if gone:
                view.by_labels = {}
        return gone

    def close(self) -> None:
        """From now on every record calls `opening`, which may refuse it. What waits can still be drained."""
        with self._lock:
            self.closed = True
            for view in self._views:
                for slot in [*view.slots.values()]:
                    slot.least = inf

    def hold(self) -> None:
        """Wait until nobody drains, evicts or takes a snapshot, and have others wait, also who records: before a fork."""
        self._lock.acquire()

    def release(self) -> None:
        """Undo `hold`, in the parent. A child calls `forget`."""
        self._lock.release()


class _Totals:
    """States of up to so many series, by view."""

    def __init__(self, room: int) -> None:
        self.states: dict[BaseView, dict[bytes, State]] = {}
        self.cut: set[BaseView] = set()
        """Views of which series were left out."""
        self._room = room

    def add(self, slot: Slot, state: State) -> None:
        """Merge a state in, if there is room for its series, and memory: a drain must not fail because of what is shown."""
        try:
            states = self.states.setdefault(slot.view, {})
            known = slot.suffix in states
            if known or self._room > 0:
                states[slot.suffix] = slot.view.merge(states[slot.suffix], state) if known else state
                self._room -= not known
                return
        except MemoryError:
            pass
        self.cut.add(slot.view)

    def copy(self) -> _Totals:
        """Return one of its own."""
        other = _Totals(self._room)
        other.states = {view: states.copy() for view, states in self.states.items()}
        other.cut = self.cut.copy()
        return other
