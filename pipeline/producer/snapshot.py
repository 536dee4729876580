"""What this process has recorded, merged, as of a moment ago: read by any thread, without a lock.

The flusher keeps a running total of each series. From time to time it publishes a copy by storing one reference; a published
copy never changes. So a reader has one consistent snapshot per view for as long as it likes, and costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.core.merge import Kind, State, kind_of
from pipeline.core.record import Definition, parse_suffix, series_suffix


class LocalView(Mapping[tuple[str, ...], Any]):
    """A view as this process alone has recorded it since it started: answers by label values, as reads show them.

    Label values stand in the order of `labels`. It never changes; ask the view again for a newer one.
    """

    __slots__ = ("_canonical_order", "_kind", "_now_s", "_order", "_states", "complete", "labels", "taken_s", "view")

    def __init__(
        self,
        declared: Definition,
        definition: Definition,
        states: Mapping[bytes, State],
        taken_s: float,
        now_s: Callable[[], float],
        *,
        complete: bool,
    ) -> None:
        self.view = definition.view
        self.labels = declared.labels
        self.complete = complete
        """False if series were left out, because there are more than `local_series_max`."""
        self.taken_s = taken_s
        """When it was taken, on the monotonic clock."""
        self._states = states
        self._kind: Kind = kind_of(definition)
        self._order = [definition.labels.index(name) for name in declared.labels]
        self._canonical_order = [declared.labels.index(name) for name in definition.labels]
        self._now_s = now_s

    @property
    def age_ms(self) -> float:
        """How old it is: what was recorded before that is in."""
        return max(0.0, self._now_s() - self.taken_s) * 1_000

    def _labels_of(self, suffix: bytes) -> tuple[str, ...]:
        values = parse_suffix(suffix)[1]
        return tuple([values[i] for i in self._order])

    def __getitem__(self, labels: tuple[str, ...]) -> Any:
        if type(labels) is tuple and len(labels) == len(self._order):
            with suppress(TypeError, AttributeError, UnicodeEncodeError, KeyError):
                return self._kind.answer(self._states[series_suffix([labels[i] for i in self._canonical_order])])
        raise KeyError(labels)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return map(self._labels_of, self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return f"<{self.view}: {len(self)} series, {self.age_ms:.0f} ms old>"


class ViewTotals:
    """The running totals of one view, and their last published copy. Written by the flusher."""

    def __init__(self, owner: Totals, declared: Definition, definition: Definition) -> None:
        self._owner = owner
        self._declared = declared
        self._definition = definition
        self._merge = kind_of(definition).merge
        self._states: dict[bytes, State] = {}
        self._changed = False
        self._complete = True
        self._unsealed_count = 0
        """Series in the published copy of which nothing is sealed yet."""
        self._published = self._copy({}, owner.now_s())

    def _copy(self, states: Mapping[bytes, State], now_s: float) -> LocalView:
        owner = self._owner
        return LocalView(self._declared, self._definition, states, now_s, owner.now_s, complete=self._complete)

    def add_all(self, suffixes: Sequence[bytes], states: Sequence[State]) -> None:
        """Merge what was sealed of several series into their totals."""
        mine, merge, admit = self._states, self._merge, self._owner.admit
        for suffix, state in zip(suffixes, states, strict=True):
            old = mine.get(suffix)
            if old is not None:
                mine[suffix] = merge(old, state)
            elif admit():
                mine[suffix] = state
            else:
                self._complete = False
        self._changed = True

    def publish(self, pending: Iterable[tuple[bytes, State]], now_s: float) -> None:
        """Take a copy, together with what is merged but not sealed, as what `local` returns from now on."""
        waiting = [*pending]
        owner = self._owner
        owner.unsealed_count -= self._unsealed_count
        self._unsealed_count = 0
        if not waiting and not self._changed:
            states = self._published._states
        else:
            states = self._states.copy()
            for suffix, state in waiting:
                old = states.get(suffix)
                if old is not None:
                    states[suffix] = self._merge(old, state)
                elif owner.room():
                    states[suffix] = state
                    self._unsealed_count += 1
                    owner.unsealed_count += 1
                else:
                    self._complete = False
        self._changed = bool(waiting)
        self._published = self._copy(states, now_s)

    def local(self) -> LocalView:
        """The copy that was published last."""
        return self._published


class Totals:
    """The totals of all views of a publisher: at most `series_max` series."""

    def __init__(self, series_max: int, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.taken_s = now_s()
        """When the last snapshot was taken."""
        self.unsealed_count = 0
        """Series in published copies that have no total yet."""
        self._series_max = series_max
        self._count = 0

    def of(self, declared: Definition, definition: Definition) -> ViewTotals:
        """Those of one more view."""
        return ViewTotals(self, declared, definition)

    def room(self) -> bool:
        """Whether one more series may be known."""
        return self._count + self.unsealed_count < self._series_max

    def admit(self) -> bool:
        """Take the place of one more series, if there is one."""
        if self._count >= self._series_max:
            return False
        self._count += 1
        return True
