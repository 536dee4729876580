"""Functions of points of sums, computed when a view is read: rates, differences, averages, running totals, shares.

A point without data is a sum of nothing, so it counts as 0 here. A point that begins before the windows that are kept is not
known: it has no value or, as a share, is computed of what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.span import Span
from pipeline.errors import Invalid

FUNCTIONS = ("rate", "delta", "avg", "cumulative", "share")
"""`rate`: per second of what the point covers. `delta`: difference to the point before; the first point has none. `avg`: of
the windows that the point covers. `cumulative`: total up to the end of the point, from the first point of the range that is
known. `share`: part of the total of all series at the same point."""

Number = int | float
Values = Mapping[int, Number | None]
"""By index of a point, its value."""


def check_function(name: str | None, kind: str, span: Span) -> None:
    """Raise `Invalid` unless the function can be computed on points of a kind; None is no function."""
    if name is None:
        return
    if name not in FUNCTIONS:
        raise Invalid(f"fn: one of {', '.join(FUNCTIONS)} is needed, got {name[:50]!r}")
    if kind != "sum":
        raise Invalid(f"fn={name}: a function of sums; the view is of kind {kind}")
    if name == "cumulative" and span.over_ms != span.step_ms:
        raise Invalid("fn=cumulative: points that overlap (over) can't be added up")


def totals(series: list[dict[int, Number]]) -> dict[int, Number]:
    """Return the total of all series at each point."""
    found: dict[int, Number] = {}
    for values in series:
        for i, value in values.items():
            found[i] = found.get(i, 0) + value
    return found


def derived(
    name: str, values: dict[int, Number], span: Span, *, window_ms: int, total: Mapping[int, Number], kept: int = 0
) -> Values:
    """Return a function of the values of one series; `total` is that of all series at each point, for `share`.

    Points before the index `kept` lack windows that have expired.
    """
    match name:
        case "rate":
            return {i: _quotient(value * 1_000, span.over_ms) if i >= kept else None for i, value in values.items()}
        case "delta":
            places = [i for i in sorted({*values, *(i + 1 for i in values)}) if max(0, kept) < i < span.point_count]
            return {i: values.get(i, 0) - values.get(i - 1, 0) for i in places}
        case "avg":
            windows = span.over_ms // window_ms
            return {i: _quotient(value, windows) if i >= kept else None for i, value in values.items()}
        case "cumulative":
            running: Number = 0
            sums: dict[int, Number | None] = {}
            for i in range(span.point_count):
                running += values.get(i, 0) if i >= kept else 0
                sums[i] = running if i >= kept else None
            return sums
        case _:
            return {i: _share(values, total, i) for i in range(span.point_count) if i in values or not total.get(i)}


def _share(values: Mapping[int, Number], total: Mapping[int, Number], point: int) -> Number | None:
    whole = total.get(point, 0)
    return _quotient(values.get(point, 0), whole) if whole else None


def _quotient(a: Number, b: Number) -> Number:
    try:
        return a / b
    except OverflowError:  # an int beyond all floats
        return int(a) // int(b)
