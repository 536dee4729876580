"""Views: which series this process records to, and how the flusher gets at what waits in their cells.

A cell is registered, and charged, when it is first recorded to, and let go of when it was silent for long; a handle that
somebody keeps registers it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from pipeline.core.merge import Kind, State, kind_of
from pipeline.core.record import Definition, canonical, check_label_values, series_prefix, series_suffix
from pipeline.core.view import describe
from pipeline.errors import Invalid
from pipeline.producer.account import Account
from pipeline.producer.cell import CELL_LIMIT_FIRST, Cell, LastCell, MonotoneCell, ObserveCell, SumCell
from pipeline.producer.sealing import ENTRY_BYTES, Merged

CELL_BYTES = 600
"""What a series costs: its cell, list, labels, key and places in dicts (measured; see tests/producer)."""


class View:
    """A view that this process records to. Get it from a `Publisher`; share it between threads."""

    cell_type: type[Cell] = Cell

    def __init__(
        self, definition: Definition, account: Account, now_ms: Callable[[], int], on_register: Callable[[], None]
    ) -> None:
        self.definition = canonical(definition)
        """As it travels. `declared` has the labels in the order in which this process names them."""
        self.declared = definition
        self._order = [definition.labels.index(name) for name in self.definition.labels]
        self.kind: Kind = kind_of(definition)
        self.prefix = series_prefix(definition.view)
        self.account = account
        self.now_ms = now_ms
        self.lock = threading.RLock()
        self.orphans: list[tuple[bytes, int, list[Any], State, int]] = []
        """What was left in cells that nobody holds any more."""
        self.lost_count = 0
        """Deltas that were no numbers any more when they were merged."""
        self._on_register = on_register
        self._by_labels: dict[tuple[str, ...], Cell] = {}
        self._registered: dict[Cell, None] = {}
        self._parked: weakref.WeakSet[Cell] = weakref.WeakSet()
        """Cells that were let go of while somebody holds them: in that moment, a delta can still reach one."""

    def collect(self, run: list[Any]) -> tuple[State, int]:
        """The state of raw deltas, and of how many: objects that are numbers no more, since they were recorded, are lost."""
        try:
            return self.kind.collect(run), len(run)
        except MemoryError:
            raise
        except Exception:
            good = []
            for delta in run:
                with suppress(Invalid):
                    good.append(delta if type(delta) is tuple else self.kind.check(delta, 0))
            self.lost_count += len(run) - len(good)
            return self.kind.collect(good) if good else None, len(good)

    def __repr__(self) -> str:
        return f"<view {self.definition.view}: {describe(self.declared)}>"

    def __len__(self) -> int:
        return len(self._registered)

    def _cell(self, values: tuple[Any, ...], names: Mapping[str, Any]) -> Any:
        if names:
            if values:
                raise Invalid(f"view {self.definition.view}: label values by position or by name, not both")
            values = self._by_name(names)
        try:
            cell = self._by_labels.get(values)
        except TypeError:  # not hashable, so not text either: let the check say it
            cell = None
        if cell is None:
            labels = check_label_values(self.declared, values)
            cell = self.cell_type(self, labels, series_suffix([labels[i] for i in self._order]))
        return cell

    def _by_name(self, names: Mapping[str, Any]) -> tuple[Any, ...]:
        labels = self.declared.labels
        if len(names) == len(labels):
            try:
                return tuple([names[label] for label in labels])
            except KeyError:
                pass
        raise Invalid(f"view {self.definition.view} has labels {list(labels)}; got {list(names)}")

    def register(self, cell: Cell) -> bool:
        """Let the flusher know of a cell, and charge it; False if the account is full and the delta is to be dropped."""
        self._on_register()
        charge = CELL_BYTES + 2 * len(cell.suffix) + CELL_LIMIT_FIRST * cell.delta_bytes
        if not self.account.charge(charge, ENTRY_BYTES + len(cell.suffix)):
            return False
        back = charge
        try:
            with self.lock:
                self._on_register()  # again: the publisher can have been closed while this waited
                self._registered[cell] = None  # before it opens, so that a fork in between finds it
                if not cell.charge:
                    back = 0
                    cell.charge = charge
                    cell.seen_s = 0.0
                    cell._limit = CELL_LIMIT_FIRST
                self._by_labels.setdefault(cell.labels, cell)
        finally:
            self.account.refund(back)
        return True

    # For the flusher

    def look(self, *, now_s: float, idle_s: float, parked: bool) -> list[Cell]:
        """The cells that hold deltas. Lets go of those that held none for longer than `idle_s`.

        `parked` also looks into cells that were let go of while somebody still holds them.
        """
        found: list[Cell] = []
        silent: list[Cell] = []
        for cell in [*self._registered]:
            if cell._values or cell.pending_count:
                cell.seen_s = now_s
                found.append(cell)
            elif not cell.seen_s:
                cell.seen_s = now_s
            elif now_s - cell.seen_s > idle_s:
                silent.append(cell)
        self._let_go(silent)
        for cell in [*self._parked] if parked else ():
            if cell in self._registered:
                self._parked.discard(cell)
            elif cell._values or cell.pending_count:
                found.append(cell)
        return found

    def _let_go(self, cells: list[Cell]) -> None:
        back = 0
        try:
            for cell in cells:
                with self.lock:
                    back += self._part_with(cell)
        finally:
            self.account.refund(back)

    def _part_with(self, cell: Cell) -> int:
        """Let go of a cell, unless deltas wait in it: the bytes to refund. The caller holds `lock`."""
        if cell._values or cell.pending_count or cell not in self._registered:
            return 0
        self._parked.add(cell)  # first, so that a fork in between finds it
        back = cell.shut()
        del self._registered[cell]
        if self._by_labels.get(cell.labels) is cell:
            del self._by_labels[cell.labels]
        return back

    def drain(
        self, cells: list[Cell], into: list[Merged], *, partition_count: int, busy: Collection[int], pressed: bool
    ) -> bool:
        """Merge what waits in `cells`, and hand over what does not route to a `busy` partition; whether that was all.

        With a `partition_count` of 0 nothing is handed over. If memory is `pressed`, cells give back all that they can.
        """
        everything = True
        back = 0
        try:
            for cell in cells:
                with self.lock:
                    if partition_count and cell.crc % partition_count not in busy:
                        merged = cell.take()
                        if merged is not None:
                            into.append(merged)
                        back += cell.extra
                        cell.extra = 0
                    else:
                        cell.merge_values()
                        everything = False
                    if pressed:
                        back += self._part_with(cell)
                        if cell._limit > CELL_LIMIT_FIRST:
                            cell.room(CELL_LIMIT_FIRST)
        finally:
            self.account.refund(back)
        return self._drain_orphans(into, partition_count, busy) and everything

    def _drain_orphans(self, into: list[Merged], partition_count: int, busy: Collection[int]) -> bool:
        kept = 0
        for _ in range(len(self.orphans)):
            suffix, crc, values, pending, pending_count = self.orphans[kept]
            if not partition_count or crc % partition_count in busy:
                kept += 1
                continue
            merged = [Merged(self.definition, suffix, crc, pending, pending_count)] if pending_count else []
            state, count = self.collect(values) if values else (None, 0)
            if count:
                merged.append(Merged(self.definition, suffix, crc, state, count))
            del self.orphans[kept]
            into += merged
        return not kept

    def waiting_count(self) -> int:
        """Deltas that were not handed over."""
        with self.lock:
            return sum([len(cell._values) + cell.pending_count for cell in self._registered])

    def shut(self) -> None:
        """No more recording: the publisher closes. What waits is still drained."""
        back = 0
        with self.lock:
            for cell in [*self._registered]:
                back += cell.shut()
        self.account.refund(back)

    def forget(self, account: Account) -> None:
        """What a forked child must do: the deltas are the parent's to send. No other thread runs in the child yet."""
        self.account = account
        self.lock = threading.RLock()
        for cell in [*self._registered, *self._parked]:
            cell.forget()
        self._registered, self._by_labels, self.orphans = {}, {}, []
        self._parked = weakref.WeakSet()


