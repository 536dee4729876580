"""The tasks' state as the stores of this process have it, for a gateway that refuses what a task would refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pipeline.core.codec import decode_definition, decode_folded
from pipeline.core.grants import Bounds
from pipeline.core.record import (
    POSITION_KEY,
    TAG_DEFINITION,
    Definition,
    definition_key,
    prefix_end,
    producer_key,
)
from pipeline.core.sequence import Folded
from pipeline.errors import NotFound, PipelineError
from pipeline.ports import KnownDefinitions, ReadableStore
from pipeline.query.progress import position_of
from pipeline.query.reader import ViewReader


class _Seen(NamedTuple):
    store: ReadableStore
    version: int
    keys: frozenset[bytes]


def find_definition(reader: ViewReader, view: str, bounds: Bounds | None) -> Definition | None:
    """Return the merged definition of a view within bounds; None if there is no such view."""
    try:
        return reader.definition(view, bounds)
    except NotFound:
        return None


def find_definitions(
    reader: ViewReader, view: str, kind: str, window_s: int | None, bounds: Bounds | None
) -> Sequence[Definition]:
    """Return the definitions within bounds that a read of a view by kind and window merges (None: the window that was
    defined first).
    """
    try:
        return reader.definitions_of(view, kind, window_s, bounds)
    except NotFound:
        return ()


class StoredState:
    """A `Facts` of the stores that `stores` returns, by partition; None while they can't be read. Safe from any thread."""

    def __init__(self, stores: Callable[[], Mapping[int, ReadableStore]]) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}

    def definitions(self, partition: int) -> KnownDefinitions | None:
        """Return the definitions of a partition; they are read again only after one came or went."""
        try:
            store = self._stores()[partition]
            position = position_of(store.get([POSITION_KEY])[0])
            with self._lock:
                seen = self._seen.get(partition)
            if seen is None or seen.store is not store or seen.version != position.definitions_version:
                view = store.snapshot()
                position = position_of(view.get([POSITION_KEY])[0])
                keys = frozenset([key for key, _ in view.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION))])
                seen = _Seen(store, position.definitions_version, keys)
                with self._lock:
                    self._seen[partition] = seen
            return KnownDefinitions(position.next_offset, seen.keys)
        except (KeyError, PipelineError):
            return None

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        """Return the sequences that a partition has folded of a producer."""
        try:
            value = self._stores()[partition].get([producer_key(producer_id)])[0]
            return None if value is None else decode_folded(value)
        except (KeyError, PipelineError):
            return None

    def expired_before_ms(self, partition: int, definition: Definition) -> int:
        """Return the start of the oldest window that a partition keeps."""
        try:
            value = self._stores()[partition].get([definition_key(definition)])[0]
            return 0 if value is None else decode_definition(value).expired_before_ms
        except (KeyError, PipelineError):
            return 0
