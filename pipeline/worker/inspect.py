"""Reads deltas, changelog and stores record by record, in order and in bounded memory, and describes the records."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain

import msgspec

from pipeline.core.codec import decode_definition
from pipeline.core.description import (
    EntryText,
    RecordText,
    describe_entry,
    describe_record,
)
from pipeline.core.record import (
    STORE_META_KEY,
    TAG_DEFINITION,
    Definition,
    Records,
    definitions_prefix,
    prefix_end,
    view_prefix,
)
from pipeline.errors import BadRecord, NewerFormat
from pipeline.ports import Log, LogReader, Store
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.follower import read_meta

_COUNT_MAX = 200
_BYTES_MAX = 4 * 2**20
_POLL_S = 0.2
_KEYS_END = b"\xff" * 8


class Range(msgspec.Struct, frozen=True):
    """Range of records to read of each partition."""

    partitions: Sequence[int]
    start_offset: int = 0
    end_offset: int | None = None
    """End of the range; None: the end of the topic when the reading begins."""
    follow: bool = False
    """True to read on at the end, until `stopping`."""


class ChangelogText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record of the changelog."""

    partition: int
    offset: int
    at_ms: int
    entry: EntryText


class StoredText(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of a store."""

    partition: int
    entry: EntryText


def read_deltas(
    log: Log, wanted: Range, *, view: str = "", series_max: int | None = None, stopping: Callable[[], bool] = lambda: False
) -> Iterator[RecordText]:
    """Yield the records of the deltas topic; with `view`, only batches about it, reduced to its groups and orders."""
    for records in _runs(log, DELTAS, wanted, stopping):
        for offset, at_ms, value in zip(records.offsets, records.at_ms, records.values, strict=True):
            found = describe_record(records.partition, offset, at_ms, value, series_max=series_max)
            if not view:
                yield found
            elif (about := _about(found, view)) is not None:
                yield about


def _about(found: RecordText, view: str) -> RecordText | None:
    batch = found.batch
    if batch is None:
        return None
    groups = [it for it in batch.groups if it.view == view]
    controls = [it for it in batch.controls if it.view == view]
    if not groups and not controls:
        return None
    return msgspec.structs.replace(found, batch=msgspec.structs.replace(batch, groups=groups, controls=controls))


def read_changelog(
    log: Log, wanted: Range, *, view: str = "", stopping: Callable[[], bool] = lambda: False
) -> Iterator[ChangelogText]:
    """Yield the records of the changelog; with `view`, only its series and definitions.

    Labels are named once the definition was read, which compaction can have left behind its series.
    """
    definitions: dict[int, dict[bytes, Definition]] = {}
    for records in _runs(log, CHANGELOG, wanted, stopping):
        known = definitions.setdefault(records.partition, {})
        for offset, at_ms, key, value in zip(records.offsets, records.at_ms, records.keys, records.values, strict=True):
            if key is not None and key.startswith(TAG_DEFINITION) and value is not None:
                _learn(known, key, value)
            entry = describe_entry(key, value, known.get)
            if view in ("", entry.view):
                yield ChangelogText(records.partition, offset, at_ms, entry)


def _learn(known: dict[bytes, Definition], key: bytes, value: bytes) -> None:
    with suppress(BadRecord, NewerFormat):
        known[key] = decode_definition(value).definition


def read_store(partition: int, store: Store, *, view: str = "") -> Iterator[StoredText]:
    """Yield the entries of a store in the order of their keys; with `view`, only its series and definitions."""
    known: dict[bytes, Definition] = {}
    for key, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
        _learn(known, key, value)
    if view:
        prefixes = definitions_prefix(view), view_prefix(view)
        entries = chain.from_iterable(store.scan(prefix, prefix_end(prefix)) for prefix in prefixes)
    else:
        entries = chain(store.scan(b"", _KEYS_END), ())
    for key, value in entries:
        if key == STORE_META_KEY:
            meta = EntryText("meta", fields=msgspec.structs.asdict(read_meta(store)))
            yield StoredText(partition, meta)
        else:
            yield StoredText(partition, describe_entry(key, value, known.get))


def _runs(log: Log, topic: str, wanted: Range, stopping: Callable[[], bool]) -> Iterator[Records]:
    with closing(log.reader(topic)) as reader:
        places: dict[int, int] = {}
        for number in wanted.partitions:
            start, end = log.watermarks(topic, number)
            places[number] = max(start, wanted.start_offset)
            last = end if wanted.end_offset is None else min(end, wanted.end_offset)
            if not wanted.follow:
                yield from _partition(reader, number, places[number], last, stopping)
        if wanted.follow:
            yield from _follow(reader, places, stopping)


def _partition(
    reader: LogReader, number: int, next_offset: int, end_offset: int, stopping: Callable[[], bool]
) -> Iterator[Records]:
    if next_offset < end_offset:
        reader.assign({number: next_offset})
    while next_offset < end_offset and not stopping():
        for records in reader.poll(record_count_max=_COUNT_MAX, bytes_max=_BYTES_MAX, timeout_s=_POLL_S):
            next_offset = records.next_offset
            yield _below(records, end_offset)


def _follow(reader: LogReader, places: Mapping[int, int], stopping: Callable[[], bool]) -> Iterator[Records]:
    reader.assign(places)
    while not stopping():
        yield from reader.poll(record_count_max=_COUNT_MAX, bytes_max=_BYTES_MAX, timeout_s=_POLL_S)


def _below(records: Records, end_offset: int) -> Records:
    count = bisect_left(records.offsets, end_offset)
    if count == len(records.offsets):
        return records
    columns = {name: getattr(records, name)[:count] for name in ("offsets", "at_ms", "keys", "values")}
    return msgspec.structs.replace(records, **columns, next_offset=end_offset)
