"""Compares a partition's store with its changelog, and changes neither.

The changelog is the truth. It is read into a scratch store that keeps the newest record of each key with its offset,
tombstones too; then store and scratch are walked side by side in the order of keys. Memory does not grow with the state.

A store may be behind: it has no write-ahead log, so after kill -9 it is as it was after some earlier commit. Whatever has
its newest record at or beyond the store's `changelog_next_offset` is therefore not compared: the next restore sets it.
Everything else must be equal. Compaction does not weaken this. It removes only what a newer record of the same key
supersedes, and the newest record, the only one that is used here, stays; if it stands below the store's offset, then the
store has applied it. The exception are tombstones older than `delete_retention_ms`: a store that can have missed one is
not compared but called stale, by the same rule by which the next start rebuilds it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict, replace

from pipeline.core import codec
from pipeline.core.query import Entry, describe
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    STORE_META_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Records,
    definitions_prefix,
    fingerprint,
    parse_suffix,
    split_key,
)
from pipeline.errors import BadRecord, LogCorrupt, NotFound, RecordsLost, StoreAhead, StoreCorrupt
from pipeline.ports import Clock, Log, Store, Stores
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import read_meta, read_position
from pipeline.worker.foreign import Foreign, Lineage, Sieve
from pipeline.worker.restore import check_restorable

Verdict = Literal["equal", "behind", "missing", "stale", "different", "ahead", "corrupt", "unreadable"]
"""Result of verifying: `unreadable` is about the changelog, all others about the store."""
FINE: frozenset[str] = frozenset(("equal", "behind", "missing", "stale"))
"""Verdicts after which a start arrives at the state of the changelog, and an operator has nothing to do."""

_OFFSET_BYTES = 8
_HELD_MAX = 100_000
"""Upper limit of entries that wait for the end of their commit; compaction can have removed all position records but one."""
_KEYS_END = b"\xff" * 8
_PROGRESS_EVERY = 20_000


class Difference(msgspec.Struct, frozen=True):
    """One entry on which store and changelog do not agree."""

    what: Literal["missing", "extra", "different"]
    """State of the entry in the store, compared with the changelog."""
    entry: str
    """Name of the entry: the series `view{label="value"}`, the definition of a view, a producer, the position."""
    expected: Any
    """Value in the changelog, decoded as far as it can be, for a series its state; None: nothing."""
    found: Any
    """Value in the store."""


class Result(msgspec.Struct, frozen=True):
    """Result of verifying one partition."""

    partition: int
    verdict: Verdict
    detail: str = ""
    """Reason of the verdict, in words, unless the numbers show it."""
    changelog_record_count: int = 0
    changelog_foreign_count: int = 0
    """Number of foreign records, which are left out."""
    entries_compared: int = 0
    entries_superseded: int = 0
    """Number of entries that were not compared, because the store is behind and the next restore sets them."""
    behind: int = 0
    """Number of changelog records that the store does not reflect yet."""
    difference_count: int = 0
    differences: list[Difference] = []
    """First differences."""
    store_next_offset: int | None = None
    """Offset up to which the store reflects the changelog, by its own record."""
    changelog_end_offset: int = 0
    store_position: dict[str, Any] | None = None
    changelog_position: dict[str, Any] | None = None

    @property
    def fine(self) -> bool:
        """True if an operator has nothing to do."""
        return self.verdict in FINE


class VerifyProgress(msgspec.Struct, frozen=True):
    """Progress of verifying one partition."""

    partition: int
    doing: Literal["reading", "comparing"]
    done: int
    total: int
    """Upper bound: compaction leaves holes, and several records can be of one key."""


def verify(
    partition: int,
    *,
    stores: Stores,
    scratch: Stores,
    log: Log,
    clock: Clock,
    delete_retention_ms: int,
    fetch_count_max: int,
    differences_max: int,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> Result:
    """Compare one partition. `stores.open` must raise `NotFound` for a store that does not exist.

    Log and store must not be written meanwhile. The scratch store grows as large as the state, and is destroyed.
    """
    with ExitStack() as closer:
        closer.callback(scratch.destroy, partition)
        truth = closer.enter_context(closing(scratch.open(partition)))
        store: Store | None = None
        next_offset, detail = 0, ""
        verdict: Verdict = "missing"
        try:
            opened = closer.enter_context(closing(stores.open(partition)))
            next_offset = read_meta(opened).changelog_next_offset
            store = opened
        except NotFound:
            pass
        except StoreCorrupt as error:
            verdict, detail = "corrupt", str(error)
        try:
            # In any case: nobody should delete a store that the changelog could not replace.
            reading = _ChangelogScan(partition, log, truth, next_offset, fetch_count_max, progress)
        except (BadRecord, LogCorrupt, RecordsLost, StoreCorrupt) as error:
            return Result(partition, "unreadable", str(error))
        result = Result(
            partition,
            verdict,
            detail,
            changelog_record_count=reading.count,
            changelog_foreign_count=reading.foreign.count,
            changelog_end_offset=reading.end_offset,
            changelog_position=asdict(reading.position),
            behind=reading.behind,
        )
        if store is None:
            return result
        try:
            result = replace(result, store_next_offset=next_offset, store_position=asdict(read_position(store)))
            if next_offset > reading.end_offset:
                return replace(result, verdict="ahead")
            away = next_offset < reading.end_offset and _too_old(partition, store, log, clock, delete_retention_ms)
            if away:
                return replace(result, verdict="stale", detail=away)
            return _Comparison(store, truth, next_offset, differences_max, progress).run(result)
        except StoreAhead as error:
            return replace(result, verdict="ahead", detail=str(error))
        except RecordsLost as error:
            return replace(result, verdict="unreadable", detail=str(error))
        except StoreCorrupt as error:
            return replace(result, verdict="corrupt", detail=str(error))


def _too_old(partition: int, store: Store, log: Log, clock: Clock, delete_retention_ms: int) -> str:
    """Return why a restore from this store would not arrive at the changelog's state; empty if it would."""
    try:
        check_restorable(partition, store, log, clock, delete_retention_ms)
    except StoreCorrupt as error:
        return str(error)
    return ""


