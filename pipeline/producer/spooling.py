"""Buffering that outlives the process: a recorded delta is in a file, shared memory of the system, before `add` returns.

All threads record to one ring of the process's spool, whatever `buffering` says; the flusher drains it into cells, and says
in each commit what became of all that it has drained (`keeping`, `spool`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.merge import State
from pipeline.core.record import Definition
from pipeline.core.sequence import Sealed
from pipeline.producer.account import Account
from pipeline.producer.batch import Reservation
from pipeline.producer.buffer import BufferGauges, Orphan, View
from pipeline.producer.cell import Cell, LastCell, MonotoneCell, ObserveCell, SumCell
from pipeline.producer.sealing import Merged, long_bytes
from pipeline.producer.spool.live import Drained, Spool
from pipeline.producer.spool.ring import VOID, Segment, head_of
from pipeline.settings import PublisherSettings

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1


class OwnSpool:
    """The spool of this process, made when it is first needed: a `Journal` to a keeper. Safe from any thread."""

    def __init__(self, settings: PublisherSettings, producer_id: str) -> None:
        self._settings = settings
        self._producer_id = producer_id
        self._lock = threading.RLock()
        self._spool: Spool | None = None

    def get(self) -> Spool:
        """It; made now, if need be. Raises as `Spool` does."""
        if self._spool is None:
            with self._lock:
                if self._spool is None:
                    settings = self._settings
                    self._spool = Spool(
                        Path(settings.spool_dir),
                        self._producer_id,
                        bytes_max=settings.spool_bytes_max,
                        fsync=settings.durability == "disk",
                    )
        return self._spool

    @property
    def is_held(self) -> bool:
        """Whether this thread is just writing there: it was interrupted, and the others wait for it."""
        return self._spool is not None and self._spool.is_held

    @property
    def made(self) -> Spool | None:
        """It, if it is made."""
        return self._spool

    @property
    def used_bytes(self) -> int:
        """What it takes on the disk."""
        return self._spool.used_bytes if self._spool is not None else 0

    @property
    def ring_bytes(self) -> int:
        """What was recorded since the last commit."""
        return self._spool.ring_bytes if self._spool is not None else 0

    @property
    def pending_bytes(self) -> int:
        """What the last commit's pending deltas took."""
        return self._spool.pending_bytes if self._spool is not None else 0

    def drain(self) -> list[Drained]:
        """What was recorded since the last call."""
        return self._spool.drain() if self._spool is not None else []

    def commit(self, batches: Sequence[Sealed], pending: Sequence[Merged]) -> None:
        """Keep batches, and what is pending."""
        if batches or pending or self._spool is not None:
            self.get().commit(batches, pending)

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches."""
        self.get().acknowledge(batches)

    def load(self, partition: int, sequence: int) -> bytes:
        """The bytes of a batch."""
        return self.get().load(partition, sequence)

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        if self._spool is not None:
            self._spool.sync()

    def close(self) -> bool:
        """Let go; whether nothing is left in it."""
        return self._spool is None or self._spool.close()

    def abandon(self) -> None:
        """What a forked child does: it is the parent's."""
        if self._spool is not None:
            self._spool.abandon()


class _Series(NamedTuple):
    """Which series a number stands for; the cell that has it, as long as somebody can record to it."""

    view: View
    suffix: bytes
    crc: int
    cell: weakref.ref[Cell]


class SpoolBuffering:
    """The ring of a publisher. `drain` is the flusher's; the rest is for any thread."""

    due = False
    gauges = BufferGauges()

    def __init__(self, own: OwnSpool, account: Account) -> None:
        self._own = own
        self._account = account
        self._lock = threading.RLock()
        self._series: dict[int, _Series] = {}
        self._moving: deque[Drained] = deque()
        """On its way into cells: empty, unless that was interrupted."""
        self._left: deque[int] = deque()
        """Numbers of series to which nobody can record any more."""

    def cell_type(self, definition: Definition) -> type[Cell]:
        """What cells of a view are."""
        return CELLS["monotone" if definition.monotone else definition.kind]

    def opened(self, cell: Cell, count: int) -> bool:
        """Give a cell a number, if it has none; False if its `count` deltas are to be dropped."""
        assert isinstance(cell, SpooledCell)
        with self._lock:
            spool = self._own.get()
            if not cell.head or cell.spool is not spool:  # a fork in the midst of this has left the parent's
                number = self._account.insist(lambda: spool.define(cell.view.definition, cell.suffix), count)
                if number is None:
                    return False
                self._series[number] = _Series(cell.view, cell.suffix, cell.crc, weakref.ref(cell))
                cell.spool = spool
                cell.head = head_of(number, is_int=False)
        return True

    def left(self, cell: SpooledCell) -> None:
        """Nobody can record to a cell any more. For finalisers: one call, no lock."""
        if cell.spool is self._own.made:
            self._left.append(cell.head >> 1)

    def open_thread(self, cell: Cell, handle_type: object) -> None:
        """What waits in a thread's own list would not survive."""

    def drain(self) -> None:
        """Move everything that was recorded before the call into cells."""
        self._deliver()
        left = [self._left.popleft() for _ in range(len(self._left))]
        self._moving.extend(self._own.drain())
        self._deliver()
        for number in left:  # all that was recorded to them is drained now
            del self._series[number]
            self._own.get().undefine(number)

    def _deliver(self) -> None:
        while self._moving:
            drained = self._moving[0]
            view, suffix, crc, ref = self._series[drained.series_id]
            state, count = drained.state, drained.delta_count
            if drained.values is not None:
                state, count = view.collect(drained.values)
            cell = ref()
            if cell is None:
                orphan: Orphan = (suffix, crc, [], state, count)
                del self._moving[0]
                view.orphans.append(orphan)
            else:
                self._merge(cell, state, count)

    def _merge(self, cell: Cell, state: State, count: int) -> None:
        view = cell.view
        with view.lock:
            view.keep(cell)
            cell.merge_state(state, count)
            del self._moving[0]
            more = long_bytes(cell.pending) - cell.extra
            cell.extra += more
        self._account.force(more)

    def waiting_count(self) -> int:
        """Deltas that are not in cells yet: none is lost with them."""
        return 0

    def close(self) -> None:
        """Cells that are shut do not come here."""

    def forget(self, account: Account) -> bool:
        """What a forked child must do: the spool is the parent's."""
        self._own.abandon()
        return False


