"""Sharded buffering: a few lists for all series and threads, so that memory is bounded however many of either there are.

A thread appends (cell, value) to the shard that its identity hashes to: one C function, no lock. The flusher moves a counted
prefix of each shard into the cells, shards in turn, beginning with another one each time. Further drainers, on builds that
run threads in parallel, have shards of their own and help the fullest when those are empty (`drain_threads`).

A thread that finds its shard full has met contention: it lets the flusher run for a moment, and if that does not help it
goes on to the cell's own list, which it merges itself when that is full too. The number of shards doubles while that
happens in more than one of `_GROW_EVERY` deltas, and halves when it has not happened for long.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from itertools import count
from math import isfinite
from threading import get_ident
from typing import Any

from pipeline.core.record import Definition
from pipeline.producer.account import Account
from pipeline.producer.buffer import BufferGauges
from pipeline.producer.cell import _NO_NUMBER, Cell, LastCell, MonotoneCell, ObserveCell, SumCell

TABLE_SIZE = 1_021
"""Identities are told apart by so many values (`add` has the number, too); a table says which shard each has.

They are addresses, in steps that depend on the system, many of them multiples of large powers of two: so it is a prime.
"""
_SPREAD = 40_503
"""2**16 divided by the golden ratio: multiples of it, modulo 2**16, lie far apart (Knuth's multiplicative hash)."""
_SHARDS_FIRST = 4
_PAUSE_S = 0.002
"""How long a thread that finds its shard full waits for the drainers."""
_GROW_EVERY = 1_000
_SHRINK_AFTER = 100
"""Drains without contention before the number of shards halves."""
_DELTA_BYTES = 120
"""What a waiting delta costs: a float, a pair, and its place in the list."""

Items = list[tuple[Cell, Any]]


class _Shard:
    __slots__ = ("delta_count", "items", "lock", "moving")

    def __init__(self) -> None:
        self.items: Items = []
        self.moving: dict[Cell, list[Any]] = {}
        """On its way into cells: empty, unless that was interrupted."""
        self.lock = threading.RLock()
        """Held by whoever drains it."""
        self.delta_count = 0
        """Deltas drained."""


class ShardedBuffering:
    """The shards of a publisher. `drain` is for its flusher, and `help_out` for further drainers."""

    def __init__(self, account: Account, *, shards_max: int, shard_deltas_max: int, drain_threads: int = 1) -> None:
        self.table: tuple[Items, ...] = ()
        """By a thread's identity modulo `TABLE_SIZE`: the list of its shard."""
        self.limit = shard_deltas_max
        self.drain_threads = drain_threads
        """How many drainers there are, the flusher among them."""
        self._shards_max = min(shards_max, TABLE_SIZE)
        self._shards: list[_Shard] = []
        self._start(account)

    def _start(self, account: Account) -> None:
        self._account = account
        self._contended = count()
        self._contended_count = self._seen_contended = 0
        self._calm = self._turn = self._seen_deltas = self._fullest_count = 0
        self.shard_count = min(_SHARDS_FIRST, self._shards_max)
        share = account.bytes_max // 8 // (self.shard_count * _DELTA_BYTES)
        self.limit = max(8, min(self.limit, share))
        self._closed = False
        self._charge = self.shard_count * self._shard_bytes
        account.force(self._charge)
        self._lay_out()

    @property
    def _shard_bytes(self) -> int:
        return self.limit * _DELTA_BYTES

    def _lay_out(self) -> None:
        """Spread the threads over `shard_count` shards. The others are kept, and drained: a thread can still hold one."""
        while len(self._shards) < self.shard_count:
            self._shards.append(_Shard())
        spread = [(i * _SPREAD & 0xFFFF) * self.shard_count >> 16 for i in range(TABLE_SIZE)]
        self.table = tuple([self._shards[i].items for i in spread])

    def cell_type(self, definition: Definition) -> type[Cell]:
        """What cells of a view are."""
        return CELLS["monotone" if definition.monotone else definition.kind]

    def opened(self, cell: Cell, count: int) -> bool:
        """Nothing else is needed."""
        return True

    def open_thread(self, cell: Cell, handle_type: object) -> None:
        """Threads have no lists of their own: that is what shards are for."""

    def home(self) -> Items:
        """The list of this thread's shard, where it is not hot; `add` has the same without a call."""
        return self.table[get_ident() % TABLE_SIZE]

    def contend(self) -> bool:
        """A thread has found its shard full: let the drainers run for a moment. Whether there is room now."""
        self._contended_count = next(self._contended) + 1
        self._account.wake()
        return self._account.pause(lambda: len(self.home()) < self.limit, _PAUSE_S)

    # For those who drain

    def drain(self) -> None:
        """Move everything that was recorded before the call into cells."""
        shards = [*self._shards]
        self._turn += 1
        self._fullest_count = max([len(shard.items) for shard in shards])
        for i in range(len(shards)):
            self._drain_shard(shards[(i + self._turn) % len(shards)])
        self._adapt()

    def help_out(self, number: int) -> int:
        """Drain what belongs to one of the drainers, or else the fullest shard; how many deltas that were."""
        mine = self._shards[number :: self.drain_threads]
        done = sum([self._drain_shard(shard) for shard in mine if len(shard.items) > self.limit // 4])
        if done:
            return done
        fullest = max([*self._shards], key=lambda shard: len(shard.items))
        return self._drain_shard(fullest) if len(fullest.items) > self.limit // 2 else 0

    def _drain_shard(self, shard: _Shard) -> int:
        with shard.lock:
            _deliver(shard)
            items = shard.items
            size = len(items)
            moving: dict[Cell, list[Any]] = {}
            for cell, delta in items[:size]:
                run = moving.get(cell)
                if run is None:
                    moving[cell] = [delta]
                else:
                    run.append(delta)
            del items[:size]
            shard.moving = moving
            shard.delta_count += size
            _deliver(shard)
            return size

    def _adapt(self) -> None:
        """More shards while threads find theirs full, fewer when they have not for long."""
        contended = self._contended_count - self._seen_contended
        self._seen_contended += contended
        deltas = sum([shard.delta_count for shard in self._shards]) - self._seen_deltas
        self._seen_deltas += deltas
        if self._closed:
            return
        if contended * _GROW_EVERY > deltas and contended:
            self._calm = 0
            more = self.shard_count * self._shard_bytes
            if 2 * self.shard_count <= self._shards_max and self._account.try_charge(more):
                self._charge += more
                self.shard_count *= 2
                self._lay_out()
        else:
            self._calm += 1
            if self._calm > _SHRINK_AFTER and self.shard_count > 1:
                self._calm = 0
                self.shard_count //= 2
                self._lay_out()
                self._charge -= self.shard_count * self._shard_bytes
                self._account.refund(self.shard_count * self._shard_bytes)

    @property
    def due(self) -> bool:
        """Whether a shard is more than half full."""
        return any(len(shard.items) > self.limit // 2 for shard in self._shards)

    @property
    def gauges(self) -> BufferGauges:
        """How many shards there are, how full, and how often a thread found its own full."""
        utilisation = min(1.0, self._fullest_count / self.limit)
        return BufferGauges(0, self.shard_count, utilisation, self._contended_count)

    def waiting_count(self) -> int:
        """Deltas that are not in cells yet."""
        return sum([len(shard.items) + sum(map(len, [*shard.moving.values()])) for shard in self._shards])

    def close(self) -> None:
        """Take no more: cells that are shut do not come here. What the shards were charged is given back."""
        self._closed = True
        back, self._charge = self._charge, 0
        self._account.refund(back)

    def forget(self, account: Account) -> bool:
        """What a forked child must do: the deltas are the parent's to send."""
        self._shards = []
        self._start(account)
        return False


def _deliver(shard: _Shard) -> None:
    """Merge what is moving into the cells. If that fails, the rest goes on moving."""
    moving = shard.moving
    for cell in [*moving]:
        view = cell.view
        state, good_count = view.collect(moving[cell])
        if good_count:
            with view.lock:
                view.keep(cell)
                cell.merge_state(state, good_count)
        del moving[cell]


class _ShardedCell(Cell):
    __slots__ = ()

    def _record_slowly(self, delta: Any, *, constant: bool = True) -> bool:
        if constant and self._limit:
            shards: ShardedBuffering = self.view.buffering  # type: ignore[assignment]
            if shards.contend() and self._limit:
                shards.home().append((self, delta))
                return True
            if len(self._values) < self._limit:
                self._values.append(delta)
                return True
        return super()._record_slowly(delta, constant=constant)


class ShardedSumCell(_ShardedCell, SumCell):
    """A series of a sum view, whose deltas wait in shards."""

    __slots__ = ()

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        try:
            if not isfinite(value):
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        shards: ShardedBuffering = self.view.buffering  # type: ignore[assignment]
        items = shards.table[get_ident() % 1021]
        if self._limit and len(items) < shards.limit:
            items.append((self, value))
        else:
            self._record(value)


class ShardedMonotoneCell(_ShardedCell, MonotoneCell):
    """A series of a monotone sum view, whose deltas wait in shards."""

    __slots__ = ()

    def add(self, value: float = 1, /) -> None:
        """Add `value`. Raises `Invalid` for what is not a finite number from 0, `BufferFull` as `on_full` says."""
        try:  # as above: a call to share these lines would cost as much as they do
            if not isfinite(value) or value < 0:
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        shards: ShardedBuffering = self.view.buffering  # type: ignore[assignment]
        items = shards.table[get_ident() % 1021]
        if self._limit and len(items) < shards.limit:
            items.append((self, value))
        else:
            self._record(value)


class ShardedObserveCell(_ShardedCell, ObserveCell):
    """A series of a min, max or mean view, whose deltas wait in shards."""

    __slots__ = ()

    def observe(self, value: float, /) -> None:
        """Take `value` into account. Raises `Invalid` for what is not a finite number, `BufferFull` as `on_full` says."""
        try:  # as above
            if not isfinite(value):
                return self._record(value)
        except _NO_NUMBER:
            return self._record(value)
        shards: ShardedBuffering = self.view.buffering  # type: ignore[assignment]
        items = shards.table[get_ident() % 1021]
        if self._limit and len(items) < shards.limit:
            items.append((self, value))
        else:
            self._record(value)


CELLS: Mapping[str, type[Cell]] = {
    "sum": ShardedSumCell, "monotone": ShardedMonotoneCell, "min": ShardedObserveCell, "max": ShardedObserveCell,
    "mean": ShardedObserveCell, "last": LastCell,
}  # fmt: skip
"""The cell class of each kind, and of monotone sums. A `last` cell merges what it is set to in its own list."""
