"""A task: the protocol of one partition, as a state machine without side effects.

The shell reads records, asks the task what they mean, and carries out what it answers, in this order (DESIGN section 5):

    restored(...)            the store is at a commit boundary: here are its position, definitions and producers
    fold(records)            into the overlay; allowed at any time from then on, also while a commit is under way
    freeze() -> keys         swap the overlay; the shell looks these keys up in the store
    prepare_commit(values)   -> Commit: entries, dead letters, and the position last
                             the shell commits the Commit in one transaction, then writes it to the store in one batch
    committed()              only now may the next freeze come

A crash at any point, or a failed commit, is handled by throwing the task away: the next one folds the same records again
and arrives at the same states, because nothing but the committed entries survives.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from itertools import chain, islice
from typing import NamedTuple

import msgspec

from pipeline.core import codec
from pipeline.core.merge import KINDS, State
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    RUN_ENTRIES_MAX,
    Batch,
    Definition,
    Group,
    Position,
    Records,
    check_suffixes,
    definition_key,
    producer_key,
    runs,
    series_prefix,
)
from pipeline.core.sequence import Folded
from pipeline.core.view import describe
from pipeline.errors import BadRecord, IllegalTransition, StoreCorrupt


class Phase(Enum):
    """Where a task is."""

    ASSIGNED = "assigned"
    FOLDING = "folding"
    FROZEN = "frozen"
    COMMITTING = "committing"


class Step(Enum):
    """What can happen to it."""

    RESTORED = "restored"
    FOLD = "fold"
    FREEZE = "freeze"
    PREPARE = "prepare_commit"
    COMMITTED = "committed"


TRANSITIONS: Mapping[tuple[Phase, Step], Phase] = {
    (Phase.ASSIGNED, Step.RESTORED): Phase.FOLDING,
    (Phase.FOLDING, Step.FOLD): Phase.FOLDING,
    (Phase.FOLDING, Step.FREEZE): Phase.FROZEN,
    (Phase.FROZEN, Step.FOLD): Phase.FROZEN,
    (Phase.FROZEN, Step.PREPARE): Phase.COMMITTING,
    (Phase.COMMITTING, Step.FOLD): Phase.COMMITTING,
    (Phase.COMMITTING, Step.COMMITTED): Phase.FOLDING,
}
"""Every legal step; any other raises `IllegalTransition`."""


class TaskLimits(msgspec.Struct, frozen=True):
    """Bounds on what a task holds in memory, each with its behaviour at the bound."""

    overlay_entries_max: int = 50_000
    """`Task.full` turns true: the shell commits before it folds on. One batch can go beyond it."""
    overlay_bytes_max: int = 32 * 2**20
    """The same, counted in bytes of the records that were folded into it."""
    cache_entries_max: int = 100_000
    """Committed states that are kept; the least recently committed half makes room."""
    cache_bytes_max: int = 64 * 2**20
    """The same, counted in bytes of their suffixes and encodings. One commit can go beyond either."""
    producer_ttl_ms: int = 7 * 86_400_000
    """A producer that was silent for so long is forgotten; a batch that it sends again later would count again."""
    producers_max: int = 100_000
    """Producers that are remembered; at the limit the longest silent is forgotten early, and counted."""
    views_max: int = 10_000
    """Views of a partition; a batch that would define another is a bad record."""


class Counts(msgspec.Struct):
    """What a task has seen since it was made. Counters only."""

    batches_folded: int = 0
    entries_folded: int = 0
    batches_duplicate: int = 0
    batches_stale: int = 0
    """Refused because their producer has been opened by a newer process."""
    records_bad: int = 0
    """Dead-lettered, stale batches included."""
    producers_evicted: int = 0


class Commit(msgspec.Struct, frozen=True):
    """What must become durable, all of it or none. `keys[-1]` is the position record."""

    keys: list[bytes]
    values: list[bytes | None]
    dead_letters: list[tuple[bytes, bytes]]
    position: Position
    series_count: int
    """Series entries among the keys."""


class DeadLetter(msgspec.Struct, frozen=True):
    """What is kept of a bad record. Its bytes are those of the record, whole."""

    partition: int
    offset: int
    at_ms: int
    reason: str
    value: bytes | None


class _Overlay:
    """Folded, not yet committed."""

    def __init__(self) -> None:
        self.states: dict[str, dict[bytes, State]] = {}
        self.producers: dict[str, Folded | None] = {}
        self.definitions: set[str] = set()
        self.dead_letters: list[DeadLetter] = []
        self.bytes_total = 0
        self.next_offset = 0
        self.source_at_ms = 0

    def entry_count(self) -> int:
        return sum(map(len, self.states.values())) + len(self.producers) + len(self.dead_letters)


class _Cache:
    """Committed states in two generations: when the young one reaches half a limit, it becomes the old one."""

    def __init__(self, entries_max: int, bytes_max: int) -> None:
        self._entries_half = entries_max // 2
        self._bytes_half = bytes_max // 2
        self._young: dict[str, dict[bytes, State]] = {}
        self._old: dict[str, dict[bytes, State]] = {}
        self._young_count = 0
        self._young_bytes = 0

    def of(self, view: str) -> tuple[Mapping[bytes, State], Mapping[bytes, State]]:
        """The view's states, young ones first; a suffix can be in both, and then the young one counts."""
        return self._young.get(view, {}), self._old.get(view, {})

    def states(self, view: str, suffixes: list[bytes]) -> list[State | None]:
        """One for each suffix, None where it is not cached."""
        young, old = self.of(view)
        states = [*map(young.get, suffixes)]
        missing = states.count(None) if old else 0
        if missing == len(states):
            return [*map(old.get, suffixes)]
        return (
            [old.get(s) if state is None else state for s, state in zip(suffixes, states, strict=True)]
            if missing
            else states
        )

    def update(self, view: str, suffixes: list[bytes], states: list[State], bytes_total: int) -> None:
        young = self._young.setdefault(view, {})
        self._young_count -= len(young)
        young.update(zip(suffixes, states, strict=True))
        self._young_count += len(young)
        self._young_bytes += bytes_total  # an updated state counts again: the bound holds, a little early
        if self._young_count > self._entries_half or self._young_bytes > self._bytes_half:
            self._old, self._young = self._young, {}
            self._young_count = self._young_bytes = 0


