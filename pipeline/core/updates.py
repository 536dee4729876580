"""Updates of an answer that is watched: the series that have changed between two answers to one read.

`updated(before, update_of(before, after))` is `after`, and two updates in a row merge to one, so that a reader which has
missed some is sent one update with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.core.answer import Answer, Series
from pipeline.core.query import Labels
from pipeline.core.span import Point


class Update(msgspec.Struct, frozen=True, omit_defaults=True):
    """Difference between two answers to one read."""

    answer: Answer
    """The newer answer without its series."""
    gone: list[dict[str, str]] = []
    """Labels of series that are no longer in the answer."""
    changed: list[Series] = []
    """Series that are new, or have another value. Series with points have only those that are new or have another value;
    points that start before the first point of the answer's range are to be dropped."""
    order: list[dict[str, str]] | None = None
    """Labels of all series in their order; left out where they are in the order of their label values."""


def _key(series: Series) -> Labels:
    return tuple(series.labels.values())


def update_of(before: Answer, after: Answer) -> Update | None:
    """Return what turns one answer into a later one to the same read; None if only `as_of` and times differ."""
    old, new = {_key(it): it for it in before.series}, {_key(it): it for it in after.series}
    gone = [it.labels for key, it in old.items() if key not in new]
    changed: list[Series] = []
    for key, series in new.items():
        known = old.get(key)
        if known is None:
            changed.append(series)
        elif [*known.labels] != [*series.labels] or (points := _changed_points(known, series, _first_ms(after))) is None:
            gone.append(series.labels)
            changed.append(series)
        elif points or not _same(known.value, series.value):
            changed.append(msgspec.structs.replace(series, points=points))
    order = [it.labels for it in after.series]
    sorted_order = [it.labels for it in sorted(after.series, key=_key)]
    moved = order != sorted_order and order != [it.labels for it in before.series]
    if not gone and not changed and not moved and _head(before) == _head(after):
        return None
    empty = msgspec.structs.replace(after, series=[])
    return Update(empty, gone, changed, order if order != sorted_order else None)


def _head(answer: Answer) -> Answer:
    """Return an answer without its series and all that changes with the time."""
    timeless = {"as_of": None, "start_ms": None, "end_ms": None, "final_before_ms": None, "expired_before_ms": None}
    return msgspec.structs.replace(answer, series=[], **timeless)


def _first_ms(answer: Answer) -> int | None:
    """Return the start of what the first point of the range covers; None if the answer has no points."""
    if answer.start_ms is None:
        return None
    return answer.start_ms + (answer.step_ms or 0) - (answer.over_ms or 0)


def _changed_points(before: Series, after: Series, start_ms: int | None) -> list[Point] | None:
    """Return the points that are new or have another value; None if other points are gone than those before the start."""
    old = {point[0]: point[1] for point in before.points}
    starts = {point[0] for point in after.points}
    if any(start not in starts for start in old if start_ms is not None and start >= start_ms):
        return None
    return [point for point in after.points if point[0] not in old or not _same(old[point[0]], point[1])]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)  # True and 1, or 1 and 1.0, are different values of a `last`


def updated(answer: Answer, update: Update) -> Answer:
    """Return an answer as an update makes it."""
    gone = {tuple(labels.values()) for labels in update.gone}
    found = {_key(it): it for it in answer.series if _key(it) not in gone}
    start_ms = _first_ms(update.answer)
    for series in update.changed:
        key = _key(series)
        if start_ms is not None and key in found:
            points = {point[0]: point for it in (found[key], series) for point in it.points}
            series = msgspec.structs.replace(series, points=[points[at] for at in sorted(points)])
        found[key] = series
    if start_ms is not None:
        found = {key: _from(it, start_ms) for key, it in found.items()}
    order = sorted(found) if update.order is None else [tuple(labels.values()) for labels in update.order]
    return msgspec.structs.replace(update.answer, series=[found[key] for key in order])


def _from(series: Series, start_ms: int) -> Series:
    if not series.points or series.points[0][0] >= start_ms:
        return series
    return msgspec.structs.replace(series, points=[point for point in series.points if point[0] >= start_ms])


def merged(updates: Sequence[Update]) -> Update:
    """Return one update that does what several do one after the other."""
    gone: dict[Labels, dict[str, str]] = {}
    changed: dict[Labels, Series] = {}
    for update in updates:
        for labels in update.gone:
            key = tuple(labels.values())
            gone[key] = labels
            changed.pop(key, None)
        for series in update.changed:
            known = changed.get(_key(series))
            changed[_key(series)] = series if known is None else _merged_points(known, series)
    last = updates[-1]
    return Update(last.answer, [*gone.values()], [*changed.values()], last.order)


def _merged_points(before: Series, after: Series) -> Series:
    points = {point[0]: point for it in (before, after) for point in it.points}
    return msgspec.structs.replace(after, points=[points[at] for at in sorted(points)])
