"""The totals of all that a process has recorded, drained or not: what `local` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.core.kinds import State
from pipeline.core.record import WINDOW_NONE

if TYPE_CHECKING:
    from pipeline.publisher.view import BaseView, Slot


class Local(Mapping[bytes, State]):
    """The totals of a view as of a snapshot, by suffix. A `Local` never changes."""

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


class Totals:
    """States of up to so many series, by view; those of all windows of a series are one."""

    def __init__(self, room: int) -> None:
        self.states: dict[BaseView, dict[bytes, State]] = {}
        self.cut: set[BaseView] = set()
        """Views some of whose series were left out."""
        self._room = room

    def add(self, slot: Slot, state: State) -> None:
        """Merge a state in, if there is room and memory for its series: a drain must not fail because of a snapshot."""
        try:
            states = self.states.setdefault(slot.view, {})
            suffix = WINDOW_NONE + slot.suffix[8:] if slot.view.window_ms else slot.suffix
            known = suffix in states
            if known or self._room > 0:
                states[suffix] = slot.view.merge(states[suffix], state) if known else state
                self._room -= not known
                return
        except MemoryError:
            pass
        self.cut.add(slot.view)

    def copy(self) -> Totals:
        """Return a copy."""
        other = Totals(self._room)
        other.states = {view: states.copy() for view, states in self.states.items()}
        other.cut = self.cut.copy()
        return other
