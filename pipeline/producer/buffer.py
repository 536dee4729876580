"""Views: which series this process records to, and how the flusher gets at what waits in their cells.

A cell is registered, and charged, when it is first recorded to, and let go of when it was silent for long; a handle that
somebody keeps registers it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

from pipeline.core.merge import Kind, State, kind_of
from pipeline.core.record import Definition, canonical, check_label_values, series_prefix, series_suffix
from pipeline.core.view import describe
from pipeline.errors import Invalid
from pipeline.producer.account import Account
from pipeline.producer.batch import Reservation
from pipeline.producer.cell import CELL_LIMIT_FIRST, Cell
from pipeline.producer.handle import Deltas, HandleT
from pipeline.producer.sealing import BATCH_BYTES, ENTRY_BYTES, GROUP_BYTES, Merged, Run
from pipeline.producer.snapshot import LocalView, Totals

_LOCKED_COUNT = 32
"""Cells that are drained while the lock is held once."""
CELL_BYTES = 600
"""What a series costs: its cell, list, labels, key and places in dicts (measured; see tests/producer)."""
_IDLE_LOOK_S = 1.0
"""How often to look for cells that were silent for long."""

Orphan = tuple[bytes, int, list[Any], State, int]
"""Suffix, CRC-32 of the key, raw deltas, and the state of so many more."""


class Buffering(Protocol):
    """Where deltas wait before they are in their cells; see `pipeline.producer.buffering`.

    The methods down to `open_thread` are for any thread, the others for the flusher.
    """

    def cell_type(self, definition: Definition) -> type[Cell]:
        """What cells of a view are."""
        ...

    def opened(self, cell: Cell, count: int) -> bool:
        """A cell is about to be registered; False if `count` deltas are dropped. May raise what `add` may raise."""
        ...

    def open_thread(self, cell: Cell, handle_type: Callable[[Deltas], HandleT]) -> HandleT | None:
        """A handle of this thread's own for a cell; None where there are none."""
        ...

    def drain(self) -> None:
        """Move everything that was recorded before the call into cells."""
        ...

    @property
    def due(self) -> bool:
        """Whether the next drain should come early."""
        ...

    @property
    def gauges(self) -> BufferGauges:
        """How full it is."""
        ...

    def waiting_count(self) -> int:
        """Deltas that are not in cells yet."""
        ...

    def close(self) -> None:
        """Take no more: the publisher closes."""
        ...

    def forget(self, account: Account) -> bool:
        """What a forked child must do: the deltas are the parent's to send. Whether handles of the parent live on in it."""
        ...


class BufferGauges(NamedTuple):
    """What a mode of buffering has to show."""

    thread_count: int = 0
    """Lists that threads have for themselves."""
    shard_count: int = 0
    utilisation: float = 0.0
    """How full the fullest shard was: 0 to 1."""
    contended_count: int = 0
    """How often a thread found its shard full."""


class Owner(NamedTuple):
    """What a view has from its publisher."""

    account: Account
    buffering: Buffering
    totals: Totals
    now_ms: Callable[[], int]
    monotonic_s: Callable[[], float]
    on_register: Callable[[], None]


