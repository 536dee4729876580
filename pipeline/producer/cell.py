"""One series, where deltas wait: a list, filled by any thread without a lock, merged by whoever drains it.

Recording is one `list.append`, which is atomic with and without the GIL; draining cuts off a counted prefix. So there is
no moment at which a recording thread holds a buffer that has just been taken away, the race of every swapped buffer,
and nothing belongs to a thread that could end. Each list has a limit; the thread that reaches it merges the list itself,
so memory is bounded by series, not by deltas, however long the flusher is held up.

A thread can be interrupted anywhere: by a signal handler that raises, by a handler or finaliser that records or flushes
itself. So locks can be taken again by their owner, and what must change together changes without a call or an
allocation in between, once `merges` has shown that nobody came in between.
"""

from __future__ import annotations

from math import isfinite
from numbers import Number
from typing import TYPE_CHECKING, Any
from zlib import crc32

from pipeline.core.merge import State
from pipeline.producer.batch import Reservation, record_many
from pipeline.producer.handle import ThreadObserveCell, ThreadSumCell
from pipeline.producer.sealing import Run, long_bytes
from pipeline.producer.timing import ExceptionCounter, Exceptions, Timer

if TYPE_CHECKING:
    from pipeline.producer.buffer import View

CELL_LIMIT_FIRST = 8
CELL_LIMIT_MAX = 2_048
_NO_NUMBER = (TypeError, ValueError, OverflowError)
"""What `isfinite` raises; an int beyond all floats is a number all the same."""


