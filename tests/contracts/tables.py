"""Both tables, as the tests of their contract open them, and the content of their drafts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import count
from mmap import mmap
from typing import Any

import msgspec
import pytest

from pipeline import native
from pipeline.core import codec
from pipeline.core.kinds import KINDS, State
from pipeline.core.record import Batch, Definition, parse_suffix
from pipeline.publisher.spool.ring import END_BYTES, HEADER
from pipeline.publisher.table import Table
from pipeline.publisher.view import check_value

NOW_MS = 1_700_000_000_000
WAYS: Mapping[str, Mapping[str, int]] = {
    "plain": {},
    "native": {},
    "native-one-shard": {"shard_count": 1},
    "native-lanes": {"lane_count": 4},
}
"""The tables; the native one with different numbers of shards."""
JOURNALS: Mapping[str, Mapping[str, int]] = {
    "plain-journal": {},
    "native-journal": {},
    "native-journal-shards": {"shard_count": 4, "lane_count": 2},
}
"""The tables of a publisher with a journal."""

every_table = pytest.mark.parametrize("way", [*WAYS, *JOURNALS])
every_journal = pytest.mark.parametrize("way", JOURNALS)


def extension() -> Any:
    """Return the native core, or skip the test without one, unless PIPELINE_NATIVE=require."""
    found = native.extension()
    if found is None:
        assert os.environ.get(native.VARIABLE) != "require"
        pytest.skip(native.describe())
    return found


class Page:
    """A segment in memory."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.offset, self.seed, self.limit = number, HEADER.size, 7, size - END_BYTES
        self.bytes = memoryview(mmap(-1, size))
        self.words = self.bytes.cast("Q")


class Pages:
    """A journal in memory."""

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self.numbers = count(1)
        self.pages: dict[int, dict[int, Page]] = {}

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        return next(self.numbers)

    def segment(self, shard: int, full: int, length: int) -> Any:
        # A handler or another thread may come in anywhere: whoever is first, all get the same.
        page = Page(full + 1, max(self.size, length + 128 & -8))
        return self.pages.setdefault(shard, {}).setdefault(full + 1, page)


class Lab:
    """A table, and the callbacks of its publisher."""

    def __init__(self, way: str, *, bytes_max: int = 1 << 40, **settings: Any) -> None:
        self.now_ms = NOW_MS
        self.opened = 0
        self.asked: list[tuple[int, int]] = []
        self.on_full: Callable[[], bool] = lambda: False
        self.on_open: Callable[[], object] = lambda: None
        kind: Any = Table if way.startswith("plain") else extension().Table
        self.journal: Any = settings.get("journal")
        if way in JOURNALS:
            self.journal = self.journal or Pages()
            settings = {**JOURNALS[way], **settings, "journal": self.journal}
        self.table = kind(
            bytes_max=bytes_max,
            check=check_value,
            opening=self._opening,
            full=self._full,
            now_ms=lambda: self.now_ms,
            **{**WAYS.get(way, {}), **settings},
        )

    def _opening(self) -> None:
        self.opened += 1
        self.on_open()

    def _full(self, bytes_needed: int, delta_count: int) -> bool:
        self.asked.append((bytes_needed, delta_count))
        return self.on_full()

    def define(self, kind: str = "sum", labels: Sequence[str] = ("region",), series_max: int = 10**9, **more: Any) -> Any:
        """Define a new view, named for its kind and a number."""
        spread = more.pop("spread", 1)
        definition = Definition(more.pop("view", kind), kind, tuple(labels), **more)
        return self.table.define(definition, series_max, None, spread)

    def drain(
        self, partition_count: int = 1, busy: bytes | None = None, batch_bytes_max: int = 1 << 20, turn: int = 0
    ) -> list[Any]:
        return list(self.table.drain(partition_count, busy, batch_bytes_max, turn))


def header(partition: int) -> Batch:
    return Batch("producer", 1, partition, 7, 3, NOW_MS, [])


def batch_of(draft: Any) -> Batch:
    """Return the batch of a draft, decoded; its bytes must be those of `encode_batch` for the same groups."""
    sealed = codec.encode_drafted(header(draft.partition), draft.groups)
    batch = codec.decode_batch(sealed)
    assert codec.encode_batch(batch) == sealed
    assert (len(batch.groups), sum(len(group.suffixes) for group in batch.groups)) == (draft.group_count, draft.series_count)
    return batch


def states_of(drafts: Iterable[Any]) -> dict[tuple[str, tuple[str, ...]], State]:
    """Return the states in drafts by view and labels, merged where a series stands in several."""
    found: dict[tuple[str, tuple[str, ...]], State] = {}
    for draft in drafts:
        for group in batch_of(draft).groups:
            merge = KINDS[group.definition.kind].merge
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                key = group.definition.view, parse_suffix(suffix)[1]
                found[key] = merge(found[key], state) if key in found else state
    return found


def raw_series(drafts: Iterable[Any]) -> list[tuple[str, bytes, list[Any]]]:
    """Return view, suffix and columns of each series in drafts, also of windows, without `decode_batch`."""
    found = []
    for draft in drafts:
        for definition, suffixes, columns in msgspec.msgpack.decode(draft.groups):
            found += [(definition[0], suffix, [column[i] for column in columns]) for i, suffix in enumerate(suffixes)]
    return found


def fold(kind: str, deltas: Sequence[State]) -> State:
    """Merge deltas one after the other, as the oracle."""
    return reduce(KINDS[kind].merge, deltas)


def same(kind: str, a: State, b: State) -> bool:
    """Return whether two states are the same to the bit."""
    one, other = codec.encode_states(KINDS[kind], [a, b])
    return one == other
