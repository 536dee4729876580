"""Groups of a scan: entries merged by some of their labels, by the native core as long as it can, else in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import native
from pipeline.core.kinds import Kind, State
from pipeline.core.query import Entry, Labels, fold
from pipeline.core.record import Definition

Decode = Callable[[Sequence[bytes], Sequence[bytes]], tuple[Sequence[Labels], Sequence[State]]]
"""Returns the labels of the group, and the state, of each entry that matches, given keys and values."""


class Grouping:
    """Groups by labels, to which entries are added in blocks.

    The native core merges entries in the same order and with the same result. It reads no others than those that a worker
    writes most of the time: from the first block with another one on, `decode` reads them, and raises what is wrong with it.
    """

    def __init__(self, kind: Kind, labels: Labels, *, natively: bool) -> None:
        self._kind = kind
        self._labels = labels
        extension = native.extension() if natively else None
        self._native: Any = None if extension is None else extension.Groups.of(kind.name)
        """Groups of all blocks so far; None: they are in `_groups`."""
        self._groups: dict[Labels, State] = {}

    def __len__(self) -> int:
        return len(self._groups if self._native is None else self._native)

    def add(self, part: Definition, skip: int, entries: list[Entry], decode: Decode) -> None:
        """Merge entries of one definition, whose labels begin behind `skip` bytes of their keys."""
        if self._native is not None:
            columns = [part.labels.index(it) if it in part.labels else None for it in self._labels]
            if self._native.add(entries, skip, len(part.labels), columns):
                return
            self._groups, self._native = self._native.take(), None
        fold(self._kind, self._groups, *decode([key for key, _ in entries], [value for _, value in entries]))

    def take(self) -> Mapping[Labels, State]:
        """Return the merged state of each group. Call this once, in the end."""
        return self._groups if self._native is None else self._native.take()