class SpooledCell(Cell):
    """A series whose deltas wait in the spool."""

    __slots__ = ("head", "spool")

    spool: Spool

    def __init__(self, view: View, labels: tuple[str, ...], suffix: bytes) -> None:
        super().__init__(view, labels, suffix)
        self.head = 0
        """Of its records of floats, plus 1 of ints; 0: it has no number yet."""

    def __del__(self) -> None:
        super().__del__()
        if self.head:
            self.view.buffering.left(self)  # type: ignore[attr-defined]  # a plain call: the interpreter may be ending

    def _record_slowly(self, delta: Any, *, constant: bool = True) -> bool:
        while self.charge or self.view.register(self):
            if self.head:
                return bool(self.view.account.insist(lambda: self._write(delta)))
        return False

    def _record_long(self, value: Any, size: int) -> None:
        self.view.check_fits(self.suffix, size)
        self._record_slowly(value)  # charged when it is drained

    def record_run(self, deltas: list[Any], state: State, reserved: Reservation) -> bool:
        """Record checked deltas at once; `state` is what they merge to. False if they were dropped."""
        while self.charge or self.view.register(self, reserved, len(deltas)):
            if self.head:
                return bool(self.view.account.insist(lambda: self._append(state, len(deltas)), len(deltas)))
        return False

    def _append(self, state: State, count: int) -> bool:
        self.spool.append_state(self.head >> 1, state, count)
        return True

    def _write(self, delta: Any) -> bool:
        while True:
            segment = self.spool.segment
            if type(delta) is float:
                words: Any = segment.values
            elif type(delta) is int and _INT_MIN <= delta <= _INT_MAX:
                words = segment.ints
            else:
                return self._append(self.view.kind.collect([delta]), 1)
            i = segment.next()
            try:
                words[i] = delta
                segment.heads[i] = self.head + (words is segment.ints)
                return True
            except (IndexError, ValueError):  # full, or closed
                self.spool.rotate(segment)
            except BaseException:
                _void(segment, i)
                raise

    def forget(self) -> None:
        """Drop everything, as a forked child must."""
        super().forget()
        self.head = 0


def _void(segment: Segment, i: int) -> None:
    """Say that nothing was recorded there."""
    with suppress(IndexError, ValueError):
        segment.heads[i] = VOID


class SpooledSumCell(SpooledCell, SumCell):
    """A series of a sum view, whose deltas survive the process."""

    __slots__ = ()

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        if type(value) is float and value - value == 0.0 and self.charge:
            segment = self.spool.segment
            i = segment.next()
            try:  # the value first: a record counts once its head is there
                segment.values[i] = value
                segment.heads[i] = self.head
                return
            except (IndexError, ValueError):  # full, or closed
                pass
            except BaseException:
                _void(segment, i)
                raise
        self._record(value)


class SpooledMonotoneCell(SpooledCell, MonotoneCell):
    """A series of a monotone sum view, whose deltas survive the process."""

    __slots__ = ()

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number from 0, `BufferFull` as `on_full` says."""
        if type(value) is float and value >= 0.0 and value - value == 0.0 and self.charge:
            segment = self.spool.segment
            i = segment.next()
            try:  # as above: a call to share these lines would cost as much as they do
                segment.values[i] = value
                segment.heads[i] = self.head
                return
            except (IndexError, ValueError):
                pass
            except BaseException:
                _void(segment, i)
                raise
        self._record(value)


class SpooledObserveCell(SpooledCell, ObserveCell):
    """A series of a min, max or mean view, whose deltas survive the process."""

    __slots__ = ()

    def observe(self, value: float, /) -> None:
        """Take `value` into account. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        if type(value) is float and value - value == 0.0 and self.charge:
            segment = self.spool.segment
            i = segment.next()
            try:  # as above
                segment.values[i] = value
                segment.heads[i] = self.head
                return
            except (IndexError, ValueError):
                pass
            except BaseException:
                _void(segment, i)
                raise
        self._record(value)


class SpooledLastCell(SpooledCell, LastCell):
    """A series of a last view, whose values survive the process."""

    __slots__ = ()

    def set(self, value: str | float | bool | None, ts_ms: int | None = None) -> None:
        """Set the value, as of `ts_ms` (milliseconds since 1970; None: now).

        Raises `Invalid` for what is not text, a finite number, a bool or None, `BufferFull` as `on_full` says.
        """
        delta = self.view.kind.check(value, self.view.now_ms() if ts_ms is None else ts_ms)
        if size := long_bytes(delta):
            self._record_long(delta, size)
        else:
            self._record_slowly(delta)


CELLS: Mapping[str, type[Cell]] = {
    "sum": SpooledSumCell, "monotone": SpooledMonotoneCell, "min": SpooledObserveCell, "max": SpooledObserveCell,
    "mean": SpooledObserveCell, "last": SpooledLastCell,
}  # fmt: skip
"""The cell class of each kind, and of monotone sums."""