class _Change(NamedTuple):
    """A run of what a commit changes of one view, by column, in the order of keys: so lookup and write are cheap."""

    view: str
    suffixes: list[bytes]
    keys: list[bytes]
    cached: list[State | None]
    """The committed states, as far as the cache knows them."""


class _Merged(NamedTuple):
    """The new absolute states of such a run."""

    view: str
    suffixes: list[bytes]
    states: list[State]
    bytes_total: int


class Task:
    """The state machine of one partition. Owned by one thread; see the module's text for the protocol."""

    def __init__(self, partition: int, limits: TaskLimits, source_id: str = "") -> None:
        self.partition = partition
        self._source_id = source_id
        self.phase = Phase.ASSIGNED
        self.counts = Counts()
        self.next_offset = 0
        """Where folding goes on in the deltas topic."""
        self.position = NO_POSITION
        """What the last commit made durable."""
        self._skipped = False
        self._limits = limits
        self._definitions: dict[str, Definition] = {}
        self._series_counts: dict[str, int] = {}
        self._producers: dict[str, Folded] = {}
        self._overlay = _Overlay()
        self._frozen = _Overlay()
        self._changes: list[_Change] = []
        self._merged: list[_Merged] = []
        self._counted: dict[str, int] = {}
        self._pending = NO_POSITION
        self._cache = _Cache(limits.cache_entries_max, limits.cache_bytes_max)

    def _step(self, step: Step) -> None:
        try:
            self.phase = TRANSITIONS[self.phase, step]
        except KeyError:
            raise IllegalTransition(f"partition {self.partition}: {step.value} while {self.phase.value}") from None

    @property
    def full(self) -> bool:
        """Whether the overlay has reached its limit: commit before folding more."""
        overlay, limits = self._overlay, self._limits
        return overlay.bytes_total >= limits.overlay_bytes_max or overlay.entry_count() >= limits.overlay_entries_max

    @property
    def dirty(self) -> bool:
        """Whether anything was folded, or skipped, that the next commit must record."""
        frozen = self.phase in (Phase.FROZEN, Phase.COMMITTING)
        return self._skipped or self.next_offset != (self._frozen.next_offset if frozen else self.position.next_offset)

    def restored(self, position: Position, views: Iterable[bytes], producers: Iterable[tuple[str, bytes]]) -> None:
        """Start from committed entries: the position, the values of definition entries, `(producer id, value)` pairs."""
        self._step(Step.RESTORED)
        try:
            for value in views:
                entry = codec.decode_view(value)
                self._definitions[entry.definition.view] = entry.definition
                self._series_counts[entry.definition.view] = entry.series_count
            known = [(producer_id, codec.decode_folded(value)) for producer_id, value in producers]
        except BadRecord as error:
            raise StoreCorrupt(f"partition {self.partition}: {error}") from None
        self._producers = dict(sorted(known, key=lambda item: item[1].seen_at_ms))
        self.position = position
        self.next_offset = self._overlay.next_offset = position.next_offset
        self._overlay.source_at_ms = position.source_at_ms

    def skip_to(self, next_offset: int) -> None:
        """Go on elsewhere in the log, because what lay between is lost. The next commit records it."""
        self.next_offset = self._overlay.next_offset = next_offset
        self._skipped = True  # in a topic made anew, folding can come to the very offset of the position

    # Folding

    def fold(self, records: Records) -> None:
        """Merge records into the overlay. Records below `next_offset` were folded before and are skipped.

        A bad record becomes a dead letter and changes nothing else; it never stops the partition.
        """
        self._step(Step.FOLD)
        overlay = self._overlay
        for offset, at_ms, value in zip(records.offsets, records.at_ms, records.values, strict=True):
            if offset < self.next_offset:
                continue
            try:
                self._fold_batch(codec.decode_batch(value or b""), at_ms)
            except BadRecord as error:
                self.counts.records_bad += 1
                overlay.dead_letters.append(DeadLetter(self.partition, offset, at_ms, str(error), value))
            self.next_offset = offset + 1
            overlay.source_at_ms = at_ms
            overlay.bytes_total += len(value or b"")
        self.next_offset = overlay.next_offset = max(self.next_offset, records.next_offset)

    def _fold_batch(self, batch: Batch, at_ms: int) -> None:
        if batch.partition != self.partition:
            raise BadRecord(f"batch for partition {batch.partition} in partition {self.partition}")
        producer = self._producers.get(batch.producer_id, _NEW_PRODUCER)
        if batch.epoch < producer.epoch:
            self.counts.batches_stale += 1
            raise BadRecord(f"stale epoch {batch.epoch} of producer {batch.producer_id}; epoch {producer.epoch} was seen")
        if producer.has(batch.sequence):
            self.counts.batches_duplicate += 1
            if batch.epoch > producer.epoch:
                self._remember(batch.producer_id, msgspec.structs.replace(producer, epoch=batch.epoch))
            return
        producer = producer.with_folded(batch.sequence, batch.floor, batch.epoch, at_ms)
        groups = [*chain.from_iterable(map(_parts, batch.groups))]
        self._check_groups(groups)
        for group in groups:
            self._merge_group(group)
        self._remember(batch.producer_id, producer)
        self.counts.batches_folded += 1

    def _remember(self, producer_id: str, producer: Folded) -> None:
        self._producers.pop(producer_id, None)  # so that the dict stays in the order of silence
        self._producers[producer_id] = self._overlay.producers[producer_id] = producer

    def _check_groups(self, groups: Sequence[Group]) -> None:
        """All or nothing: raise before anything is merged."""
        new: dict[str, Definition] = {}
        for group in groups:
            definition = group.definition
            known = self._definitions.get(definition.view) or new.setdefault(definition.view, definition)
            if known != definition:
                raise BadRecord(f"view {definition.view} is {describe(known)}; the batch says {describe(definition)}")
            unknown = set(group.suffixes)
            for states in (self._overlay.states.get(definition.view, {}), *self._cache.of(definition.view)):
                unknown = unknown.difference(states)
            check_suffixes(definition, [*unknown])
        if new and len(self._definitions) + len(new) > self._limits.views_max:
            raise BadRecord(f"over {self._limits.views_max} views")
        self._definitions.update(new)
        self._overlay.definitions.update(new)

    def _merge_group(self, group: Group) -> None:
        states = self._overlay.states.setdefault(group.definition.view, {})
        self.counts.entries_folded += len(group.suffixes)
        new = dict(zip(group.suffixes, group.states, strict=True))
        if len(new) == len(group.suffixes) and states.keys().isdisjoint(new):
            states.update(new)
            return
        merge = KINDS[group.definition.kind].merge
        get = states.get
        for suffix, state in zip(group.suffixes, group.states, strict=True):
            old = get(suffix)
            states[suffix] = state if old is None else merge(old, state)

    # Committing

    def freeze(self) -> list[bytes]:
        """Swap the overlay for an empty one, and return the keys that `prepare_commit` needs the committed values of."""
        self._step(Step.FREEZE)
        self._skipped = False
        self._forget_producers()
        self._frozen, self._overlay = self._overlay, _Overlay()
        self._overlay.next_offset = self._frozen.next_offset
        self._overlay.source_at_ms = self._frozen.source_at_ms
        self._changes = []
        keys: list[bytes] = []
        for view, states in sorted(self._frozen.states.items()):
            prefix = series_prefix(view)
            for suffixes in _in_order(states):
                cached = self._cache.states(view, suffixes)
                change = _Change(view, suffixes, [prefix + suffix for suffix in suffixes], cached)
                self._changes.append(change)
                if cached.count(None) == len(cached):
                    keys += change.keys
                else:
                    keys += [key for key, state in zip(change.keys, cached, strict=True) if state is None]
        return keys

    def _forget_producers(self) -> None:
        overlay, limits = self._overlay, self._limits
        forgotten: list[str] = []
        for producer_id, producer in self._producers.items():
            expired = producer.seen_at_ms + limits.producer_ttl_ms < overlay.source_at_ms
            if not expired and len(self._producers) - len(forgotten) <= limits.producers_max:
                break
            self.counts.producers_evicted += not expired
            forgotten.append(producer_id)
        for producer_id in forgotten:
            del self._producers[producer_id]
            overlay.producers[producer_id] = None

    def prepare_commit(self, values: Sequence[bytes | None], *, now_ms: int) -> Commit:
        """What to make durable, given the committed values of the keys that `freeze` returned, in their order."""
        self._step(Step.PREPARE)
        frozen = self._frozen
        self._merged, self._counted = [], {}
        keys: list[bytes] = []
        out: list[bytes | None] = []
        start = 0
        for change in self._changes:
            view, suffixes = change.view, change.suffixes
            end = start + change.cached.count(None)
            states = self._merge_committed(change, values[start:end])
            start = end
            keys += change.keys
            encoded = codec.encode_states(KINDS[self._definitions[view].kind], states)
            out += encoded
            self._merged.append(_Merged(view, suffixes, states, sum(map(len, encoded)) + sum(map(len, suffixes))))
        if start != len(values):
            raise ValueError(f"{len(values)} values for {start} keys")
        series_count = len(keys)
        for view in sorted(frozen.definitions | self._counted.keys()):
            count = self._series_counts.get(view, 0) + self._counted.get(view, 0)
            keys.append(definition_key(view))
            out.append(codec.encode_view(codec.ViewEntry(self._definitions[view], count)))
        for producer_id, producer in frozen.producers.items():
            keys.append(producer_key(producer_id))
            out.append(None if producer is None else codec.encode_folded(producer))
        self._pending = Position(frozen.next_offset, now_ms, frozen.source_at_ms, self._source_id)
        keys.append(POSITION_KEY)
        out.append(codec.encode_position(self._pending))
        dead = [
            (b"%d-%d" % (letter.partition, letter.offset), msgspec.msgpack.encode(letter)) for letter in frozen.dead_letters
        ]
        return Commit(keys, out, dead, self._pending, series_count)

    def _merge_committed(self, change: _Change, found: Sequence[bytes | None]) -> list[State]:
        """The new absolute states of a run's series; `found` are the stored values of those not in the cache."""
        view, committed = change.view, change.cached
        kind = KINDS[self._definitions[view].kind]
        states = [*map(self._frozen.states[view].__getitem__, change.suffixes)]
        stored = [value for value in found if value is not None]
        if len(stored) < len(found):
            self._counted[view] = self._counted.get(view, 0) + len(found) - len(stored)
        try:
            known = iter(codec.decode_states(kind, stored))
        except BadRecord as error:
            raise StoreCorrupt(f"partition {self.partition}, view {view}: {error}") from None
        if stored:
            looked_up = iter([None if value is None else next(known) for value in found])
            committed = [next(looked_up) if state is None else state for state in committed]
        elif len(found) == len(states):
            return states  # all of them are new
        merge = kind.merge
        return [new if old is None else merge(old, new) for old, new in zip(committed, states, strict=True)]

    def committed(self) -> None:
        """The Commit is durable in the log and in the store."""
        self._step(Step.COMMITTED)
        for merged in self._merged:
            self._cache.update(*merged)
        for view, count in self._counted.items():
            self._series_counts[view] = self._series_counts.get(view, 0) + count
        self.position = self._pending
        self._frozen, self._merged, self._counted, self._changes = _Overlay(), [], {}, []


def _in_order(suffixes: Collection[bytes]) -> Iterable[list[bytes]]:
    """The suffixes in order, in runs. The order is that of all, not of each run: the store writes them all at once, and
    five times as fast if each is behind the one before."""
    if len(suffixes) <= RUN_ENTRIES_MAX:
        return (sorted(suffixes),)
    sample = sorted(islice(suffixes, 0, None, _SAMPLED))
    bounds = sample[:: RUN_ENTRIES_MAX // 2 // _SAMPLED][1:]  # half a run, so that one that is twice as large is one still
    found: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    for suffix in suffixes:
        found[bisect(bounds, suffix)].append(suffix)
    return map(sorted, found)


def _parts(group: Group) -> Iterable[Group]:
    if len(group.suffixes) <= RUN_ENTRIES_MAX:
        return (group,)
    columns = zip(runs(group.suffixes), runs(group.states), strict=True)
    return [Group(group.definition, suffixes, states) for suffixes, states in columns]


_NEW_PRODUCER = Folded()
_SAMPLED = 100
"""Of how many suffixes one is looked at to find out how all of them are spread."""
