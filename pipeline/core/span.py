"""Ranges of windows, and what the points in them cover.

A range has whole steps. A point ends where its step ends and covers the `over_ms` before that: without `over`, its step.
So points of neighbouring steps overlap, or slide, if `over` is longer than the step.

Windows merge to *buckets* first: the longest pieces of which every point is made of whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

import msgspec

from pipeline.core.kinds import State
from pipeline.core.times import TIME_MS_MAX, length_text, time_text
from pipeline.errors import Invalid

STEPS_DEFAULT = 60
"""Steps of a range without a start."""
FILLS = ("null", "zero", "previous")
"""Values for points without data: null, 0, or that of the point before. By default such points are left out."""

Point = tuple[int, Any]
"""Start in ms since 1970 of what the point covers, and its value."""


class AskedRange(msgspec.Struct, frozen=True):
    """The range of a view with windows that a read asks for; None: the default."""

    start_ms: int | None = None
    end_ms: int | None = None
    at_ms: int | None = None
    """End of the range; without a start, the range is one step."""
    step_ms: int | None = None
    """Distance of points; None: the view's window."""
    over_ms: int | None = None
    """Length of what each point covers; None: the step."""
    fill: str | None = None
    """One of `FILLS`; None: points without data are left out."""
    compare_ms: int | None = None
    """Distance to the earlier range that stands beside this one; None: there is none."""


NO_RANGE = AskedRange()


class Span(msgspec.Struct, frozen=True):
    """A range of whole windows and whole steps."""

    start_ms: int
    end_ms: int
    step_ms: int
    over_ms: int

    @property
    def point_count(self) -> int:
        """Number of steps."""
        return (self.end_ms - self.start_ms) // self.step_ms

    @property
    def covered_ms(self) -> int:
        """Start of what the first point covers; below 0 if that lies before 1970."""
        return self.start_ms + self.step_ms - self.over_ms

    @property
    def bucket_ms(self) -> int:
        """Length of a bucket."""
        return gcd(self.step_ms, self.over_ms)

    @property
    def point_buckets(self) -> int:
        """Number of buckets of a point."""
        return self.over_ms // self.bucket_ms

    @property
    def step_buckets(self) -> int:
        """Number of buckets of a step."""
        return self.step_ms // self.bucket_ms

    def earlier(self, by_ms: int) -> Span:
        """Return the range that is so much earlier."""
        return Span(self.start_ms - by_ms, self.end_ms - by_ms, self.step_ms, self.over_ms)

    def bucket(self, window_start_ms: int) -> int:
        """Return the index of the bucket that a window is in; the first point begins with bucket 0."""
        return (window_start_ms - self.covered_ms) // self.bucket_ms

    def bucket_start_ms(self, bucket: int) -> int:
        """Return where a bucket starts."""
        return self.covered_ms + bucket * self.bucket_ms

    def starts(self) -> range:
        """Return the start of what each point covers."""
        return range(self.covered_ms, self.covered_ms + self.point_count * self.step_ms, self.step_ms)


