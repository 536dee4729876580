"""The modes of buffering: where a delta waits between its recording thread and the cell that it belongs to.

`thread`: in the cell's own list, or in a list that a thread has for itself (`handle`). `sharded` is in `shards`; what
survives the process is in `spooling`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.core.record import Definition
from pipeline.errors import BufferFull
from pipeline.producer.account import Account
from pipeline.producer.buffer import BufferGauges, Buffering
from pipeline.producer.cell import Cell, LastCell, MonotoneCell, ObserveCell, SumCell
from pipeline.producer.handle import THREAD_BYTES, Deltas, HandleT, ThreadLists
from pipeline.producer.shards import ShardedBuffering
from pipeline.settings import PublisherSettings

if TYPE_CHECKING:
    from pipeline.producer.spooling import OwnSpool

_DRAIN_THREADS_MAX = 4


class ThreadBuffering:
    """Lists of cells, and of threads. `drain` and `due` are the flusher's; the rest is for any thread."""

    cells: Mapping[str, type[Cell]] = {
        "sum": SumCell, "monotone": MonotoneCell, "min": ObserveCell, "max": ObserveCell, "mean": ObserveCell,
        "last": LastCell,
    }  # fmt: skip
    """The cell class of each kind, and of monotone sums."""

    def __init__(self, account: Account, thread_deltas_max: int) -> None:
        self._account = account
        self._thread_deltas_max = thread_deltas_max
        self._lists = ThreadLists()

    def cell_type(self, definition: Definition) -> type[Cell]:
        """What cells of a view are."""
        return self.cells["monotone" if definition.monotone else definition.kind]

    def opened(self, cell: Cell, count: int) -> bool:
        """Nothing else is needed."""
        return True

    def open_thread(self, cell: Cell, handle_type: Callable[[Deltas], HandleT]) -> HandleT | None:
        """A handle of this thread's own for a cell; `BufferFull` if the account has no room for one."""
        if not self._account.charge(THREAD_BYTES, count=0):  # no delta is dropped with it
            raise BufferFull("no memory for another thread's handle")
        if not len(self._lists):
            self._account.wake()  # the flusher looks at lists often, once there are any
        return self._lists.open(cell, handle_type)

    def drain(self) -> None:
        """Move everything that was recorded before the call into cells."""
        self._account.refund(self._lists.drain())

    @property
    def due(self) -> bool:
        """Whether the next drain should come early."""
        return self._lists.longest > self._thread_deltas_max // 2

    @property
    def gauges(self) -> BufferGauges:
        """How many threads have lists."""
        return BufferGauges(thread_count=len(self._lists))

    def waiting_count(self) -> int:
        """Deltas that are not in cells yet."""
        return self._lists.waiting_count()

    def close(self) -> None:
        """Take no more."""
        self._lists.close()

    def forget(self, account: Account) -> bool:
        """What a forked child must do: the deltas are the parent's to send. Whether handles of the parent live on in it."""
        self._account = account
        self._lists.forget()
        return len(self._lists) > 0


def buffering_of(settings: PublisherSettings, account: Account, own: OwnSpool | None) -> Buffering:
    """The mode that the settings choose; `own` is the spool of this process, if it has one."""
    if own is not None and settings.durability != "memory":
        from pipeline.producer.spooling import SpoolBuffering

        return SpoolBuffering(own, account)
    if settings.buffering == "sharded":
        return ShardedBuffering(
            account,
            shards_max=settings.shards_max,
            shard_deltas_max=settings.shard_deltas_max,
            drain_threads=settings.drain_threads or _drain_threads(),
        )
    return ThreadBuffering(account, settings.thread_deltas_max)


def _drain_threads() -> int:
    """As many as get something done: with an interpreter lock one."""
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    return 1 if locked else min(_DRAIN_THREADS_MAX, max(1, (os.cpu_count() or 1) // 2))
