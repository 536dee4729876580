"""What changes in a view, read from the changelog: for each entry of a series, its answer before and after.

A feed follows the partitions that are its worker's, each with a small store of its own: the entries of its view, as far as
their changes have been taken in. What is taken in is written with the offset behind it, in one write; so after a crash the
feed goes on just there. Where a partition has no such store, because another worker had it, the group offset tells how far
that one got: entries up to there go into the store, and are nobody's changes any more.
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
_TELL_S = 0.5
"""How often progress is told to the group; it is also when a partition is let go of."""
_RECORDS_MAX = 1_000
"""Records that are read, and changes that wait, at once."""


class Change(NamedTuple):
    """One series of a view has another answer, in the part of it that one partition holds."""

    labels: Mapping[str, str]
    old: Any
    """The answer before; None if there was none."""
    new: Any
    """The answer now; None if the series is gone."""
    window_start: int | None
    """In ms since 1970, if the view has windows."""
    partition: int
    offset: int
    """Of the changelog: with the partition, the change's identity."""


class Progresses(Protocol):
    """Where it is kept how far a feed got in each partition, for whoever has it next."""

    def read(self) -> Mapping[int, int]:
        """The offset behind what was taken in last, by partition. Raises `Unavailable`."""
        ...

    def write(self, next_offsets: Mapping[int, int]) -> None:
        """Of some partitions. Raises `Unavailable`."""
        ...


class _Followed:
    """One partition. Owned by the feed's thread."""

    def __init__(self, number: int, store: Store, topic_id: str, progress: int) -> None:
        self.number = number
        self.store = store
        self.topic_id = topic_id
        self.next_offset = read_meta(store).changelog_next_offset
        self.silent_until = progress
        self.told_offset = progress

    def write(self, entries: Mapping[bytes, bytes | None], next_offset: int) -> None:
        self.next_offset = next_offset
        meta = StoreMeta(changelog_next_offset=next_offset, topic_id=self.topic_id)
        write_entries(self.store, [*entries], [*entries.values()], meta)


class ChangeFeed:
    """Hands the changes of `view` to `deliver`, partition by partition in the order of the changelog, each at least once.

    `deliver(changes, stopping)` returns how many of them, from the first, were taken in; fewer than all only once `stopping`
    says so. `definitions_of(partition)` are the view's definitions as that partition's state has them, or raises
    `NotReady` if that is closed. `on_fatal` is called once, from the feed's thread, if it can't go on.
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
        """Of each partition, by key."""
        self._damages = DamageHistory()
        self._reader: LogReader | None = None
        self._assigned = False
        self._tell_s = 0.0

    # From any thread

    def follow(self, partitions: frozenset[int]) -> None:
        """These from now on, and no others. Does not block."""
        with self._changed:
            self._wanted = partitions

    def let_go(self, timeout_s: float) -> bool:
        """Follow nothing until told otherwise; whether the group knew in time how far all was taken in."""
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
        self._assigned = False  # what was read and not taken in is read again
        self._thread.outage.wait(error)

    def close(self) -> None:
        """Let go of everything."""
        for number in [*self._followed]:
            self._drop(number)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def step(self) -> None:
        """Open and drop what there is to, read, hand over."""
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
            self._begin_anew()
            return
        for records in fetched:
            it = self._followed.get(records.partition)
            try:
                if it is None or self._take_in(it, records):
                    continue
            except StoreCorrupt as error:
                self._make_anew(records.partition, error)
            self._assigned = False
            break
        if self._clock.monotonic_s() >= self._tell_s:
            for it in [*self._followed.values()]:
                try:
                    self._tell([it])
                except StoreCorrupt as error:
                    self._make_anew(it.number, error)

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

    def _make_anew(self, number: int, error: StoreCorrupt) -> None:
        """Delete a store that can't be trusted. `LogCorrupt` if that has not helped before."""
        self._damages.note(number, error)
        self._let_go_of(number)
        self._opener.destroy(number, str(error))

    def _begin_anew(self) -> None:
        """The log no longer has what some partition would read next."""
        starts = self._log.start_offsets(CHANGELOG)
        for number, it in self._followed.items():
            it.next_offset = max(it.next_offset, starts.get(number, 0))
        self._assigned = False

    def _drop(self, number: int) -> None:
        it = self._followed[number]
        try:
            self._tell([it])
        except (Unavailable, StoreCorrupt) as error:  # a store that is damaged is made anew when it is opened or read next
            _log.warning("changes of view %s in partition %d: some come twice: %s", self.view, number, error)
        finally:
            self._let_go_of(number)

    def _let_go_of(self, number: int) -> None:
        try:
            self._followed[number].store.close()
        except PipelineError as error:  # what is left of it shows when it is opened next
            _log.warning("changes of view %s in partition %d: closing the store: %s", self.view, number, error)
        with self._changed:
            del self._followed[number]
            self._changed.notify_all()
        self._assigned = False

    def _tell(self, some: Sequence[_Followed]) -> None:
        self._tell_s = self._clock.monotonic_s() + _TELL_S
        news = {it.number: it.next_offset for it in some if it.next_offset > it.told_offset}
        if news:
            for it in some:
                it.write({}, it.next_offset)
            self._progresses.write(news)
            for it in some:
                it.told_offset = max(it.told_offset, it.next_offset)

    # One partition

    def _take_in(self, it: _Followed, records: Records) -> bool:
        """Whether all of it was taken in; else what was is in the store, and the rest is to be read again."""
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
        """The definition of a series; None if it was dropped, or is of a kind or window that does not answer for the view.

        A definition stands before its series in the changelog, so it was read with them. Of what was read before a restart
        the feed's own store has it, also if it was dropped since. Where compaction has left only a later entry of it, the
        partition's store has it. `Unavailable` while that is not restored.
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
