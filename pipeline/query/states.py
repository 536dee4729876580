"""States of groups for a server that merges several servers (`core.gathered`), read from the stores of this one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from operator import itemgetter

from pipeline.core import codec
from pipeline.core.answer import PartitionState
from pipeline.core.codec import DefinitionEntry
from pipeline.core.gathered import (
    DIGEST_BYTES,
    PARTS_VERSION,
    GroupStates,
    PartitionFound,
    StatesAsked,
    StatesFound,
    StatesRead,
    digest,
    packed,
)
from pipeline.core.kinds import KINDS, State
from pipeline.core.query import Labels, MergedDefinition, Query, narrow, pinned_labels
from pipeline.core.record import TAG_DEFINITION, Definition, definitions_prefix, prefix_end
from pipeline.core.span import AskedRange
from pipeline.errors import Invalid, NotReady
from pipeline.ports import StoreView
from pipeline.query.cuts import Cut
from pipeline.query.damage import decode_stored
from pipeline.query.lookups import keys_of
from pipeline.query.matchers import Test
from pipeline.query.plans import decode_definition
from pipeline.query.ranges import Points, expired_before
from pipeline.query.scans import scan_groups, scan_windows
from pipeline.settings import QuerySettings

_KEYS_MAX = 100_000
TestsOf = Callable[[Definition, Query, Callable[[], None]], list[tuple[int, Test]]]


class _Pinned:
    """A store of which only a few keys are looked at."""

    def __init__(self, view: StoreView, keys: Sequence[bytes]) -> None:
        self._view = view
        self._keys = keys

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._view.get(keys)

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        keys = self._keys[bisect_left(self._keys, first) : bisect_left(self._keys, end)]
        found = self._view.get(keys) if keys else []
        return ((key, value) for key, value in zip(keys, found, strict=True) if value is not None)


class _KeptGroups:
    """Keeps the first groups in the order of their labels, and of the others a digest of each."""

    def __init__(self, keep: int | None, settings: QuerySettings) -> None:
        self._keep = keep
        self._groups_max = settings.limit_max
        self._bytes_max = settings.gather_bytes_max
        self._rows: list[tuple[Labels, State]] = []
        self._bound: Labels | None = None
        self._rest: list[bytes] = []

    def offer(self, groups: Mapping[Labels, State]) -> None:
        """Take groups, each of which is offered once."""
        bound = self._bound
        for labels, state in groups.items():
            if bound is not None and labels > bound:
                self._rest.append(digest(labels))
            else:
                self._rows.append((labels, state))
        if self._keep is not None and len(self._rows) > self._keep + max(self._keep // 4, 4_096):
            self._cut(self._keep)
        if len(self._rows) > self._groups_max:
            raise Invalid(f"over {self._groups_max} groups: keep fewer labels, or narrow `where`")
        if len(self._rest) * DIGEST_BYTES > self._bytes_max:
            raise _too_large(self._bytes_max)

    def _cut(self, keep: int) -> None:
        self._rows.sort(key=itemgetter(0))
        self._rest += [digest(labels) for labels, _ in self._rows[keep:]]
        del self._rows[keep:]
        if len(self._rows) == keep and keep:
            self._bound = self._rows[-1][0]

    def taken(self) -> tuple[list[tuple[Labels, State]], bytes]:
        """Return the kept groups, and the digests of the others."""
        if self._keep is not None:
            self._cut(self._keep)
        return self._rows, b"".join(self._rest)


def _too_large(bytes_max: int) -> Invalid:
    return Invalid(f"over {bytes_max} bytes of a part (setting gather_bytes_max): keep fewer labels, or narrow `where`")


class StatesReader:
    """Reads what a request asks for, of one moment of each store. `tests_of` returns the matchers of a query."""

    def __init__(self, asked: StatesAsked, cut: Cut, settings: QuerySettings, tests_of: TestsOf) -> None:
        self._asked = asked
        self._cut = cut
        self._settings = settings
        self._tests_of = tests_of
        wanted = cut.snapshots.keys() if asked.partitions is None else asked.partitions
        if absent := [number for number in wanted if number not in cut.snapshots]:
            raise NotReady(f"partition {absent[0]} is not followed here")
        self._snapshots = {number: cut.snapshots[number] for number in wanted}

    def found(
        self, states: Callable[[], Iterable[PartitionState]], topic_id: str, arrived_s: float, now_s: Callable[[], float]
    ) -> StatesFound:
        """Return the answer. `states` returns how far each partition is, at the end of the reads."""
        entries = self._entries()
        reads: list[GroupStates] = []
        size = 0
        for read in self._asked.reads:
            reads.append(self._read(read))
            size += sum(map(len, reads[-1].states)) + len(reads[-1].rest)
            if size > self._settings.gather_bytes_max:
                raise _too_large(self._settings.gather_bytes_max)
        seen, positions, at_s = self._cut.seen, self._cut.positions, now_s()  # before staleness is stated
        partitions = [
            PartitionFound(
                it.partition,
                it.next_offset,
                it.topic_id,
                it.staleness_ms,
                None if it.lag == 0 else positions[it.partition].source_at_ms if it.next_offset else 0,
                it.committed_at_ms,
            )
            for it in states()
            if it.partition in self._snapshots
        ]
        times = [positions[it.number].source_at_ms for it in partitions if it.next_offset]
        return StatesFound(
            PARTS_VERSION,
            topic_id,
            len(positions.keys() | seen.end_offsets.keys() | seen.elsewhere),
            partitions,
            max(0, floor((at_s - arrived_s) * 1_000)),
            max(0, ceil((at_s - seen.at_s) * 1_000)),
            max(times, default=0),
            entries,
            reads,
        )

    def _entries(self) -> list[bytes]:
        views = self._asked.views
        prefixes = [TAG_DEFINITION] if views is None else [definitions_prefix(view) for view in views]
        return [
            codec.encode_definition(decode_stored(number, decode_definition, value))
            for number, snapshot in self._snapshots.items()
            for prefix in prefixes
            for _, value in snapshot.scan(prefix, prefix_end(prefix))
        ]

    def _read(self, read: StatesRead) -> GroupStates:
        merged = read.merged
        view = merged.definition.view
        query = Query(view, read.where, read.by)
        if read.span is not None:
            span = read.span
            query = Query(
                view, read.where, read.by, range=AskedRange(span.start_ms, span.end_ms, None, span.step_ms, span.over_ms)
            )

        def check() -> None:
            self._cut.check(view)

        kind, tests = KINDS[merged.definition.kind], self._tests_of(merged.definition, query, check)
        if read.span is None:
            kept = _KeptGroups(read.keep, self._settings)
            snapshots = self._looked_at(merged, query, None, read.window_start_ms)
            scan_groups(query, merged, snapshots, tests, check, self._settings.limit_max, kept.offer, read.window_start_ms)
            rows, rest = kept.taken()
            return packed(kind, rows, rest=rest)
        points = Points(query, merged, self._settings, 0)
        points.hide_expired(self._hidden(read, merged))
        scan_windows(query, merged, points, self._looked_at(merged, query, points), tests, check)
        found = points.states()
        return packed(kind, [(labels, state) for (_, labels), state in found.items()], [bucket for bucket, _ in found])

    def _hidden(self, read: StatesRead, merged: MergedDefinition) -> Mapping[Definition, int]:
        """Return the start of the oldest window that is kept: the latest that the caller or a partition here knows."""
        told = dict(zip(read.definitions, read.hidden_before_ms, strict=False))
        own = expired_before(self._own_entries(merged.definition.view))
        return {part: max(told.get(part, 0), own.get(part, 0)) for part in merged.parts}

    def _own_entries(self, view: str) -> Iterator[DefinitionEntry]:
        prefix = definitions_prefix(view)
        for number, snapshot in self._snapshots.items():
            for _, value in snapshot.scan(prefix, prefix_end(prefix)):
                yield decode_stored(number, decode_definition, value)

    def _looked_at(
        self, merged: MergedDefinition, query: Query, points: Points | None, window_start_ms: int = 0
    ) -> Mapping[int, StoreView]:
        """Return the stores, or only the keys of one series in them if `where` pins every label."""
        labels = pinned_labels(merged.definition, query.where)
        if labels is None:
            return self._snapshots
        parts = [(part, own) for part in merged.parts if (own := narrow(merged, part, labels)) is not None]
        if points is not None and sum(len(points.windows(part)) for part, _ in parts) * len(self._snapshots) > _KEYS_MAX:
            return self._snapshots
        keys = sorted(keys_of(parts, points, window_start_ms))
        return {number: _Pinned(snapshot, keys) for number, snapshot in self._snapshots.items()}
