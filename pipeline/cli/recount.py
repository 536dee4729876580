"""The demo's own count of its deltas, which shares no code with the pipeline, and its comparison with the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from fractions import Fraction
from math import ceil
from typing import Any

import msgspec

from pipeline.core.answer import Answer
from pipeline.core.record import Definition
from pipeline.ports import Clock

_TEXT_MAX = 1_000
_EXACT_MAX = 256
_OFF_MAX = 0.1
"""Largest relative error of an estimate: six times its standard error."""
Labels = tuple[str, ...]
Series = tuple[str, Labels]
"""Name of a view, and label values."""


class Recorder:
    """Records to views of a publisher, and counts by itself. Each thread has one, so that counting needs no lock."""

    def __init__(self, views: Mapping[str, Any], clock: Clock) -> None:
        self.delta_count = 0
        self.own: dict[Series, Any] = {}
        """Own count by series: a number; of a mean, total and count; of a last, time and value; of a histogram, all values;
        of a topk, the count of each item; of a distinct, all items.

        A series of a view with windows is counted for each window, whose start stands behind its labels.
        """
        self._views = views
        self._clock = clock

    def record(self, view: str, value: Any, *labels: str) -> None:
        """See `machine.Sink`. A delta that the publisher refuses with an exception is not counted."""
        cell = self._views[view].labels(*labels)
        kind, window_s = self._views[view].definition.kind, self._views[view].definition.window_s
        now_ms = self._clock.now_ms()
        series = view, (*labels, str(now_ms - now_ms % (window_s * 1000))) if window_s else labels
        before = self.own.get(series)
        if kind == "topk":
            cell.add(*value)
            value = Counter(dict([value]))
        elif kind == "sum":
            cell.add(value, **({"ts_ms": now_ms} if window_s else {}))
        elif kind == "last":
            # Each value has a time of its own, so that there is one newest value.
            value = max(now_ms, before[0] + 1 if before else 0), value
            cell.set(value[1], value[0])
        else:
            cell.observe(value)
            value = {"mean": (value, 1), "histogram": [value], "distinct": {value}}.get(kind, value)
        if before is None:
            self.own[series] = value
        elif kind == "histogram":
            before.extend(value)
        elif kind in ("topk", "distinct"):
            before.update(value)
        else:
            self.own[series] = _together(kind, before, value)
        self.delta_count += 1


def _together(kind: str, a: Any, b: Any) -> Any:
    match kind:
        case "sum" | "histogram" | "topk":
            return a + b
        case "distinct":
            return a | b
        case "mean":
            return a[0] + b[0], a[1] + b[1]
        case "min":
            return min(a, b)
        case _:  # the largest number; of a last, the newest time
            return max(a, b)


def expected_answers(definitions: Iterable[Definition], recorders: Sequence[Recorder]) -> dict[str, dict[Labels, Any]]:
    """By view and label values, what must be read once all of it is folded. The recorders' threads have ended."""
    kinds = {definition.view: definition.kind for definition in definitions}
    own: dict[Series, Any] = {}
    for recorder in recorders:
        for series, value in recorder.own.items():
            own[series] = _together(kinds[series[0]], own[series], value) if series in own else value
    answers: dict[str, dict[Labels, Any]] = {view: {} for view in kinds}
    for (view, labels), value in own.items():
        kind = kinds[view]
        answer = value[0] / value[1] if kind == "mean" else value[1] if kind == "last" else value
        answer = sorted(value) if kind == "histogram" else answer
        answers[view][labels] = answer
    return answers


def answered(definition: Definition, answer: Answer) -> dict[Labels, Any]:
    """Return the values of an answer by label values, and behind them the start of the window if the view has windows."""
    found: dict[Labels, Any] = {}
    for row in answer.series:
        labels = tuple(row.labels[label] for label in definition.labels)
        if definition.window_s:
            found.update({(*labels, str(start_ms)): value for start_ms, value in row.points or ()})
        else:
            found[labels] = row.value
    return found


def differences(definition: Definition, expected: Mapping[Labels, Any], answer: Answer) -> Iterator[str]:
    """Yield a line for each series whose count and answer differ."""
    found = answered(definition, answer)
    names = (*definition.labels, "window") if definition.window_s else definition.labels
    if answer.truncated:
        yield f"{definition.view}: only {len(found)} of {answer.series_total} series could be read"
    for labels in sorted(expected.keys() | found.keys()):
        pairs = zip(names, labels, strict=True)
        name = definition.view + "{" + ", ".join(f"{label}={_text(value)}" for label, value in pairs) + "}"
        if labels not in found:
            yield f"{name}: counted {_text(expected[labels])}, but there is no such series"
        elif labels not in expected:
            yield f"{name}: the answer is {_text(found[labels])}, but nothing was counted"
        elif definition.kind in _WRONG:
            if wrong := _WRONG[definition.kind](found[labels], expected[labels]):
                yield f"{name}: {wrong}"
        elif (type(found[labels]), found[labels]) != (type(expected[labels]), expected[labels]):
            yield f"{name}: counted {_text(expected[labels])}, the answer is {_text(found[labels])}"


def _wrong_in_topk(found: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Return what is wrong with a topk of these counts; beyond its number of items it may be off by what it says."""
    if found["total"] != sum(counts.values()):
        return f"counted {sum(counts.values())}, the answer is {found['total']}"
    items = {it["item"]: it for it in found["items"]}
    most = max((it["upper"] - it["count"] for it in items.values()), default=found["total"])
    for item in counts.keys() | items.keys():
        own, it = counts.get(item, 0), items.get(item, {"count": 0, "upper": most})
        if not it["count"] <= own <= it["upper"]:
            return f"item {_text(item)}: counted {own}, the answer is {it['count']} to {it['upper']}"
    return ""


def _wrong_in_distinct(found: Mapping[str, int], items: Set[str]) -> str:
    """Return what is wrong with a count of these items: it is exact up to 256, and as good as always off by at most 10 %."""
    off = 0.0 if len(items) <= _EXACT_MAX else _OFF_MAX * len(items)
    return "" if abs(found["estimate"] - len(items)) <= off else f"counted {len(items)}, the answer is {found['estimate']}"


def _wrong_in_histogram(found: Mapping[str, Any], values: Sequence[int]) -> str:
    """Return what is wrong with a histogram of these values, which are in order; a quantile may be off by its error."""
    right = {"count": len(values), "sum": sum(values), "min": values[0], "max": values[-1]}
    mine = {name: found[name] for name in right}
    if mine != right:
        return f"counted {_text(right)}, the answer is {_text(mine)}"
    off = found["relative_error"] + 1e-9
    for name, quantile in found["quantiles"].items():
        exact = values[max(1, ceil(Fraction(name) * len(values))) - 1]
        if abs(quantile - exact) > off * abs(exact):
            return f"quantile {name} is {exact}, the answer is {quantile}"
    return ""


_WRONG: dict[str, Callable[[Any, Any], str]] = {
    "histogram": _wrong_in_histogram,
    "topk": _wrong_in_topk,
    "distinct": _wrong_in_distinct,
}
"""Comparisons of kinds whose answers are estimates, or more than one number."""


def _text(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}..."