def multiple_ms(name: str, length_ms: int, window_ms: int) -> int:
    """Return a length that is a multiple of the window. Raises `Invalid`, naming the nearest multiple, if it is none."""
    if length_ms % window_ms:
        nearest = max(1, (2 * length_ms + window_ms) // (2 * window_ms)) * window_ms
        raise Invalid(
            f"{name}: {length_text(length_ms)} is no multiple of the view's window of {length_text(window_ms)}; "
            f"the nearest is {length_text(nearest)}"
        )
    return length_ms


def span_of(asked: AskedRange, *, window_ms: int, now_ms: int, points_max: int) -> Span:
    """Return the range that is asked for: its start rounded down to a window, its end up so that there are whole steps.

    Raises `Invalid` if its parts do not fit to each other or to the window, or if it has over `points_max` points.
    """
    if asked.step_ms is None and asked.over_ms is not None and asked.at_ms is not None and asked.start_ms is None:
        step_ms = multiple_ms("over", asked.over_ms, window_ms)  # one point, which covers all of it
    else:
        step_ms = window_ms if asked.step_ms is None else multiple_ms("step", asked.step_ms, window_ms)
    over_ms = step_ms if asked.over_ms is None else multiple_ms("over", asked.over_ms, window_ms)
    if over_ms < step_ms:
        raise Invalid(f"over: {length_text(over_ms)} is shorter than the step of {length_text(step_ms)}")
    if asked.at_ms is not None and asked.end_ms is not None:
        raise Invalid("at and end: both are the end of the range; only one of them can be given")
    if asked.at_ms is not None:
        end_name, end_ms = "at", asked.at_ms
    else:
        end_name, end_ms = ("end", asked.end_ms) if asked.end_ms is not None else ("end, which is now,", now_ms)
    if asked.start_ms is None:
        end_ms = -(-end_ms // window_ms) * window_ms or window_ms
        steps = 1 if asked.at_ms is not None else min(STEPS_DEFAULT, points_max)
        start_ms = max(0, end_ms - steps * step_ms)
        start_ms += (end_ms - start_ms) % step_ms if end_ms - start_ms >= step_ms else 0
    else:
        if end_ms <= asked.start_ms:
            raise Invalid(f"start: {time_text(asked.start_ms)} is not before {end_name} {time_text(end_ms)}")
        start_ms = asked.start_ms // window_ms * window_ms
    count = -(-(end_ms - start_ms) // step_ms)
    if count > points_max:
        fitting = -(-(end_ms - start_ms) // (points_max * window_ms)) * window_ms
        raise Invalid(
            f"{count} points in the range; at most {points_max} (setting points_max): ask for a later start, or for a step "
            f"of {length_text(fitting)} or more"
        )
    return Span(start_ms, start_ms + count * step_ms, step_ms, over_ms)


def merge_points(
    span: Span, buckets: Sequence[tuple[int, State]], merge: Callable[[State, State], State]
) -> Iterator[tuple[int, State]]:
    """Yield index and state of each point that has data. `buckets` are index and state of buckets, in their order.

    Each state is merged a bounded number of times, however many points it is in: a queue of two stacks keeps the merges of
    all states from each old bucket on, and of all new ones together.
    """
    if span.point_buckets == 1:  # each bucket is a point
        yield from buckets
        return
    old: list[tuple[int, State]] = []  # the oldest bucket last; its state is merged with those of all newer old ones
    new: list[tuple[int, State]] = []
    new_total: State = None
    taken = 0
    for point in range(span.point_count):
        begin = point * span.step_buckets
        end = begin + span.point_buckets
        while taken < len(buckets) and buckets[taken][0] < end:
            state = buckets[taken][1]
            new_total = merge(new_total, state) if new else state
            new.append(buckets[taken])
            taken += 1
        while old and old[-1][0] < begin:
            old.pop()
        if not old and new and new[0][0] < begin:
            for bucket, state in reversed(new):
                if bucket < begin:
                    break
                old.append((bucket, merge(state, old[-1][1]) if old else state))
            new = []
        if old and new:
            yield point, merge(old[-1][1], new_total)
        elif old:
            yield point, old[-1][1]
        elif new:
            yield point, new_total


def filled(span: Span, values: Mapping[int, Any], fill: str | None, *, zero_from_ms: int = 0) -> list[Point]:
    """Return the points of a series, given the value of each that has data by its index.

    Zeros stand only for points that cover no window before `zero_from_ms`: what is before it has expired, and is not known
    to be nothing.
    """
    starts = span.starts()
    if fill is None:
        return [(starts[i], value) for i, value in values.items()]
    found: list[Point] = []
    last = None
    for i, start_ms in enumerate(starts):
        if i in values:
            last = values[i]
            found.append((start_ms, last))
        elif fill == "zero":
            found.append((start_ms, 0 if start_ms >= zero_from_ms else None))
        elif fill == "null":
            found.append((start_ms, None))
        elif found:
            found.append((start_ms, last))
    return found


def check_range(asked: AskedRange) -> None:
    """Raise `Invalid` for parts of a range that fit no view, so that no view needs to be looked up for that."""
    if asked.fill is not None and asked.fill not in FILLS:
        raise Invalid(f"fill: one of {', '.join(FILLS)} is needed, got {asked.fill[:50]!r}")
    for name, ms in (("start", asked.start_ms), ("end", asked.end_ms), ("at", asked.at_ms)):
        if ms is not None and not 0 <= ms <= TIME_MS_MAX:
            raise Invalid(f"{name}: a time from 1970 to the year 9999 is needed, got {ms}")
    for name, ms in (("step", asked.step_ms), ("over", asked.over_ms), ("compare", asked.compare_ms)):
        if ms is not None and not 0 < ms <= TIME_MS_MAX:
            raise Invalid(f"{name}: a length above 0 is needed")
