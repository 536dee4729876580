"""The totals that a process has recorded itself, for its own code to read: by view and label values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from pipeline.core.kinds import Kind, State, kind_of
from pipeline.core.record import Definition, parse_suffix, series_suffix


class LocalView(Mapping[tuple[str, ...], Any]):
    """A view as this process alone has recorded it since it started: answers by label values, as reads show them.

    Label values are in the order of `labels`. A `LocalView` never changes; `view.local()` returns a newer one.
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
        """Time of the snapshot, on the monotonic clock."""
        self._states = states
        self._kind: Kind = kind_of(definition)
        self._order = [definition.labels.index(name) for name in declared.labels]
        self._canonical_order = [declared.labels.index(name) for name in definition.labels]
        self._now_s = now_s

    @property
    def age_ms(self) -> float:
        """Age of the snapshot: everything recorded before it is in."""
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
