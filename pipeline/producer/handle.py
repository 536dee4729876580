"""A thread's own handles: a list that only it appends to, whose `append` is what recording is.

Nothing is checked when a delta is recorded, and nothing runs but one C function. So nothing can stop the list from growing
either: the flusher comes early when one is long, and empties it into its cell, whose memory is bounded.

A handle can be dropped while its method is kept (`add = cell.for_this_thread().add`), so it is the list that counts. The
flusher keeps every list until it is empty and nobody else refers to it: then the thread is gone, and nothing can be added.
(A finaliser could not tell: while one runs, a weak reference still revives its object.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import count
from sys import getrefcount
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import Invalid

if TYPE_CHECKING:
    from pipeline.producer.cell import Cell

HandleT = TypeVar("HandleT")
THREAD_BYTES = 400
"""What a thread's own list costs, empty (measured; see tests/producer)."""
_RUN_MAX = 50_000
"""Deltas that are merged at a time: so that no C function holds the interpreter lock for long."""


class Deltas:
    """What one thread recorded to a series, as it was given."""

    __slots__ = ("cell", "charge", "handle", "values")

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.values: list[Any] = []
        self.charge = THREAD_BYTES
        self.handle: weakref.ref[Any] | None = None


def _references(deltas: Deltas) -> int:
    return getrefcount(deltas.values)


_OURS = _references(Deltas(None))  # type: ignore[arg-type]
"""References to a list that nobody else has: counted, because how many the interpreter has itself is its own business."""


class _Handle:
    __slots__ = ("__weakref__", "cell")

    def __init__(self, deltas: Deltas) -> None:
        self.cell = deltas.cell
        deltas.handle = weakref.ref(self)

    def _refuse(self, value: object, /) -> None:
        raise Invalid("this publisher is closed")


class ThreadSumCell(_Handle):
    """A series of a sum view, for one thread. Get it from `for_this_thread()`."""

    __slots__ = ("add",)

    add: Callable[[float], None]
    """Add a number. Raises nothing, except `Invalid` when the publisher is closed."""

    def __init__(self, deltas: Deltas) -> None:
        super().__init__(deltas)
        self.add = deltas.values.append

    def close(self) -> None:
        """Take no more: the publisher closes."""
        self.add = self._refuse


class ThreadObserveCell(_Handle):
    """A series of a min, max or mean view, for one thread. Get it from `for_this_thread()`."""

    __slots__ = ("observe",)

    observe: Callable[[float], None]
    """Observe a number. Raises nothing, except `Invalid` when the publisher is closed."""

    def __init__(self, deltas: Deltas) -> None:
        super().__init__(deltas)
        self.observe = deltas.values.append

    def close(self) -> None:
        """Take no more: the publisher closes."""
        self.observe = self._refuse


class ThreadLists:
    """The lists of all threads' own handles of a publisher. `open` from any thread; the rest is the flusher's."""

    def __init__(self) -> None:
        self.longest = 0
        """The longest list that the last drain found."""
        self._all: dict[int, Deltas] = {}  # a dict, because one call copies it
        self._keys = count(1)
        self._moving: tuple[Cell, list[Any]] | None = None
        """On its way into a cell: None, unless that was interrupted."""

    def __len__(self) -> int:
        return len(self._all)

    def open(self, cell: Cell, handle_type: Callable[[Deltas], HandleT]) -> HandleT:
        """A handle with a new list of `cell`; `THREAD_BYTES` were charged for it."""
        deltas = Deltas(cell)
        handle = handle_type(deltas)
        self._all[next(self._keys)] = deltas  # not before somebody has the list
        return handle

    def drain(self) -> int:
        """Merge what all threads have recorded into the cells; the bytes to refund for lists that nobody has any more."""
        self._deliver()
        self.longest = back = 0
        for key, deltas in [*self._all.items()]:
            alone = _references(deltas) <= _OURS  # before it is emptied
            size = len(deltas.values)
            self.longest = max(self.longest, size)
            while size > 0:  # what comes meanwhile is for the next time
                moving = deltas.cell, deltas.values[: min(size, _RUN_MAX)]
                size -= len(moving[1])
                del deltas.values[: len(moving[1])]
                self._moving = moving
                self._deliver()
            if alone:
                del self._all[key]
                back += deltas.charge
        return back

    def _deliver(self) -> None:
        """Merge what is moving into its cell. If that fails, it goes on moving."""
        if self._moving is None:
            return
        cell, run = self._moving
        view = cell.view
        state, good_count = view.collect_unchecked(run)
        if good_count:
            with view.lock:
                view.keep(cell)
                cell.merge_state(state, good_count)
        self._moving = None

    def waiting_count(self) -> int:
        """Deltas in all lists."""
        moving = self._moving
        return sum([len(deltas.values) for deltas in [*self._all.values()]]) + (len(moving[1]) if moving else 0)

    def close(self) -> None:
        """The publisher closes: handles refuse from now on."""
        for deltas in [*self._all.values()]:
            handle = deltas.handle() if deltas.handle else None
            if handle is not None:
                handle.close()

    def forget(self) -> None:
        """What a forked child must do: the deltas are the parent's to send."""
        self._moving = None
        for key, deltas in [*self._all.items()]:
            deltas.values.clear()
            deltas.charge = 0  # its account is the parent's
            if _references(deltas) <= _OURS:
                del self._all[key]