class Cell:
    """A series that deltas can be recorded to, from any thread. Get it from `labels(...)`, keep it, share it.

    Subclasses have the recording method of their kind.
    """

    __slots__ = (
        "__weakref__", "_limit", "_values", "charge", "crc", "extra", "labels",
        "merges", "pending", "pending_count", "seen_s", "suffix", "view",
    )  # fmt: skip

    delta_bytes = 40
    """What a waiting delta costs at most: a float and its place in the list. Longer values are merged at once."""

    def __init__(self, view: View, labels: tuple[str, ...], suffix: bytes) -> None:
        self.view = view
        self.labels = labels
        self.suffix = suffix
        self.crc = crc32(view.prefix + suffix)
        """Of the series' key: what routes it."""
        self.charge = 0
        """Bytes charged to the account; 0: this cell is not registered, and the flusher does not know it."""
        self.extra = 0
        """Bytes charged for a long value in `pending`."""
        self.pending: State = None
        """Merged deltas that are not sealed yet, `pending_count` of them."""
        self.pending_count = 0
        self.merges = 0
        """How often deltas were merged or taken."""
        self.seen_s = 0.0
        """When a drain found deltas here, or first found none; 0.0: no drain has looked yet."""
        self._values: list[Any] = []
        self._limit = 0

    def __del__(self) -> None:
        # A thread can append to a cell that was let go of between its look at the limit and the append.
        if self._values or self.pending_count:
            self.view.orphans.append((self.suffix, self.crc, self._values, self.pending, self.pending_count))

    def _record(self, value: Any) -> None:
        """Record what the fast path did not: there is no room, or `value` is no number, or no float could hold it."""
        delta = self.view.kind.check(value, 0)
        if size := long_bytes(delta):
            self._record_long(delta, size)
        else:
            self._record_slowly(delta, constant=delta is value or isinstance(value, Number))

    def _record_slowly(self, delta: Any, *, constant: bool = True) -> bool:
        """Make room first: register the cell, or merge a full list. False if the delta was dropped.

        After one that was not `constant`, an array of one number for example, the next comes here too: the fast path would
        keep the object, and read it when it is merged.
        """
        view = self.view
        while self.charge or view.register(self):
            with view.lock:
                if self.charge:  # it can have been let go of in between
                    if not constant:
                        self.room(0)
                    elif self._limit < CELL_LIMIT_MAX and len(self._values) >= self._limit:
                        self.room(min(max(2 * self._limit, CELL_LIMIT_FIRST), CELL_LIMIT_MAX))
                    self.merge_values()
                    self._values.append(delta)
                    return True
        return False

    def _record_long(self, value: Any, size: int) -> None:
        """Record a value that is charged for its length, and merge it at once, so that the account has it once."""
        view = self.view
        view.check_fits(self.suffix, size)
        if not view.account.charge(size):
            return
        back = size
        was = held = 0
        try:
            if self._record_slowly(value):
                with view.lock:
                    self.merge_values()
                    held = long_bytes(self.pending)
                    was = self.extra
                    back += was - held
                    self.extra = held
        finally:
            view.account.refund(back)
        view.account.freshen(held - was)

    def record_run(self, deltas: list[Any], state: State, reserved: Reservation) -> bool:
        """Record checked deltas at once; `state` is what they merge to. The bytes that they need were `reserved`.

        False if they were dropped.
        """
        view = self.view
        reserved.charge(back := long_bytes(state))
        was = held = 0
        try:
            while self.charge or view.register(self, reserved):
                with view.lock:
                    if self.charge:  # it can have been let go of in between
                        self.merge_state(state, len(deltas))
                        if back:
                            held = long_bytes(self.pending)
                            was = self.extra
                            back += was - held
                            self.extra = held
                        return True
            return False
        finally:
            reserved.refund(back)
            view.account.freshen(held - was)

    def room(self, limit: int) -> None:
        """Let the list grow to `limit`, as far as the account allows, or less. The caller holds `view.lock`."""
        was = self._limit
        more = (max(limit, CELL_LIMIT_FIRST) - max(was, CELL_LIMIT_FIRST)) * self.delta_bytes
        if more > 0 and not self.view.account.try_charge(more):
            return
        if self._limit == was and self.charge:
            self.charge += more
            self._limit = limit
            more = min(more, 0)
        self.view.account.refund(abs(more))

    def merge_values(self) -> None:
        """Merge the waiting deltas into `pending`. The caller holds `view.lock`."""
        values = self._values
        kind = self.view.kind
        while count := len(values):
            merges = self.merges
            state, good_count = self.view.collect(values[:count])
            if self.pending_count:
                state = kind.merge(self.pending, state) if good_count else self.pending
            prefix = slice(count)  # not clear(): others append meanwhile
            if self.merges == merges:
                self.merges = merges + 1
                self.pending = state
                self.pending_count += good_count
                del values[prefix]
                return

    def merge_state(self, state: State, delta_count: int) -> None:
        """Merge so many deltas, which make up `state`, into `pending`. The caller holds `view.lock`."""
        kind = self.view.kind
        while True:
            merges = self.merges
            merged = kind.merge(self.pending, state) if self.pending_count else state
            if self.merges == merges:
                self.merges = merges + 1
                self.pending = merged
                self.pending_count += delta_count
                return

    def take_single(self, into: Run) -> bool:
        """Hand over the only delta, of a kind whose states are deltas: what most series have at most flushes.

        False if it is not as simple as that, or somebody came in between. The caller holds `view.lock`.
        """
        values = self._values
        state = values[0]
        if type(state) is not float or self.pending_count:
            return False
        merges = self.merges
        into.suffixes.append(self.suffix)
        into.crcs.append(self.crc)
        into.states.append(state)
        into.counts.append(1)
        if self.merges == merges:
            self.merges = merges + 1
            del values[0]
            return True
        into.pop()
        return False

    def take(self, into: Run) -> None:
        """Merge, and hand over what is pending, if there is any. The caller holds `view.lock`."""
        self.merge_values()
        while self.pending_count:
            merges = self.merges
            into.add(self.suffix, self.crc, self.pending, self.pending_count)
            if self.merges == merges:
                self.merges = merges + 1
                self.pending = None
                self.pending_count = 0
                return
            into.pop()

    def shut(self) -> int:
        """Let go of: recording registers the cell again. The bytes to refund. The caller holds `view.lock`."""
        back = self.charge + self.extra
        self.charge = self.extra = self._limit = 0
        return back

    def forget(self) -> None:
        """Drop everything, as a forked child must: it is the parent's to send."""
        self.merges += 1
        self._values.clear()
        self.pending, self.pending_count = None, 0
        self.charge = self.extra = self._limit = 0


