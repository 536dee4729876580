"""Traces of committed entries that foreign records cover, after compaction may have removed the committed ones.

Compaction keeps the newest record of a key, whoever wrote it. So while a partition has no owner, a foreign record can take
ours out of the changelog. A store that has not read ours by then can't tell whether there was one. An owner that wrote a
tombstone would lose the entry for good; so a person decides, unless other traces tell.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection

from pipeline.core.codec import decode_definition
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_FENCE,
    TAG_PRODUCER,
    TAG_SERIES,
    Records,
    fingerprint,
    prefix_end,
    split_key,
)
from pipeline.errors import BadRecord, NotReady, RecordsLost, StoreAhead, StoreCorrupt, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, ReadableStore
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.follower import FETCH_BYTES_MAX
from pipeline.worker.foreign import Barrier, Foreign, Lineage, not_entries

_log = logging.getLogger(__name__)
_SILENT_MAX_S = 60.0
_HINT = "or start with --accept-loss to go on without them"
_NAMED_MAX = 3


class Traces:
    """Records of some keys in a changelog: which keys have one of ours, and when the first that is left was written."""

    def __init__(self, partition: int, keys: Collection[bytes]) -> None:
        self.ours: set[bytes] = set()
        self.first_ms: dict[bytes, int] = {}
        self.at_ms = 0
        """Time at which the newest record of all was written."""
        self._keys = frozenset(keys)
        self._lineage = Lineage(partition, 0)
        self._waiting: list[tuple[int, bytes]] = []
        """Offsets and keys of records behind the last commit, which may be part of the next."""

    def take(self, records: Records) -> None:
        """Take in the records that were read next."""
        special = {*not_entries(records.keys)}
        rows = zip(records.offsets, records.at_ms, records.keys, records.values, strict=True)
        for index, (offset, at_ms, key, value) in enumerate(rows):
            self.at_ms = max(self.at_ms, at_ms)
            if key in self._keys:
                self.first_ms.setdefault(key, at_ms)
            if index in special:
                if key == POSITION_KEY and (position := self._lineage.take_position(offset, value)) is not None:
                    foreign = range(position.previous_end_offset, position.begin_offset)
                    self.ours.update(it for at, it in self._waiting if at not in foreign)
                    self.ours.add(POSITION_KEY)
                    self._waiting.clear()
            elif key in self._keys:
                self._waiting.append((offset, key))


def find_traces(
    partition: int, log: Log, clock: Clock, keys: Collection[bytes], barrier: Barrier, stopping: Callable[[], bool]
) -> Traces:
    """Read the changelog from its start to a fence record that was read before.

    Raises `Unavailable` if the changelog can't be read, `NotReady` if `stopping` turns true.
    """
    traces, next_offset = Traces(partition, keys), log.watermarks(CHANGELOG, partition).start_offset
    reader = log.reader(CHANGELOG)
    try:
        reader.assign({partition: next_offset})
        came_s = clock.monotonic_s()
        while next_offset <= barrier.offset:
            for records in reader.poll(record_count_max=10_000, bytes_max=FETCH_BYTES_MAX, timeout_s=1.0):
                traces.take(records)
                next_offset, came_s = records.next_offset, clock.monotonic_s()
            if stopping():
                raise NotReady(f"partition {partition}: its start was stopped")
            if clock.monotonic_s() - came_s > _SILENT_MAX_S:
                raise Unavailable(f"changelog-{partition} can't be read from {next_offset} on")
        return traces
    finally:
        reader.close()


def check_recoverable(
    partition: int, store: ReadableStore, keys: Collection[bytes], traces: Traces, *, young_s: float, accept_loss: bool
) -> None:
    """Raise `RecordsLost` if the committed values of some covered keys can't be known any more.

    `store` was restored up to where the traces were read. The committed value of a key is known, and in the store, if a
    record of ours is left, which is the newest of ours; if the foreign ones are younger than `young_s`, so that compaction
    has removed nothing because of them; or if the key is that of a series which the store lacks although it has as many
    series as the definition says. With `accept_loss` keys of unknown value are only logged.
    """
    young_ms = traces.at_ms - young_s * 1000
    unknown = {key for key in keys if key not in traces.ours and traces.first_ms.get(key, 0) <= young_ms}
    lost = sorted(unknown - _never_there(partition, store, unknown))
    if lost == [POSITION_KEY] and next(iter(store.scan(TAG_DEFINITION, TAG_FENCE)), None) is None:
        return  # no entries: what a lost position covered is folded again, or missed by `_check_position`
    if not lost:
        return
    what = (
        f"changelog-{partition}: somebody else has written over {len(lost)} entries ({described(lost)}), and no record of "
        "ours is left that would tell what they were"
    )
    if not accept_loss:
        raise RecordsLost(f"{what}: bring back the changelog, or a store of an earlier owner; {_HINT}")
    _log.error("%s; going on without them", what)


def _never_there(partition: int, store: ReadableStore, unknown: Collection[bytes]) -> set[bytes]:
    """Return the keys of series that the store does not have and does not miss."""
    never: set[bytes] = set()
    series = sorted(key for key in unknown if key[:1] == TAG_SERIES)
    whole: dict[bytes, bool] = {}
    for key, value in zip(series, store.get(series), strict=True):
        try:
            _, _, suffix = split_key(key)
        except BadRecord:
            never.add(key)  # we write no such key
            continue
        prefix = key.removesuffix(suffix)
        definition = TAG_DEFINITION + prefix[1:]
        if value is None and definition not in unknown:
            if prefix not in whole:
                whole[prefix] = _is_whole(partition, store, prefix, definition)
            if whole[prefix]:
                never.add(key)
    return never


def _is_whole(partition: int, store: ReadableStore, prefix: bytes, definition: bytes) -> bool:
    """Return whether a store has all series of a definition, which was not covered; an absent definition has none."""
    (value,) = store.get([definition])
    try:
        expected = 0 if value is None else decode_definition(value).series_count
    except BadRecord as error:
        raise StoreCorrupt(f"partition {partition}: {error}") from None
    return sum(1 for _ in store.scan(prefix, prefix_end(prefix))) == expected


def described(keys: Collection[bytes]) -> str:
    """Return a short description of keys."""
    named = dict.fromkeys(map(_name, keys))
    return ", ".join([*named][:_NAMED_MAX]) + (" and more" if len(named) > _NAMED_MAX else "")


def _name(key: bytes) -> str:
    if key == POSITION_KEY:
        return "the position"
    if key[:1] == TAG_PRODUCER:
        return f"producer {fingerprint(key[1:].decode(errors='replace'))}"
    try:
        view, _, _ = split_key(key)
    except BadRecord:
        return "an entry of no view"
    return f"view {view}"


def foreign_keys(
    partition: int,
    log: Log,
    clock: Clock,
    end_offset: int,
    undo_offset: int | None,
    barrier: Barrier,
    *,
    ask_young_s: Callable[[], float],
    timeout_s: float,
    metrics: Metrics = NO_METRICS,
) -> set[bytes]:
    """Return the keys of entries between an owner's last commit and its own fence record, where nobody else may write.

    The commit ended below `end_offset`. With `undo_offset`, the offset of its first delta, this raises `StoreCorrupt` if the
    changelog does not hold it: the broker has aborted it after all, and the store must begin anew where the changelog
    ends; or `StoreAhead` if the deltas are gone, too. A foreign position can have taken the commit's away by compaction, but
    not within `ask_young_s()`. Raises `Unavailable` if the fence record can't be read in time.
    """
    lineage, foreign = Lineage(partition, barrier.offset + 1), Foreign(partition, metrics)
    lineage.awaited = barrier
    deadline_s = clock.monotonic_s() + timeout_s
    reader = log.reader(CHANGELOG)
    positions: list[tuple[int, int]] = []
    """Offset of each position record, and the time at which the log accepted it."""
    read_ms = 0
    try:
        reader.assign({partition: max(end_offset - 1, log.watermarks(CHANGELOG, partition).start_offset)})
        while not lineage.passed:
            for records in reader.poll(record_count_max=1_000, bytes_max=FETCH_BYTES_MAX, timeout_s=1.0):
                rows = zip(records.keys, records.offsets, records.at_ms, strict=True)
                positions += [(offset, at_ms) for key, offset, at_ms in rows if key == POSITION_KEY]
                read_ms = max((read_ms, *records.at_ms[-1:]))
                _sort_out(records, bisect_left(records.offsets, end_offset), lineage, foreign)
            if clock.monotonic_s() >= deadline_s and not lineage.passed:
                raise Unavailable(f"changelog-{partition} can't be read up to {barrier.offset} within {timeout_s} s")
    finally:
        reader.close()
    if undo_offset is not None and not any(offset < end_offset for offset, _ in positions):
        if positions and positions[0][1] <= read_ms - ask_young_s() * 1000:
            return foreign.keys
        what = f"partition {partition}: the broker aborted a commit, at {end_offset - 1}, that it had acknowledged"
        if log.watermarks(DELTAS, partition).start_offset > undo_offset:
            raise StoreAhead(f"{what}, and its records are gone from {DELTAS}")
        raise StoreCorrupt(what, partition)
    return foreign.keys


def _sort_out(records: Records, first: int, lineage: Lineage, foreign: Foreign) -> None:
    """Note all records from an index on but the fences of the partition's owners as foreign."""
    special = {*not_entries(records.keys)}
    rows = [*zip(records.offsets, records.keys, records.values, strict=True)]
    for index, (offset, key, value) in enumerate(rows[first:], first):
        if index not in special and key is not None:
            foreign.note_entry(offset, key)
        elif key != FENCE_KEY or not lineage.take_fence(offset, value):
            foreign.note(offset, "it stands behind our last commit")