class View:
    """A view that this process records to. Get it from a `Publisher`; share it between threads."""

    def __init__(self, definition: Definition, owner: Owner) -> None:
        account, self.buffering, totals, now_ms, self.monotonic_s, on_register = owner
        self.definition = canonical(definition)
        """As it travels. `declared` has the labels in the order in which this process names them."""
        self.declared = definition
        self._order = [definition.labels.index(name) for name in self.definition.labels]
        self.kind: Kind = kind_of(definition)
        self.cell_type = self.buffering.cell_type(definition)
        self.totals = totals.of(definition, self.definition)
        self.prefix = series_prefix(definition.view)
        self.account = account
        self.now_ms = now_ms
        self.lock = threading.RLock()
        self.orphans: list[Orphan] = []
        """What was left in cells that nobody holds any more."""
        self.lost_count = 0
        """Deltas that were no numbers any more when they were merged."""
        self._on_register = on_register
        self._shut = False
        self._idle_looked_s = 0.0
        self._by_labels: dict[tuple[str, ...], Cell] = {}
        self._registered: dict[Cell, None] = {}
        self._parked: weakref.WeakSet[Cell] = weakref.WeakSet()
        """Cells that were let go of while somebody holds them: in that moment, a delta can still reach one."""
        self._late: weakref.WeakSet[Cell] = weakref.WeakSet()
        """Those of them that one did reach, while it can't be sealed."""

    def collect(self, run: list[Any]) -> tuple[State, int]:
        """The state of raw deltas, and of how many: objects that are numbers no more, since they were recorded, are lost."""
        try:
            return self.kind.collect(run), len(run)
        except MemoryError:
            raise
        except Exception:
            return self._collect_good(run)

    def collect_unchecked(self, run: list[Any]) -> tuple[State, int]:
        """As `collect`, of what nobody has looked at yet."""
        if self.kind.are_plain(run):
            return self.collect(run)
        return self._collect_good(run)

    def _collect_good(self, run: list[Any]) -> tuple[State, int]:
        good = []
        for delta in run:
            kind = type(delta)
            try:
                good.append(delta if kind is tuple else self.kind.check(delta, 0))
            except (MemoryError, Invalid) as error:
                if isinstance(error, MemoryError):
                    raise
            except Exception:
                # What an object raises when it is asked for its number, it always will. A plain number raises nothing:
                # then it is a signal handler that does, and the delta stays.
                if kind is int or kind is float:
                    raise
        with self.lock:
            self.lost_count += len(run) - len(good)
        return self.kind.collect(good) if good else None, len(good)

    def take_lost_count(self) -> int:
        """How many were lost since the last call."""
        with self.lock:
            lost, self.lost_count = self.lost_count, 0
        return lost

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
            suffix = series_suffix([labels[i] for i in self._order])
            self.check_fits(suffix, 0)
            cell = self.cell_type(self, labels, suffix)
        return cell

    def _by_name(self, names: Mapping[str, Any]) -> tuple[Any, ...]:
        labels = self.declared.labels
        if len(names) == len(labels):
            try:
                return tuple([names[label] for label in labels])
            except KeyError:
                pass
        raise Invalid(f"view {self.definition.view} has labels {list(labels)}; got {list(names)}")

    def open(self) -> None:
        """Raise `Invalid` if the publisher is closed, and see to it that its threads run."""
        self._on_register()

    def cell_bytes(self, cell: Cell) -> int:
        """What registering `cell` is charged for."""
        return CELL_BYTES + 2 * len(cell.suffix) + CELL_LIMIT_FIRST * cell.delta_bytes

    def register(self, cell: Cell, reserved: Reservation | None = None, count: int = 1) -> bool:
        """Let the flusher know of a cell, and charge it; False if its `count` deltas are to be dropped."""
        self._on_register()
        account = reserved or self.account
        charge = self.cell_bytes(cell)
        if not self.buffering.opened(cell, count) or not account.charge(charge, ENTRY_BYTES + len(cell.suffix)):
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
            account.refund(back)
        return True

    def check_fits(self, suffix: bytes, size: int) -> None:
        """Raise `Invalid` if a value of so many bytes is too large for any batch that the log takes."""
        definition = self.definition
        names = len(definition.view) + sum([3 + len(label) for label in definition.labels])
        needed = BATCH_BYTES + GROUP_BYTES + names + ENTRY_BYTES + len(suffix) + size
        if needed > self.account.message_bytes_max:
            most = self.account.message_bytes_max
            raise Invalid(f"view {definition.view}: a value of {size} bytes; the log takes batches of up to {most} only")

    def open_thread(self, cell: Cell, handle_type: Callable[[Deltas], HandleT]) -> HandleT | None:
        """A handle of a thread's own for a cell, charged; None if cells are as good."""
        self._on_register()
        handle = self.buffering.open_thread(cell, handle_type)
        self._on_register()  # again: a publisher that was closed meanwhile may not know of this handle
        return handle

    def local(self) -> LocalView:
        """What this process alone has recorded since it started, as of the last snapshot. Takes no lock."""
        return self.totals.local()

    # For the flusher

    def keep(self, cell: Cell) -> None:
        """See to it that the flusher knows a cell to which deltas came without being charged. The caller holds `lock`."""
        if cell in self._registered:
            return
        charge = 0 if self._shut else self.cell_bytes(cell)
        self.account.force(charge)
        self._registered[cell] = None
        cell.charge = charge
        cell.seen_s = 0.0
        self._by_labels.setdefault(cell.labels, cell)

    def look(self, *, now_s: float, idle_s: float, parked: bool) -> list[Cell]:
        """The cells that hold deltas. Lets go of those that held none for longer than `idle_s`.

        `parked` also looks into cells that were let go of while somebody still holds them.
        """
        cells = [*self._registered]
        found = [cell for cell in cells if cell._values or cell.pending_count]
        for cell in found:
            cell.seen_s = now_s
        if now_s - self._idle_looked_s >= min(_IDLE_LOOK_S, idle_s / 4):
            self._idle_looked_s = now_s
            self._let_go(self._silent(cells, now_s, idle_s))
        with self.lock:  # a thread whose memory is full lets go of cells too
            late = [*(self._parked if parked else self._late)]
        for cell in late:
            self._late.discard(cell)
            if cell in self._registered:
                self._parked.discard(cell)
            elif cell._values or cell.pending_count:
                self._late.add(cell)
                found.append(cell)
        return found

    def _silent(self, cells: list[Cell], now_s: float, idle_s: float) -> list[Cell]:
        """Those that held no deltas for longer than `idle_s`."""
        silent: list[Cell] = []
        for cell in cells:
            if not cell.seen_s:
                cell.seen_s = now_s
            elif now_s - cell.seen_s > idle_s:
                silent.append(cell)
        return silent

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

    def drain(self, cells: list[Cell], into: Run, *, partition_count: int, busy: Collection[int], pressed: bool) -> bool:
        """Merge what waits in `cells`, and hand over what does not route to a `busy` partition; whether that was all.

        With a `partition_count` of 0 nothing is handed over. If memory is `pressed`, cells give back all that they can.
        """
        everything = True
        single = partition_count > 0 and self.kind.single and not pressed
        back = 0
        try:
            for start in range(0, len(cells), _LOCKED_COUNT):
                with self.lock:
                    for cell in cells[start : start + _LOCKED_COUNT]:
                        if partition_count and cell.crc % partition_count not in busy:
                            if single and len(cell._values) == 1 and cell.take_single(into):
                                continue
                            cell.take(into)
                            back += cell.extra
                            cell.extra = 0
                        else:
                            cell.merge_values()
                            everything = False
                        if pressed:
                            back += self._part_with(cell)
                            if cell._limit > CELL_LIMIT_FIRST:
                                cell.room(CELL_LIMIT_FIRST)
        except BaseException:
            into.even()
            raise
        finally:
            self.account.refund(back)
        if not partition_count:  # then this can be another thread than the flusher, whose they are
            return everything and not self.orphans
        return self._drain_orphans(into, partition_count, busy) and everything

    def waiting(self) -> list[Merged]:
        """What is merged and was not handed over: it stays here."""
        with self.lock:
            found = [
                Merged(self.definition, cell.suffix, cell.crc, cell.pending, cell.pending_count)
                for cell in [*self._registered]
                if cell.pending_count
            ]
            for suffix, crc, values, pending, pending_count in [*self.orphans]:
                if pending_count:
                    found.append(Merged(self.definition, suffix, crc, pending, pending_count))
                state, count = self.collect(values) if values else (None, 0)
                if count:
                    found.append(Merged(self.definition, suffix, crc, state, count))
            return found

    def publish(self, cells: list[Cell], now_s: float) -> None:
        """Have `local` know what was sealed, and what is merged in these cells."""
        pending = [(cell.suffix, cell.pending) for cell in cells if cell.pending_count]  # nobody else takes it away
        for suffix, _, values, state, count in [*self.orphans]:
            if count:
                pending.append((suffix, state))
            state, count = self.collect(values) if values else (None, 0)
            if count:
                pending.append((suffix, state))
        self.totals.publish(pending, now_s)

    def _drain_orphans(self, into: Run, partition_count: int, busy: Collection[int]) -> bool:
        kept = 0
        for _ in range(len(self.orphans)):
            suffix, crc, values, pending, pending_count = self.orphans[kept]
            if crc % partition_count in busy:
                kept += 1
                continue
            state, count = self.collect(values) if values else (None, 0)
            size = len(into)
            try:
                if pending_count:
                    into.add(suffix, crc, pending, pending_count)
                if count:
                    into.add(suffix, crc, state, count)
            except BaseException:
                into.even(size)
                raise
            del self.orphans[kept]
        return not kept

    def waiting_count(self) -> int:
        """Deltas that were not handed over."""
        with self.lock:
            return sum([len(cell._values) + cell.pending_count for cell in self._registered])

    def shut(self) -> None:
        """No more recording: the publisher closes. What waits is still drained."""
        self._shut = True
        back = 0
        with self.lock:
            for cell in [*self._registered]:
                back += cell.shut()
        self.account.refund(back)

    def forget(self, owner: Owner) -> None:
        """What a forked child must do: the deltas are the parent's to send. No other thread runs in the child yet."""
        self.account = owner.account
        self.buffering = owner.buffering
        self.totals = owner.totals.of(self.declared, self.definition)
        self.lock = threading.RLock()
        for cell in [*self._registered, *self._parked]:
            cell.forget()
        self._registered, self._by_labels, self.orphans = {}, {}, []
        self._parked, self._late = weakref.WeakSet(), weakref.WeakSet()
