"""A stream of deltas of every kind that two processes know alike: one records it, the other counts what it must come to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline import Publisher

BIG_BITS = 100
TEXT_MAX = 400
SLOTS = 65_536
HOT = 6
"""Series of each kind that everybody records to."""
VIEWS = {
    "ints": "sum", "floats": "sum", "big": "sum", "up": "sum", "own": "sum", "many": "sum", "table": "sum",
    "low": "min", "high": "max", "mean": "mean", "newest": "last",
}  # fmt: skip
LABELS = ("name",)
_CHOICE = (*VIEWS, "ints", "floats", "own")

Series = tuple[str, str]
"""A view and the value of its label."""


class Op(NamedTuple):
    """One call of the publisher. Each of its parts is recorded or not as a whole."""

    view: str
    parts: list[tuple[str, list[Any]]]
    """Label, and what is recorded to that series together; values of `newest` are (ts_ms, value)."""


def stream(name: str, slot: int) -> Iterator[Op]:
    """The calls of one thread: the same for the same name, without end. Extremes grow, so that the latest must be there.

    `slot`, less than `SLOTS`, is of this thread alone: no other has its timestamps.
    """
    rng = random.Random(name)
    order = slot / SLOTS
    number = 0
    while True:
        number += 1
        hot = str(rng.randrange(HOT))
        view = rng.choice(_CHOICE)
        if view in ("ints", "mean"):
            yield Op(view, [(hot, [rng.randrange(-(2**40), 2**40)])])
        elif view == "floats":
            yield Op(view, [(hot, [rng.randrange(-(2**36), 2**36) / 1024])])
        elif view == "big":
            yield Op(view, [(hot, [rng.getrandbits(BIG_BITS) - 2 ** (BIG_BITS - 1)])])
        elif view == "up":
            yield Op(view, [(hot, [rng.randrange(2**36) / 1024])])
        elif view == "own":
            yield Op(view, [(f"{name} {number}", [float(number)])])
        elif view == "many":
            yield Op(view, [(hot, [rng.randrange(2**40) for _ in range(rng.randrange(1, 8))])])
        elif view == "table":
            names = rng.sample(range(HOT), rng.randrange(1, HOT))
            yield Op(view, [(str(n), [rng.randrange(2**40)]) for n in names])
        elif view in ("low", "high"):
            extreme = number + order
            yield Op(view, [(hot, [extreme if view == "high" else -extreme])])
        else:
            value = rng.choice((number, name, "x" * rng.randrange(TEXT_MAX), None))
            yield Op(view, [(hot, [(number * SLOTS + slot, value)])])


class Recorder:
    """Makes the calls. Handles of `own`, and now and then all others, are dropped, so that series come and go."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._views: dict[str, Any] = {
            view: publisher.view(kind, view, labels=LABELS, monotone=view == "up") for view, kind in VIEWS.items()
        }
        self._cells: dict[Series, Any] = {}
        self._count = 0

    def record(self, op: Op) -> None:
        """One call."""
        view = self._views[op.view]
        if op.view == "table":
            labels, values = zip(*[(label, values[0]) for label, values in op.parts], strict=True)
            self._publisher.record_batch(view, {"name": labels, "value": values})
            return
        [(label, values)] = op.parts
        cell = self._cell(view, op.view, label)
        if op.view == "many":
            cell.add_many(values)
        elif op.view == "newest":
            ts_ms, value = values[0]
            cell.set(value, ts_ms)
        elif VIEWS[op.view] == "sum":
            cell.add(values[0])
        else:
            cell.observe(values[0])

    def _cell(self, view: Any, name: str, label: str) -> Any:
        if name == "own":
            return view.labels(label)
        self._count += 1
        if self._count % 500 == 0:
            self._cells.clear()
        cell = self._cells.get((name, label))
        if cell is None:
            cell = self._cells[name, label] = view.labels(label)
        return cell