class _ChangelogScan:
    """Reads a changelog into a scratch store, which keeps of each key's newest record the offset and, unless it is a
    tombstone, the value.
    """

    def __init__(
        self,
        partition: int,
        log: Log,
        scratch: Store,
        store_next_offset: int,
        fetch_count_max: int,
        progress: Callable[[VerifyProgress], None],
    ) -> None:
        self.count = self.behind = 0
        self._scratch = scratch
        self._store_next_offset = store_next_offset
        start, self.end_offset = log.watermarks(CHANGELOG, partition)
        self.foreign = Foreign(partition)
        self._sieve = Sieve(Lineage(partition, start), self.foreign)
        with closing(log.reader(CHANGELOG)) as reader:
            reader.assign({partition: start})
            next_offset = start
            while next_offset < self.end_offset:
                for records in reader.poll(record_count_max=fetch_count_max, bytes_max=64 * 2**20, timeout_s=1.0):
                    self._keep(records)
                    next_offset = records.next_offset
                progress(VerifyProgress(partition, "reading", next_offset - start, self.end_offset - start))
        self._sieve.drop(0, self.end_offset)  # part of no commit: see `Follower.settle`
        (newest,) = scratch.get([POSITION_KEY])
        self.position = NO_POSITION if newest is None else codec.decode_position(newest[_OFFSET_BYTES:])

    def _keep(self, records: Records) -> None:
        # Beyond the end there may be half of a commit, if a worker goes on.
        count = bisect_left(records.offsets, self.end_offset)
        if not count:
            return
        ended = Records(
            records.partition,
            records.offsets[:count],
            records.at_ms[:count],
            records.keys[:count],
            records.values[:count],
            records.next_offset,
        )
        self._sieve.take(ended)
        held = len(self._sieve)
        offsets, keys, values = self._sieve.pop(held if held > _HELD_MAX else self._sieve.whole)
        found = [
            offset.to_bytes(_OFFSET_BYTES, "big") + (value or b"") for offset, value in zip(offsets, values, strict=True)
        ]
        self._scratch.write(keys, found)
        self.count += len(keys)
        self.behind += len(offsets) - bisect_left(offsets, self._store_next_offset)


