"""Which definition a delta from outside is of: what it does not say is as its view is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from pipeline.core.grants import Bounds
from pipeline.core.kinds import KIND_NAMES
from pipeline.core.record import LABEL_COUNT_MAX, Definition, check_definition
from pipeline.errors import Invalid
from pipeline.ports import Clock, RawDelta

_REMEMBERED_MAX = 10_000
_REMEMBERED_MS = 60_000
"""Time for which a gateway remembers definitions of its own requests: by then the stores that it reads from have them."""


class KnownViews(NamedTuple):
    """Definitions that the deltas of one request look up, so that each is looked up once."""

    views: dict[tuple[str, str], Definition | None]
    """By view and kind."""
    windows: dict[tuple[str, str, int | None], Sequence[Definition]]
    """By view, kind and window: the known definitions, or that of the first delta of the request."""


DefinitionOf = Callable[[str, Bounds | None], Definition | None]
"""Returns the known definition of a view, made of those that are within the bounds of an access token."""
DefinitionsOf = Callable[[str, str, int | None, Bounds | None], Sequence[Definition]]
"""Returns the definitions, within bounds, that a read of a view by a kind and a window merges (None: the window that was
defined first)."""


class DefinitionFinder:
    """Finds the definitions of deltas. Safe from any thread.

    A delta that was written with an access token that is bound takes nothing over from definitions outside the bounds: their
    labels and windows would be seen in its own definition.
    """

    def __init__(self, clock: Clock, definition_of: DefinitionOf, definitions_of: DefinitionsOf) -> None:
        self._clock = clock
        self._definition_of = definition_of
        self._definitions_of = definitions_of
        self._defined: dict[tuple[str, str, Bounds | None], tuple[Definition, int]] = {}
        """By view, kind and bounds: the definition of the last request here, and its time."""

    def of(self, delta: RawDelta, known: KnownViews, bounds: Bounds | None = None) -> Definition:
        """Return the definition of a delta. A window, retention or `monotone` that is left out is as the view is known."""
        view, kind, labels, window_s, retention_s, monotone = _shape(delta)
        if monotone is None:
            monotone = False
            if kind == "sum":
                if (view, kind) not in known.views:
                    known.views[view, kind] = self.known(view, kind, bounds)
                was = known.views[view, kind]
                monotone = was is not None and was.monotone
        elif kind == "sum":
            known.views.setdefault((view, kind), Definition(view, kind, monotone=monotone))
        names = tuple(sorted(labels))
        if window_s is None or retention_s is None:
            if (view, kind, window_s) not in known.windows:
                known.windows[view, kind, window_s] = self._like(view, kind, window_s, bounds)
            window_s, retention_s = _filled(names, window_s, retention_s, known.windows[view, kind, window_s])
        definition = Definition(view, kind, names, window_s, monotone, retention_s)
        check_definition(definition, KIND_NAMES)
        for window in (None, window_s):  # deltas that follow in the request, and say less, mean the same
            if not known.windows.get((view, kind, window)):
                known.windows[view, kind, window] = self._like(view, kind, window, bounds) or (definition,)
        return definition

    def _like(self, view: str, kind: str, window_s: int | None, bounds: Bounds | None) -> Sequence[Definition]:
        """Return the known definitions of a view of this kind and window (None: any)."""
        found = self._definitions_of(view, kind, window_s, bounds)
        remembered = self._remembered(view, kind, bounds)
        if found or remembered is None or window_s not in (None, remembered.window_s):
            return found
        return (remembered,)

    def known(self, view: str, kind: str, bounds: Bounds | None = None) -> Definition | None:
        """Return the definition of a view of this kind that this process knows."""
        known = self._definition_of(view, bounds)
        if known is not None and known.kind != kind:
            known = None
        remembered = self._remembered(view, kind, bounds)
        if remembered is None:
            return known
        return remembered if known is None else _together(remembered, known)

    def _remembered(self, view: str, kind: str, bounds: Bounds | None) -> Definition | None:
        remembered = self._defined.get((view, kind, bounds))
        if remembered is None or self._clock.now_ms() - remembered[1] >= _REMEMBERED_MS:
            return None
        return remembered[0]

    def remember(self, definitions: Iterable[Definition], now_ms: int, bounds: Bounds | None = None) -> None:
        for definition in definitions:
            key = definition.view, definition.kind, bounds
            was = self._defined.pop(key, None)
            if was is not None and now_ms - was[1] < _REMEMBERED_MS:
                definition = _together(definition, was[0])
            self._defined[key] = definition, now_ms
        while len(self._defined) > _REMEMBERED_MAX:
            try:
                del self._defined[next(iter(self._defined))]
            except (KeyError, StopIteration, RuntimeError):  # another thread is at it
                break


def _together(newer: Definition, older: Definition) -> Definition:
    """Return the newer definition with the labels of both, unless these are too many."""
    labels = tuple(sorted({*newer.labels, *older.labels}))
    return msgspec.structs.replace(newer, labels=labels) if len(labels) <= LABEL_COUNT_MAX else newer


def _filled(
    labels: tuple[str, ...], window_s: int | None, retention_s: int | None, like: Sequence[Definition]
) -> tuple[int, int]:
    """Return window and retention of a delta, of which one is None at least: then they are as those of definitions like it.

    Of several retentions it is that of the definitions that have the same labels; of these, the longest, so that a window is
    kept as long as any of them would keep it.
    """
    if window_s is None:
        window_s = like[0].window_s if like else 0
    if retention_s is None:
        kept = [it.retention_s for it in like if it.labels == labels] or [it.retention_s for it in like] or [0]
        retention_s = 0 if 0 in kept else max(kept)
    return window_s, retention_s


def _shape(delta: RawDelta) -> tuple[str, str, Mapping[str, str], int | None, int | None, bool | None]:
    """Return view, kind, labels, window, retention and `monotone` of a delta, or raise `Invalid` if one has a wrong type."""
    view: Any = delta.view
    kind: Any = delta.kind
    labels: Any = delta.labels
    seconds: Any = {"window_s": delta.window_s, "retention_s": delta.retention_s}
    monotone: Any = delta.monotone
    if not isinstance(view, str) or not isinstance(kind, str):
        raise Invalid("view and kind are text")
    if not isinstance(labels, Mapping) or not all(isinstance(name, str) for name in labels):
        raise Invalid(f"view {view:.200}: labels are names with values")
    for name, length in seconds.items():
        if length is not None and (type(length) is not int or length < 0):
            raise Invalid(f"view {view:.200}: {name} is a whole number of seconds")
    if monotone is not None and not isinstance(monotone, bool):
        raise Invalid(f"view {view:.200}: monotone is true or false")
    return view, kind, labels, seconds["window_s"], seconds["retention_s"], monotone
