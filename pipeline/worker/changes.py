"""Changes of a view, read from the changelog: for each entry of a series, its answer before and after.

A feed follows the partitions of its worker. For each it has a small store with the entries of its view whose changes were
delivered, and the offset behind them, which is written in the same batch: after a crash the feed goes on from there. Where
a partition has no such store, because another worker had it, the offset in the group tells how far that worker came: entries
up to there go into the store, and are delivered no more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import pipeline.metrics as m
from pipeline.core.codec import DefinitionEntry, decode_definition, decode_states
from pipeline.core.kinds import KINDS
from pipeline.core.query import merged
from pipeline.core.record import (
    TAG_DEFINITION,
    Definition,
    Records,
    definition_key,
    definitions_prefix,
    parse_suffix,
    prefix_end,
    split_key,
    view_prefix,
)
from pipeline.errors import BadRecord, NotReady, PipelineError, RecordsLost, StoreCorrupt, Unavailable, Unreadable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, LogReader, Store, Stores
from pipeline.threads import POLL_INTERVAL_S, PeriodicThread
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import FETCH_BYTES_MAX, StoreMeta, read_meta, write_entries
from pipeline.worker.restore import DamageHistory, StoreOpener

_log = logging.getLogger(__name__)
_REPORT_INTERVAL_S = 0.5
"""Seconds between two reports of progress to the group; there is another one when a partition is dropped."""
_RECORDS_MAX = 1_000
"""Upper limit of the records that are read, and of the changes that wait, at once."""


class Change(NamedTuple):
    """A new answer of one series of a view, in the part of the series that one partition holds."""

    labels: Mapping[str, str]
    old: Any
    """Answer before; None if there was none."""
    new: Any
    """Answer now; None if the series is gone."""
    window_start: int | None
    """Start of the window in ms since 1970, if the view has windows."""
    partition: int
    offset: int
    """Offset in the changelog; with the partition it identifies the change."""


class Progresses(Protocol):
    """Place that keeps how far a feed got in each partition, for the next owner of the partition."""

    def read(self) -> Mapping[int, int]:
        """Return, by partition, the offset behind the last delivered change. Raises `Unavailable`."""
        ...

    def write(self, next_offsets: Mapping[int, int]) -> None:
        """Keep offsets of some partitions. Raises `Unavailable`."""
        ...


class _Followed:
    """A partition that a feed follows. Owned by the feed's thread."""

    def __init__(self, number: int, store: Store, topic_id: str, progress: int) -> None:
        self.number = number
        self.store = store
        self.topic_id = topic_id
        self.next_offset = read_meta(store).changelog_next_offset
        self.silent_until = progress
        self.reported_offset = progress

    def write(self, entries: Mapping[bytes, bytes | None], next_offset: int) -> None:
        self.next_offset = next_offset
        meta = StoreMeta(changelog_next_offset=next_offset, topic_id=self.topic_id)
        write_entries(self.store, [*entries], [*entries.values()], meta)