class SumView(View):
    """Totals, by series."""

    cell_type = SumCell

    def __init__(self, definition: Definition, *owner: Any) -> None:
        super().__init__(definition, *owner)
        if definition.monotone:
            self.cell_type = MonotoneCell

    def labels(self, /, *values: str, **names: str) -> SumCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def add(self, value: float = 1, /, **labels: str) -> None:
        """Add `value` to the series with these labels; not below 0 if the view is monotone.

        Raises `Invalid`, or `BufferFull` as `on_full` says.
        """
        self._cell((), labels).add(value)


class ObserveView(View):
    """Smallest, largest or mean observation, by series."""

    cell_type = ObserveCell

    def labels(self, /, *values: str, **names: str) -> ObserveCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def observe(self, value: float, /, **labels: str) -> None:
        """Observe `value` in the series with these labels. Raises `Invalid`, or `BufferFull` as `on_full` says."""
        self._cell((), labels).observe(value)


class LastView(View):
    """The newest value, by series."""

    cell_type = LastCell

    def labels(self, /, *values: str, **names: str) -> LastCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def set(self, value: str | float | bool | None, /, ts_ms: int | None = None, **labels: str) -> None:
        """Set the series with these labels, as of `ts_ms` (None: now). Raises `Invalid` or `BufferFull`.

        A label named `ts_ms` can only be given to `labels`.
        """
        self._cell((), labels).set(value, ts_ms)


VIEW_TYPES: Mapping[str, type[View]] = {
    "sum": SumView,
    "min": ObserveView,
    "max": ObserveView,
    "mean": ObserveView,
    "last": LastView,
}
"""The view class of each kind."""
