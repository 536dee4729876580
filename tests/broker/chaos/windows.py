"""Views with windows beside the load's: late deltas, windows that expire, histograms, sketches; and what must be right."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from pipeline import Publisher, Reader, Token

READ_MS = 60_000
LIMIT = 1_000_000
LABELS = 8
LATE_S = 12.0
"""Seconds that a delta is late at most, if its window shall still be there."""
KEPT_S = 20
"""Retention of the views that expire."""
TOO_LATE = 0.02
"""Share of the deltas whose window has expired."""
VIEWS = {
    "win_sum": ("sum", 2, KEPT_S),
    "win_spread": ("histogram", 2, KEPT_S),
    "win_low": ("min", 5, KEPT_S),
    "win_all": ("sum", 5, None),
    "win_spread_all": ("histogram", 10, None),
    "win_users": ("distinct", 5, KEPT_S),
    "win_items": ("topk", 5, KEPT_S),
}
"""Kind, window in seconds, and retention of each view."""

AMOUNTS = 200
"""Number of different amounts, which are the items of sketches: so few that their answers are exact."""

State = Counter[int]
"""Number of times that each amount was recorded to a series in a window."""


class Windows:
    """Records to these views with the publisher of the load, in the load's thread."""

    def __init__(self, publisher: Publisher, seed: int) -> None:
        self._rng = random.Random(seed)
        self._views: dict[str, Any] = {
            name: publisher.view(kind, name, labels=("n",), window_s=window_s, retention_s=kept_s)
            for name, (kind, window_s, kept_s) in VIEWS.items()
        }
        self._states: dict[str, dict[tuple[str, int], State]] = {name: {} for name in VIEWS}
        """By view, by label and start of the window."""
        self._first_ms = int((time.time() - KEPT_S - 2 * LATE_S) * 1000)

    def record(self) -> None:
        """Record one delta to each view."""
        rng, now_ms = self._rng, int(time.time() * 1000)
        late_s = KEPT_S + LATE_S if rng.random() < TOO_LATE else rng.random() ** 3 * LATE_S
        ts_ms = max(self._first_ms, now_ms - int(late_s * 1000))
        label, amount = str(rng.randrange(LABELS)), rng.randrange(1, AMOUNTS + 1)
        for name, (kind, window_s, _) in VIEWS.items():
            window_ms = window_s * 1000
            place = label, ts_ms - ts_ms % window_ms
            self._states[name].setdefault(place, Counter())[amount] += 1
            view = self._views[name]
            (view.add if kind == "sum" else view.observe)(amount, n=label, ts_ms=ts_ms)

    def compare(self, url: str, token: Token) -> list[str]:
        """Return the faults while nothing is recorded.

        A window that is shown holds all its deltas, however late they came; one that is not shown has expired.
        """
        wrong: list[str] = []
        with Reader(url, timeout_s=READ_MS / 1000 + 10) as reader:
            for name, (kind, window_s, kept_s) in VIEWS.items():
                if not self._states[name]:
                    continue
                during: Any = {"start": self._first_ms, "end": int(time.time() * 1000), "step": window_s}
                answer = reader.get(name, after=token, limit=LIMIT, timeout_ms=READ_MS, **during)
                answered_ms = time.time() * 1000
                found = {
                    (series.labels["n"], start_ms): _state(kind, point)
                    for series in answer.series
                    for start_ms, point in series.points or ()
                }
                right = {place: _expected(kind, state) for place, state in self._states[name].items()}
                for place in found.keys() | right.keys():
                    gone = kept_s is not None and place[1] + (window_s + kept_s) * 1000 <= answered_ms
                    hidden = gone and place not in found and place in right
                    if not hidden and found.get(place) != right.get(place):
                        wrong.append(f"{name} {place}: {found.get(place)}, not {right.get(place)}")
        return [f"{len(wrong)} windows, such as {wrong[:3]}"] if wrong else []

    def shown(self, url: str) -> str:
        """Return how many windows there were of the first view, and how many an answer shows."""
        name, (_, window_s, _) = next(iter(VIEWS.items()))
        with Reader(url, timeout_s=READ_MS / 1000 + 10) as reader:
            answer = reader.get(name, start=self._first_ms, end=int(time.time() * 1000), step=window_s, limit=LIMIT)
        return f"{sum(len(it.points or ()) for it in answer.series)} of {len(self._states[name])} windows"


def _state(kind: str, point: Any) -> Any:
    match kind:
        case "histogram":
            return tuple(point[name] for name in ("count", "sum", "min", "max"))
        case "distinct":
            return tuple(point[name] for name in ("estimate", "lower", "upper"))
        case "topk":
            return {it["item"]: (it["count"], it["upper"]) for it in point["items"]}
        case _:
            return point


def _expected(kind: str, state: State) -> Any:
    match kind:
        case "sum":
            return sum(state.elements())
        case "min":
            return min(state)
        case "histogram":
            return state.total(), sum(state.elements()), min(state), max(state)
        case "distinct":
            return (len(state),) * 3
        case _:
            return {str(item): (count, count) for item, count in state.items()}