class ChangeFeed:
    """Hands the changes of `view` to `deliver`, partition by partition in the order of the changelog, each at least once.

    `deliver(changes, stopping)` returns how many changes, from the first, were taken in; fewer than all only once `stopping`
    returns True. `definitions_of(partition)` returns the view's definitions in that partition's store, or raises `NotReady`
    if the store is closed. `on_fatal` is called once, from the feed's thread, if the feed can't go on.
    """

    def __init__(
        self,
        view: str,
        *,
        log: Log,
        stores: Stores,
        clock: Clock,
        progresses: Progresses,
        definitions_of: Callable[[int], Iterable[DefinitionEntry]],
        deliver: Callable[[Sequence[Change], Callable[[], bool]], int],
        on_fatal: Callable[[BaseException], None],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._thread = PeriodicThread(
            f"pipeline-changes-{view}",
            self.step,
            log=_log,
            clock=clock,
            metrics=metrics,
            outage_message=f"changes of view {view} wait",
            on_unavailable=self._on_unavailable,
            on_fatal=on_fatal,
            fatal_message=f"changes of view {view} end",
            on_end=self.close,
        )
        self._stop = self._thread.stopping
        self.view = view
        self._log = log
        self._opener = StoreOpener(stores, metrics=metrics, what=f"changes of view {view}, ")
        self._clock = clock
        self._progresses = progresses
        self._definitions_of = definitions_of
        self._deliver = deliver
        self._metrics = metrics
        self._prefix, self._definitions_prefix = view_prefix(view), definitions_prefix(view)
        self._changed = threading.Condition()
        self._wanted: frozenset[int] = frozenset()
        self._followed: dict[int, _Followed] = {}
        self._definitions: dict[int, dict[bytes, DefinitionEntry]] = {}
        """Definition entries by partition and key."""
        self._damages = DamageHistory()
        self._reader: LogReader | None = None
        self._assigned = False
        self._next_report_s = 0.0

    # From any thread

    def follow(self, partitions: frozenset[int]) -> None:
        """Follow these partitions from now on, and no others. Does not block."""
        with self._changed:
            self._wanted = partitions

    def release(self, timeout_s: float) -> bool:
        """Follow nothing until the next `follow`; return whether the group got to know in time how far this feed came."""
        self.follow(frozenset())
        with self._changed:
            return self._changed.wait_for(lambda: not self._followed or not self._thread.alive, timeout_s)

    def start(self) -> None:
        """Begin in a thread of its own."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End; return whether the thread has ended in time. Twice is fine."""
        return self._thread.stop(timeout_s)

    # The thread

    def _on_unavailable(self, error: Unavailable) -> None:
        self._assigned = False  # what was read and not delivered is read again
        self._thread.outage.wait(error)

    def close(self) -> None:
        """Close all stores and the reader."""
        for number in [*self._followed]:
            self._drop(number)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def step(self) -> None:
        """Open and drop partitions as `follow` asked, read, deliver."""
        for number in [*self._followed]:
            if number not in self._wanted:
                self._drop(number)
        self._open_new()
        if not self._followed:
            self._stop.wait(POLL_INTERVAL_S / 2)
            return
        reader = self._reader = self._reader or self._log.reader(CHANGELOG)
        if not self._assigned:
            reader.assign({number: it.next_offset for number, it in self._followed.items()})
            self._assigned = True
        try:
            fetched = reader.poll(record_count_max=_RECORDS_MAX, bytes_max=FETCH_BYTES_MAX, timeout_s=POLL_INTERVAL_S)
        except RecordsLost as error:
            _log.warning("changes of view %s: %s", self.view, error)
            self._skip_gone()
            return
        for records in fetched:
            it = self._followed.get(records.partition)
            try:
                if it is None or self._take_in(it, records):
                    continue
            except StoreCorrupt as error:
                self._rebuild(records.partition, error)
            self._assigned = False
            break
        if self._clock.monotonic_s() >= self._next_report_s:
            for it in [*self._followed.values()]:
                try:
                    self._report_progress([it])
                except StoreCorrupt as error:
                    self._rebuild(it.number, error)

    def _open_new(self) -> None:
        new = self._wanted - self._followed.keys()
        if not new:
            return
        progress, topic_id = self._progresses.read(), self._log.topic_id(CHANGELOG)
        for number in sorted(new):
            followed = self._opener.open(number, partial(self._load, number, topic_id, progress.get(number, 0)))
            with self._changed:
                self._followed[number] = followed
            self._assigned = False

    def _load(self, number: int, topic_id: str, progress: int, store: Store) -> _Followed:
        meta = read_meta(store)
        end = self._log.watermarks(CHANGELOG, number).end_offset
        if meta.changelog_next_offset > end or (meta.changelog_next_offset and meta.topic_id != topic_id):
            raise StoreCorrupt(f"it reflects another changelog, up to {meta.changelog_next_offset}; this ends at {end}")
        return _Followed(number, store, topic_id, min(progress, end))

    def _rebuild(self, number: int, error: StoreCorrupt) -> None:
        """Delete a store that can't be trusted. Raises `LogCorrupt` if that has not helped before."""
        self._damages.note(number, error)
        self._close(number)
        self._opener.destroy(number, str(error))

    def _skip_gone(self) -> None:
        """Read on from the start of the log where it no longer has what is read next."""
        starts = self._log.start_offsets(CHANGELOG)
        for number, it in self._followed.items():
            it.next_offset = max(it.next_offset, starts.get(number, 0))
        self._assigned = False

    def _drop(self, number: int) -> None:
        it = self._followed[number]
        try:
            self._report_progress([it])
        except (Unavailable, StoreCorrupt) as error:  # a damaged store is rebuilt when it is opened or read next
            _log.warning("changes of view %s in partition %d: some come twice: %s", self.view, number, error)
        finally:
            self._close(number)

    def _close(self, number: int) -> None:
        try:
            self._followed[number].store.close()
        except PipelineError as error:  # the next `open` finds out what is left of it
            _log.warning("changes of view %s in partition %d: closing the store: %s", self.view, number, error)
        with self._changed:
            del self._followed[number]
            self._changed.notify_all()
        self._assigned = False

    def _report_progress(self, some: Sequence[_Followed]) -> None:
        self._next_report_s = self._clock.monotonic_s() + _REPORT_INTERVAL_S
        news = {it.number: it.next_offset for it in some if it.next_offset > it.reported_offset}
        if news:
            for it in some:
                it.write({}, it.next_offset)
            self._progresses.write(news)
            for it in some:
                it.reported_offset = max(it.reported_offset, it.next_offset)

    # One partition

    def _take_in(self, it: _Followed, records: Records) -> bool:
        """Deliver the changes in records; return whether all were taken in. If not, the rest must be read again."""
        entries = [
            (offset, key, value)
            for offset, key, value in zip(records.offsets, records.keys, records.values, strict=True)
            if key is not None and offset >= it.next_offset and key.startswith((self._prefix, self._definitions_prefix))
        ]
        silent = {key: value for offset, key, value in entries if offset < it.silent_until}
        loud = [entry for entry in entries if entry[0] >= it.silent_until]
        if silent:
            it.write(silent, min(it.silent_until, records.next_offset))
        changes = self._changes(it, loud)
        count = self._deliver(changes, lambda: self._stop.is_set() or it.number not in self._wanted) if changes else 0
        self._metrics.inc(m.CHANGES, count, self.view, it.number)
        if count == len(changes):
            if loud:
                it.write({key: value for _, key, value in loud}, records.next_offset)
            it.next_offset = max(it.next_offset, records.next_offset)
            return True
        done = changes[count].offset
        it.write({key: value for offset, key, value in loud if offset < done}, done)
        return False

    def _changes(self, it: _Followed, entries: Sequence[tuple[int, bytes, bytes | None]]) -> list[Change]:
        keys = list(dict.fromkeys(key for _, key, _ in entries if key.startswith(self._prefix)))
        states = dict(zip(keys, it.store.get(keys), strict=True)) if keys else {}
        found = []
        for offset, key, value in entries:
            if not key.startswith(self._prefix):
                self._take_definition(it.number, key, value)
                continue
            definition = self._definition(it.number, key)
            if definition is None:
                continue
            old, new = self._answer(definition, states[key]), self._answer(definition, value)
            known, states[key] = states[key], value
            if old != new or type(old) is not type(new) or known is None or value is None:
                _, _, suffix = split_key(key)
                window_start, labels = parse_suffix(suffix)
                named = dict(zip(definition.labels, labels, strict=True))
                found.append(Change(named, old, new, window_start if definition.window_s else None, it.number, offset))
        return found

    def _take_definition(self, number: int, key: bytes, value: bytes | None) -> None:
        known = self._definitions.setdefault(number, {})
        if value is None:
            known.pop(key, None)
        else:
            known[key] = decode_definition(value)

    def _definition(self, number: int, key: bytes) -> Definition | None:
        """Return the definition of a series; None if it was dropped, or its kind or window is not the one that answers.

        A definition stands before its series in the changelog, so it was read with them. If that was before a restart, the
        feed's own store has the definition, even if it was dropped since. If compaction has left only a later entry of the
        definition, the partition's store has it. Raises `Unavailable` while that store is not restored.
        """
        its_key = TAG_DEFINITION + key[1 : len(self._definitions_prefix) + 8]
        known = self._definitions.setdefault(number, {})
        if its_key not in known:
            prefix = self._definitions_prefix
            for stored_key, value in self._followed[number].store.scan(prefix, prefix_end(prefix)):
                known.setdefault(stored_key, decode_definition(value))
        if its_key not in known:
            try:
                entries = self._definitions_of(number)
            except NotReady as error:
                raise Unavailable(f"changes of view {self.view}: {error}") from None
            for entry in entries:
                known.setdefault(definition_key(entry.definition), entry)
        entry_found = known.get(its_key)
        if entry_found is None or entry_found.definition not in merged(self.view, known.values()).parts:
            return None
        return entry_found.definition

    def _answer(self, definition: Definition, value: bytes | None) -> Any:
        if value is None:
            return None
        kind = KINDS[definition.kind]
        try:
            (state,) = decode_states(kind, [value])
        except BadRecord as error:
            raise Unreadable(f"view {self.view}: {error}") from None
        return kind.answer(state)