class _Comparison:
    """Compares a store with the scratch store, key by key."""

    def __init__(
        self,
        store: Store,
        truth: Store,
        store_next_offset: int,
        differences_max: int,
        progress: Callable[[VerifyProgress], None],
    ) -> None:
        self._store = store
        self._truth = truth
        self._store_next_offset = store_next_offset
        self._differences_max = differences_max
        self._progress = progress

    def run(self, result: Result) -> Result:
        compared = superseded = different = 0
        differences: list[Difference] = []
        ours = ((key, value) for key, value in self._store.scan(b"", _KEYS_END) if key != STORE_META_KEY)
        for count, (key, found, newest) in enumerate(_side_by_side(ours, self._truth.scan(b"", _KEYS_END))):
            if count % _PROGRESS_EVERY == 0:
                self._progress(VerifyProgress(result.partition, "comparing", count, result.changelog_record_count))
            expected = None
            if newest is not None:
                if int.from_bytes(newest[:_OFFSET_BYTES], "big") >= self._store_next_offset:
                    superseded += 1
                    continue
                expected = newest[_OFFSET_BYTES:] or None
            compared += expected is not None or found is not None
            if found != expected:
                different += 1
                if len(differences) < self._differences_max:
                    differences.append(self._difference(key, expected, found))
        return replace(
            result,
            verdict="different" if different else "behind" if result.behind else "equal",
            entries_compared=compared,
            entries_superseded=superseded,
            difference_count=different,
            differences=differences,
        )

    def _difference(self, key: bytes, expected: bytes | None, found: bytes | None) -> Difference:
        return Difference(
            "extra" if expected is None else "missing" if found is None else "different",
            self._name(key),
            None if expected is None else _decoded(key, expected),
            None if found is None else _decoded(key, found),
        )

    def _name(self, key: bytes) -> str:
        tag, rest = key[:1], key[1:]
        try:
            if key == POSITION_KEY:
                return "the position"
            if tag == TAG_DEFINITION:
                view, definition, _ = split_key(key)
                return f"the definition {definition.hex()} of view {view}"
            if tag == TAG_PRODUCER:
                return f"producer {fingerprint(rest.decode())}"
            if tag == TAG_SERIES:
                return self._series_name(*split_key(key))
        except (BadRecord, UnicodeDecodeError):
            pass
        return f"unknown key {key.hex()}"

    def _series_name(self, view: str, definition: bytes, suffix: bytes) -> str:
        _, values = parse_suffix(suffix)
        (newest,) = self._truth.get([definitions_prefix(view) + definition])
        names: tuple[str, ...] = ()
        if newest is not None and len(newest) > _OFFSET_BYTES:
            names = codec.decode_definition(newest[_OFFSET_BYTES:]).definition.labels
        if len(names) != len(values):
            names = tuple(f"label{i}" for i in range(len(values)))
        pairs = (f"{name}={msgspec.json.encode(value).decode()}" for name, value in zip(names, values, strict=True))
        return f"{view}{{{', '.join(pairs)}}}"


def _side_by_side(found: Iterator[Entry], expected: Iterator[Entry]) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Yield every key of two scans, in order, with the value in each scan, or None."""
    a, b = next(found, None), next(expected, None)
    while True:
        if a is not None and (b is None or a[0] < b[0]):
            yield a[0], a[1], None
            a = next(found, None)
        elif b is not None and (a is None or b[0] < a[0]):
            yield b[0], None, b[1]
            b = next(expected, None)
        elif a is not None and b is not None:
            yield a[0], a[1], b[1]
            a, b = next(found, None), next(expected, None)
        else:
            return


def _decoded(key: bytes, value: bytes) -> Any:
    """Return a value decoded as far as it can be; its bytes in hex if it can't."""
    try:
        if key == POSITION_KEY:
            return asdict(codec.decode_position(value))
        if key[:1] == TAG_PRODUCER:
            return asdict(codec.decode_folded(value))
        if key[:1] == TAG_DEFINITION:
            entry = codec.decode_definition(value)
            counts = {"series_count": entry.series_count, "expired_before_ms": entry.expired_before_ms}
            return {"definition": describe(entry.definition), **counts}
        state = codec.decode_states(codec.kind_of_entry(value), [value])[0]
        expires_at_ms = codec.expires_at_ms(value)
        return {"state": state, "expires_at_ms": expires_at_ms} if expires_at_ms else state
    except (BadRecord, msgspec.MsgspecError, ValueError, TypeError, LookupError):
        return value.hex()