class SumCell(Cell):
    """A series of a sum view."""

    __slots__ = ()

    def for_this_thread(self) -> SumCell | ThreadSumCell:
        """A handle that costs half as much, for one thread: what it records is checked when it is merged, not before.

        Keep it, and drop it when the thread is done. What turns out to be no number is counted, logged, and raised by the
        next `flush`. Call `add` on the handle: its method by itself goes on taking deltas when the publisher is closed.
        Unless `buffering` is `thread`, and `durability` memory, it is this cell itself.
        """
        return self.view.open_thread(self, ThreadSumCell) or self

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        try:
            if not isfinite(value):
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        values = self._values
        if len(values) < self._limit:
            values.append(value)
        else:
            self._record(value)

    def add_many(self, values: Any, /) -> int:
        """Add each of `values`: a sequence, or a NumPy or Arrow array. All or none; how many were recorded.

        Raises `Invalid`, which names the row, or `BufferFull` as `on_full` says.
        """
        return record_many(self, values)

    def time(self) -> Timer:
        """Add the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return Timer(self.add, self.view.monotonic_s)

    def count_exceptions(self, exception: Exceptions = Exception) -> ExceptionCounter:
        """Add 1 when `exception` leaves a `with` block or a call of a decorated function; see `ExceptionCounter`."""
        return ExceptionCounter(self.add, exception)


class MonotoneCell(SumCell):
    """A series of a monotone sum view."""

    __slots__ = ()

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number from 0, `BufferFull` as `on_full` says."""
        try:  # as in `SumCell.add`, which must not pay for the comparison
            if not isfinite(value) or value < 0:
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        values = self._values
        if len(values) < self._limit:
            values.append(value)
        else:
            self._record(value)


class ObserveCell(Cell):
    """A series of a min, max or mean view."""

    __slots__ = ()

    def for_this_thread(self) -> ObserveCell | ThreadObserveCell:
        """A handle that costs half as much, for one thread; see `SumCell.for_this_thread`."""
        return self.view.open_thread(self, ThreadObserveCell) or self

    def observe(self, value: float, /) -> None:
        """Take `value` into account. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        try:  # as in `SumCell.add`: a call to share these lines would cost as much as they do
            if not isfinite(value):
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        values = self._values
        if len(values) < self._limit:
            values.append(value)
        else:
            self._record(value)

    def observe_many(self, values: Any, /) -> int:
        """Take each of `values` into account: a sequence, or a NumPy or Arrow array. All or none; how many were recorded.

        Raises `Invalid`, which names the row, or `BufferFull` as `on_full` says.
        """
        return record_many(self, values)

    def time(self) -> Timer:
        """Observe the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return Timer(self.observe, self.view.monotonic_s)


class LastCell(Cell):
    """A series of a last view."""

    __slots__ = ()

    delta_bytes = 200

    def set(self, value: str | float | bool | None, ts_ms: int | None = None) -> None:
        """Set the value, as of `ts_ms` (milliseconds since 1970; None: now).

        Raises `Invalid` for what is not text, a finite number, a bool or None, `BufferFull` as `on_full` says.
        """
        delta = self.view.kind.check(value, self.view.now_ms() if ts_ms is None else ts_ms)
        if size := long_bytes(delta):
            self._record_long(delta, size)
        elif len(self._values) < self._limit:
            self._values.append(delta)
        else:
            self._record_slowly(delta)
