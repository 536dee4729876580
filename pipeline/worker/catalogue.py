"""Definitions and positions of all partitions, read from the changelog by a process that has no stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipeline.core.codec import DefinitionEntry, decode_definition
from pipeline.core.record import POSITION_KEY, STORE_META_KEY, TAG_DEFINITION
from pipeline.core.token import Token
from pipeline.errors import BadRecord, StoreCorrupt, Unavailable
from pipeline.ports import Clock, Log, LogReader, StoreView
from pipeline.threads import POLL_INTERVAL_S
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import FETCH_BYTES_MAX, Follower, read_position

_FETCH_COUNT_MAX = 10_000
_BUFFER_ENTRIES_MAX = 10_000


class _DefinitionStore:
    """A `ports.Store` that keeps definitions and the position, and forgets all else."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.entries.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return ((key, self.entries[key]) for key in sorted(self.entries) if start <= key < end)

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        for key, value in zip(keys, values, strict=True):
            if key in (POSITION_KEY, STORE_META_KEY) or key.startswith(TAG_DEFINITION):
                self.entries.pop(key, None)
                if value is not None:
                    self.entries[key] = value

    def snapshot(self) -> StoreView:
        return self

    def close(self) -> None:
        """Do nothing."""


class Catalogue:
    """Definitions in a changelog. One thread at a time.

    The first `read` goes through all of the changelog, which takes as long as a restore but little memory; each later one
    reads what was written since.
    """

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._heads: dict[int, _DefinitionStore] = {}
        self._followers: dict[int, Follower] = {}
        self._reader: LogReader | None = None

    def close(self) -> None:
        """Give back the connection."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def read(self, deadline_s: float) -> None:
        """Read all that the changelog holds now. Raises `Unavailable` if that is not done by `deadline_s`."""
        ends = self._log.end_offsets(CHANGELOG)
        self._open(ends)
        assert self._reader is not None
        while any(it.next_offset < ends[number] for number, it in self._followers.items()):
            for records in self._reader.poll(
                record_count_max=_FETCH_COUNT_MAX, bytes_max=FETCH_BYTES_MAX, timeout_s=POLL_INTERVAL_S
            ):
                self._followers[records.partition].apply(records)
            if self._clock.monotonic_s() > deadline_s:
                raise Unavailable("the changelog was not read in time")

    def _open(self, partitions: Iterable[int]) -> None:
        """Read from all partitions that there are now."""
        new = {*partitions} - self._followers.keys()
        for number in new:
            heads = self._heads[number] = _DefinitionStore()
            self._followers[number] = Follower(number, heads, buffer_entries_max=_BUFFER_ENTRIES_MAX)
        if self._reader is None:
            self._reader = self._log.reader(CHANGELOG)
        if new:
            starts = self._log.start_offsets(CHANGELOG)
            self._reader.assign({n: max(it.next_offset, starts.get(n, 0)) for n, it in self._followers.items()})

    def entries(self) -> list[DefinitionEntry]:
        """Return the definition entries of all partitions."""
        try:
            return [
                decode_definition(value)
                for heads in self._heads.values()
                for key, value in heads.entries.items()
                if key.startswith(TAG_DEFINITION)
            ]
        except BadRecord as error:
            raise StoreCorrupt(str(error)) from None

    def covers(self, token: Token) -> bool:
        """Return whether all that the token covers is folded, as far as was read."""
        return all(self._covers(number, offset, token.topic_id) for number, offset in token.next_offsets.items())

    def _covers(self, number: int, next_offset: int, topic_id: str) -> bool:
        heads = self._heads.get(number)
        if heads is None:
            return False
        position = read_position(heads)
        return position.next_offset >= next_offset and position.source_id == topic_id
