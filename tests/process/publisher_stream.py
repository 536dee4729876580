"""A stream of deltas of every kind that two processes can compute: one records it, the other counts the expected answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

from pipeline import Publisher

BIG_BITS = 100
TEXT_MAX = 400
SLOTS = 65_536
HOT = 6
"""Number of series of each kind that everybody records to."""
VIEWS = {
    "ints": "sum", "floats": "sum", "big": "sum", "up": "sum", "own": "sum", "many": "sum", "table": "sum",
    "low": "min", "high": "max", "mean": "mean", "newest": "last", "minutes": "sum", "spread": "histogram",
}  # fmt: skip
WINDOW_S = 60
FIRST_MS = 1_700_000_040_000
"""Start of the first of the windows to which `minutes` and `spread` record: times that are long past."""
WINDOWS = 5
LABELS = ("name",)
_CHOICE = (*VIEWS, "ints", "floats", "own", "minutes", "spread")

Series = tuple[str, str]
"""A view and the value of its label."""


class Op(NamedTuple):
    """One call of the publisher. Each of its parts is recorded or not as a whole."""

    view: str
    parts: list[tuple[str, list[Any]]]
    """Label, and the deltas recorded to that series together; values of `newest` are (ts_ms, value).

    Labels of a view with windows are those of `in_window`.
    """


def in_window(label: str, start_ms: int) -> str:
    """Return how this module writes the label of a series in a window."""
    return f"{label}@{start_ms}"


def stream(name: str, slot: int) -> Iterator[Op]:
    """Yield the calls of one thread: the same for the same name, without end. Extremes grow, so that the latest must be
    there.

    `slot`, less than `SLOTS`, is of this thread alone: no other has its timestamps.
    """
    rng = random.Random(name)
    for number in count(1):
        hot, view = str(rng.randrange(HOT)), rng.choice(_CHOICE)
        values: list[Any]
        match view:
            case "ints" | "mean":
                values = [rng.randrange(-(2**40), 2**40)]
            case "floats":
                values = [rng.randrange(-(2**36), 2**36) / 1024]
            case "big":
                values = [rng.getrandbits(BIG_BITS) - 2 ** (BIG_BITS - 1)]
            case "up":
                values = [rng.randrange(2**36) / 1024]
            case "own":
                hot, values = f"{name} {number}", [float(number)]
            case "many":
                values = [rng.randrange(2**40) for _ in range(rng.randrange(1, 8))]
            case "table":
                names = rng.sample(range(HOT), rng.randrange(1, HOT))
                yield Op(view, [(str(n), [rng.randrange(2**40)]) for n in names])
                continue
            case "minutes" | "spread":
                hot, values = in_window(hot, FIRST_MS + rng.randrange(WINDOWS) * WINDOW_S * 1_000), [rng.randrange(1, 2**40)]
            case "low" | "high":
                values = [(number + slot / SLOTS) * (1 if view == "high" else -1)]
            case _:
                value = rng.choice((number, name, "x" * rng.randrange(TEXT_MAX), None))
                values = [(number * SLOTS + slot, value)]
        yield Op(view, [(hot, values)])


def is_windowed(view: str) -> bool:
    """Return whether a view has windows."""
    return view in ("minutes", "spread")


class Recorder:
    """Makes the calls. Handles of `own`, and now and then all others, are dropped, so that series come and go."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._views: dict[str, Any] = {
            view: publisher.view(kind, view, labels=LABELS, monotone=view == "up", window_s=WINDOW_S * is_windowed(view))
            for view, kind in VIEWS.items()
        }
        self._cells: dict[Series, Any] = {}
        self._count = 0

    def record(self, op: Op) -> None:
        """Make one call."""
        view = self._views[op.view]
        if op.view == "table":
            labels, values = zip(*[(label, values[0]) for label, values in op.parts], strict=True)
            self._publisher.record_batch(view, {"name": labels, "value": values})
            return
        [(label, values)] = op.parts
        ts: dict[str, int] = {}
        if is_windowed(op.view):
            label, _, start_ms = label.partition("@")
            ts = {"ts_ms": int(start_ms) + self._count * 997 % (WINDOW_S * 1_000)}
        cell = view.labels(label) if op.view == "own" else self._cells.setdefault((op.view, label), view.labels(label))
        self._count += 1
        if self._count % 500 == 0:
            self._cells.clear()
        if op.view == "many":
            cell.add_many(values)
        elif op.view == "newest":
            cell.set(values[0][1], values[0][0])
        else:
            (cell.add if VIEWS[op.view] == "sum" else cell.observe)(values[0], **ts)
