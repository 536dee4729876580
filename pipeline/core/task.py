"""A task: the protocol of one partition, as a state machine without side effects.

The shell reads records, asks the task what they mean, and carries out what it answers, in this order (DESIGN section 5):

    restored(...)                   start from the position and definitions of a store that is at a commit boundary
    read(records) -> Reading        decode; the shell looks up `Reading.producer_keys` in the store
    fold(reading, values)           into the overlay; allowed at any time from then on, also while a commit is under way
    sweep(entries)                  forget those of some producers of the store that were silent for long
    freeze() -> Lookup              swap the overlay; the shell looks up `Lookup.keys`, which keys `Lookup.prefixes`
                                    have, and which entries there are in `Lookup.sweeps`
    prepare_commit(values, existing, swept) -> Commit: entries, dead letters, and the position last
                                    the shell commits the Commit in one transaction, then writes it to the store in one batch
    committed()                     only now may the next freeze come

A crash at any point, or a failed commit, is handled by throwing the task away: the next one folds the same records again
and arrives at the same states, because nothing but the committed entries survives.

A group of a batch is the unit of refusal: what is wrong with one view touches no other. What was refused becomes a dead
letter in the same commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import msgspec

from pipeline.core import codec
from pipeline.core.changes import Cache, Changes
from pipeline.core.codec import DeadLetter, DefinitionEntry, Received, RefusedGroup
from pipeline.core.commit import Commit, Counts, Lookup, Reading
from pipeline.core.expiry import Entry, Expiry, late_reason, split_late
from pipeline.core.groups import check_rows
from pipeline.core.letters import group_key, is_last_key, is_letter_producer, letter_key, refused_key
from pipeline.core.limits import TaskLimits
from pipeline.core.overlay import Definitions, Known, Overlay, Producers, gone_keys
from pipeline.core.parts import with_group, with_rows
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    TAG_DEFINITION,
    Batch,
    Control,
    Group,
    Position,
    Records,
    expires_silent,
    fingerprint,
    producer_key,
    series_prefix,
)
from pipeline.core.sequence import EPOCH_STEP_MAX, Folded
from pipeline.core.transitions import next_state
from pipeline.errors import BadRecord, StoreCorrupt


class Phase(Enum):
    """State of a task."""

    ASSIGNED = "assigned"
    FOLDING = "folding"
    FROZEN = "frozen"
    COMMITTING = "committing"


class TaskEvent(Enum):
    """Event that changes the state of a task."""

    RESTORED = "restored"
    FOLD = "fold"
    FREEZE = "freeze"
    PREPARE = "prepare_commit"
    COMMITTED = "committed"


TRANSITIONS: Mapping[tuple[Phase, TaskEvent], Phase] = {
    (Phase.ASSIGNED, TaskEvent.RESTORED): Phase.FOLDING,
    (Phase.FOLDING, TaskEvent.FOLD): Phase.FOLDING,
    (Phase.FOLDING, TaskEvent.FREEZE): Phase.FROZEN,
    (Phase.FROZEN, TaskEvent.FOLD): Phase.FROZEN,
    (Phase.FROZEN, TaskEvent.PREPARE): Phase.COMMITTING,
    (Phase.COMMITTING, TaskEvent.FOLD): Phase.COMMITTING,
    (Phase.COMMITTING, TaskEvent.COMMITTED): Phase.FOLDING,
}
"""Every legal event; any other raises `IllegalTransition`."""


class Task:
    """The state machine of one partition. Owned by one thread; see the module's text for the protocol."""

    def __init__(self, partition: int, limits: TaskLimits, source_id: str = "", native: Any = None) -> None:
        """`native` is the extension module, which then holds what is done per entry; see `pipeline.native`."""
        self.partition = partition
        self._native = native
        self._source_id = source_id
        self.phase = Phase.ASSIGNED
        self.counts = Counts()
        self.next_offset = 0
        """Offset in the deltas topic at which folding goes on."""
        self.position = NO_POSITION
        """Position of the last commit."""
        self._skipped = False
        self._limits = limits
        self._known = Definitions()
        self._expiry = Expiry(self._known)
        self._producers = Producers(limits.producers_max)
        self._log_ms = 0
        """Time of the log, which neither falls nor is ahead of the shell's clock."""
        self._folded_ms = (
            0  # the time that log, publisher and shell have all reached: one clock that is ahead expires nothing
        )
        self._overlay = Overlay(native)
        self._frozen = Overlay(native)
        self._frozen_known: dict[bytes, Known] = {}
        """Definitions of the frozen overlay, as they were when it was frozen."""
        self._changes: Changes | None = None
        self._pending = NO_POSITION
        self._swept_max = self._added_count = 0
        self._cache = Cache(limits.cache_entries_max, limits.cache_bytes_max, native)

    def _step(self, step: TaskEvent) -> None:
        self.phase = next_state(TRANSITIONS, self.phase, step, self.partition)

    @property
    def full(self) -> bool:
        """True if the overlay has reached its limit: commit before folding more."""
        overlay, limits = self._overlay, self._limits
        return overlay.bytes_total >= limits.overlay_bytes_max or overlay.entry_count() >= limits.overlay_entries_max

    @property
    def dirty(self) -> bool:
        """True if anything was folded, skipped, or has expired, that the next commit must record."""
        frozen = self.phase in (Phase.FROZEN, Phase.COMMITTING)
        known = self._frozen.next_offset if frozen else self.position.next_offset
        if self._skipped or self.next_offset > known or self._overlay.entry_count() > 0:
            return True
        return self._expiry.due and self.next_offset == known  # below: folding has not passed a hole behind the last record

    def restored(self, position: Position, definitions: Iterable[bytes], *, next_offset: int | None = None) -> None:
        """Start from committed entries: the position, and the values of definition entries.

        `next_offset` is where folding goes on, if the log is known to hold no record from there to the position.
        """
        self._step(TaskEvent.RESTORED)
        try:
            for value in definitions:
                entry = codec.decode_definition(value)
                known = Known(entry.definition, entry.series_count, entry.defined_at_ms, entry.expired_before_ms)
                self._known.add(series_prefix(entry.definition), known)
        except BadRecord as error:
            raise StoreCorrupt(f"partition {self.partition}: {error}") from None
        self._expiry.restored()
        self.position = position
        self._log_ms = min(position.source_at_ms, position.committed_at_ms)
        self.next_offset = self._overlay.next_offset = position.next_offset if next_offset is None else next_offset
        self._overlay.source_at_ms = position.source_at_ms

    def pass_hole(self) -> None:
        """Fold on from the position: the offsets below it, which held no record, are not in the log any more."""
        self.next_offset = self._overlay.next_offset = self.position.next_offset

    def skip_to(self, next_offset: int) -> None:
        """Go on elsewhere in the log, because what lay between is lost. The next commit records it."""
        self.next_offset = self._overlay.next_offset = next_offset
        self._skipped = True  # in a topic made anew, folding can come to the very offset of the position

    # Folding

    def read(self, records: Records) -> Reading:
        """Decode records. The values of `producer_keys`, from the store, go with them to `fold`."""
        received: list[Received | BadRecord] = []
        known: dict[str, Folded | None] = {}
        needed: dict[bytes, None] = {}
        for offset, value in zip(records.offsets, records.values, strict=True):
            if offset < self.next_offset:
                received.append(BadRecord("folded before"))
                continue
            try:
                one = codec.receive_batch(value or b"", self._native)
            except BadRecord as error:
                received.append(error)
                continue
            received.append(one)
            for producer_id in one.batch.producer_ids:
                if producer_id in known:
                    continue
                if self._has_producer(producer_id):
                    known[producer_id] = self._producer(producer_id)
                else:
                    needed[producer_key(producer_id)] = None
        return Reading(records, received, known, [*needed])

    def _has_producer(self, producer_id: str) -> bool:
        """Return whether a producer is known, or known to be forgotten; else the store must be asked."""
        return any(producer_id in it for it in (self._overlay.producers, self._frozen.producers, self._producers))

    def _producer(self, producer_id: str) -> Folded | None:
        """Return the memory of a known producer; None if the producer was forgotten."""
        for producers in (self._overlay.producers, self._frozen.producers):
            if producer_id in producers:
                return producers[producer_id]
        return self._producers[producer_id]

    def fold(self, reading: Reading, values: Sequence[bytes | None], *, now_ms: int) -> None:
        """Merge what was read into the overlay. Records below `next_offset` were folded before and are skipped.

        Folding ends behind a batch whose orders fill the next commit: fold the rest, from `next_offset` on, after a freeze.
        A record or group that is wrong becomes a dead letter and changes nothing else; it never stops the partition.
        `values` are those of the producer keys that `read` returned, `now_ms` is the shell's clock.
        """
        self._step(TaskEvent.FOLD)
        known = self._learned(reading, values)
        overlay, records = self._overlay, reading.records
        for offset, at_ms, value, received in zip(
            records.offsets, records.at_ms, records.values, reading.received, strict=True
        ):
            if offset < self.next_offset:
                continue
            self._log_ms = max(self._log_ms, min(at_ms, now_ms))
            overlay.touched_ms = max(overlay.touched_ms, at_ms, now_ms)
            try:
                if isinstance(received, BadRecord):
                    raise received
                self._folded_ms = max(self._folded_ms, min(at_ms, now_ms, received.batch.created_at_ms))
                self._fold_batch(received, known, offset, at_ms, max(at_ms, now_ms))
            except BadRecord as error:
                self.counts.records_bad += 1
                key = refused_key(received, self.partition, offset, self._source_id)
                self._refuse(key, offset, at_ms, str(error), "", value)
            self.next_offset = overlay.next_offset = offset + 1
            overlay.source_at_ms = at_ms
            overlay.bytes_total += len(value or b"")
            if isinstance(received, Received) and received.batch.controls and self.full:
                return
        self.next_offset = overlay.next_offset = max(self.next_offset, records.next_offset)

    def _learned(self, reading: Reading, values: Sequence[bytes | None]) -> dict[str, Folded | None]:
        """Return the memories of a reading's producers: as folded or forgotten since the reading, or else as found then."""
        learned = {**reading.producers}
        try:
            for key, value in zip(reading.producer_keys, values, strict=True):
                producer_id = key[1:].decode()
                learned[producer_id] = folded = None if value is None else codec.decode_folded(value)
                if not self._has_producer(producer_id):
                    self._producers.keep(producer_id, folded)
        except BadRecord as error:
            raise StoreCorrupt(f"partition {self.partition}: {error}") from None
        return {it: self._producer(it) if self._has_producer(it) else folded for it, folded in learned.items()}

    def _fold_batch(
        self, received: Received, known: dict[str, Folded | None], offset: int, at_ms: int, seen_at_ms: int
    ) -> None:
        """Fold a batch, and update the memory of its producer in `known`."""
        batch = received.batch
        if batch.partition != self.partition:
            raise BadRecord(f"batch for partition {batch.partition} in partition {self.partition}")
        before, letter = known[batch.producer_id], letter_key(batch.producer_id, self.partition)
        producer = before or Folded()
        if letter is not None:  # folded before, folded now, or refused again: in each case the replay is done
            self._overlay.letters[letter] = None
        if producer.has(batch.sequence):
            self.counts.batches_duplicate += 1
            if producer.epoch < batch.epoch <= producer.epoch + EPOCH_STEP_MAX:
                opened = msgspec.structs.replace(producer, epoch=batch.epoch, closed=False)
                self._remember(known, batch.producer_id, opened)
            return
        if batch.epoch < producer.epoch:
            self.counts.batches_stale += 1
            name = fingerprint(batch.producer_id)
            raise BadRecord(f"stale epoch {batch.epoch}: epoch {producer.epoch} of producer {name} was seen")
        if before is not None:
            before.check_step(batch.sequence, batch.epoch, offset)
        folded = producer.with_folded(batch.sequence, batch.floor, batch.epoch, seen_at_ms, offset)
        folded.closed = batch.closing or producer.still_closed(batch.sequence, batch.epoch)
        settled, origin = self._settle(batch, known, offset, seen_at_ms)
        if settled:
            self.counts.batches_duplicate += 1
        else:
            for control in batch.controls:
                self._carry_out(control)
            self._fold_groups(received, letter, offset, at_ms)
            self.counts.batches_folded += 1
        if letter is None or self._overlay.letters[letter] is None:
            for producer_id, it in (*origin, (batch.producer_id, folded)):
                self._remember(known, producer_id, it)

    def _remember(self, known: dict[str, Folded | None], producer_id: str, folded: Folded) -> None:
        known[producer_id] = self._overlay.producers[producer_id] = folded

    def _settle(
        self, batch: Batch, known: dict[str, Folded | None], offset: int, seen_at_ms: int
    ) -> tuple[bool, list[tuple[str, Folded]]]:
        """Return whether the origin of a replayed batch was folded after all, and else the memories to keep of its producer.

        With these memories the origin counts as folded. An origin whose sequence jumps is left alone: the task would refuse
        it.
        """
        origin = batch.origin
        if origin is None:
            return False, []
        producer = known[origin.producer_id]
        if producer is None:
            raise BadRecord("its producer was forgotten: it can't be told whether what it replays was counted after all")
        if producer.has(origin.sequence):
            return True, []
        if not producer.is_step(origin.sequence, offset):
            return False, []
        folded = producer.with_folded(origin.sequence, 0, producer.epoch, seen_at_ms, producer.seen_offset)
        folded.closed = producer.closed
        return False, [(origin.producer_id, folded)]

    def _fold_groups(self, received: Received, letter: bytes | None, offset: int, at_ms: int) -> None:
        batch = received.batch
        refused = [*received.refused]
        record = refused_key(received, self.partition, offset, self._source_id)
        alone = letter is not None and len(batch.groups) + len(received.refused) == 1
        for index, group in zip(received.indexes, batch.groups, strict=True):
            try:
                known = self._check_group(group, at_ms)
            except BadRecord as error:
                refused.append(RefusedGroup(index, group.definition.view, str(error)))
                continue
            kept, late = self._split_late(group, known, whole=alone and is_last_key(record))
            if kept is not None:
                self.counts.entries_folded += kept.count
                self._overlay.merge(series_prefix(group.definition), kept)
            if late is not None:
                self.counts.entries_expired += late.count
                key = record if alone and kept is None else group_key(record, index)
                value = with_group(received, index, whole=alone) if kept is None else with_rows(received, late)
                self._refuse(key, offset, at_ms, late_reason(late, group, known), group.definition.view, value)
        for it in refused:
            self.counts.groups_refused += 1
            key = record if alone else group_key(record, it.index)
            self._refuse(key, offset, at_ms, it.reason, it.view, with_group(received, it.index, whole=alone))

    def _split_late(self, group: Group, known: Known, *, whole: bool) -> tuple[Group | None, Group | None]:
        """Return the part of a group to fold and the part whose windows have expired; with `whole` one of them is empty."""
        if not group.definition.window_s:
            return group, None
        prefix = series_prefix(group.definition)
        if self._expiry.move(prefix, known, self._folded_ms):
            self._overlay.moved.add(prefix)
        kept, late = split_late(group, known)
        return (None, group) if whole and late is not None else (kept, late)

    def _refuse(self, key: bytes, offset: int, at_ms: int, reason: str, view: str, value: bytes | None) -> None:
        self._overlay.letters[key] = DeadLetter(self.partition, offset, at_ms, reason, view, value)

    def _check_group(self, group: Group, at_ms: int) -> Known:
        """Return the definition of a group, which is new perhaps. Raises `BadRecord` if the group can't be folded."""
        definition = group.definition
        prefix = series_prefix(definition)
        known = self._known.get(prefix)
        if known is None and len(self._known) >= self._limits.views_max:
            raise BadRecord(f"over {self._limits.views_max} definitions of views in partition {self.partition} (views_max)")
        if known is not None and known.definition != definition:
            raise BadRecord(f"view {definition.view}: another definition has the same id")
        known_states = self._overlay.plain_states(prefix), *self._cache.of(prefix)
        check_rows(group, at_ms + self._limits.ts_ahead_max_ms, known_states)
        if known is None:
            known = self._known.define(prefix, definition, self._log_ms)
            self._overlay.defined.add(prefix)
            self._cache.begin(prefix)
        return known

    def _carry_out(self, control: Control) -> None:
        """Drop or reset the definitions of an order; series that are folded later begin from nothing."""
        overlay = self._overlay
        for prefix, known in self._known.of(control.view):
            if not control.concerns(known.definition):
                continue
            overlay.states.pop(prefix, None)
            overlay.cleared.add(prefix)
            self._expiry.forget(prefix)
            self._cache.begin(prefix)
            overlay.cleared_count += known.series_count
            self.counts.series_cleared += known.series_count
            known.series_count = 0
            if control.action == "drop":
                self._known.drop(prefix)
                self._cache.forget(prefix)
                overlay.defined.discard(prefix)
                overlay.moved.discard(prefix)

    # Committing

    def sweep(self, entries: Iterable[tuple[bytes, bytes]], *, now_ms: int) -> None:
        """Forget producers, given by their entries in the store, that were silent for too long by all clocks."""
        latest_ms, limits = min(self._folded_ms, now_ms), self._limits
        for key, value in entries:
            try:
                producer_id, producer = key[1:].decode(), codec.decode_folded(value)
            except (BadRecord, UnicodeDecodeError) as error:
                raise StoreCorrupt(f"partition {self.partition}: {error}") from None
            ttl_ms = limits.closed_producer_ttl_ms if producer.closed else limits.producer_ttl_ms
            ttl_ms = limits.letter_ttl_ms if is_letter_producer(producer_id) else ttl_ms
            folded = producer_id in self._overlay.producers or producer_id in self._frozen.producers
            if producer.seen_at_ms + ttl_ms < latest_ms and not folded:
                self.counts.producers_forgotten += 1
                self._overlay.producers[producer_id] = None

    def freeze(self) -> Lookup:
        """Swap the overlay for an empty one, and return what `prepare_commit` needs from the store."""
        self._step(TaskEvent.FREEZE)
        self._skipped = False
        frozen, self._frozen, self._overlay = self._overlay, self._overlay, Overlay(self._native)
        self._overlay.next_offset = frozen.next_offset
        self._overlay.source_at_ms = frozen.source_at_ms
        frozen.touched_ms = max(frozen.touched_ms, self._folded_ms)
        expiring = frozen.states.keys() & self._known.expiring.keys()
        silent_ms = {it: self._known[it].expired_before_ms for it in expiring if expires_silent(self._known[it].definition)}
        self._expiry.freeze(frozen, self._folded_ms)
        sweeps = self._expiry.plan(frozen)
        concerned = frozen.states.keys() | frozen.defined | frozen.cleared | frozen.moved | {it.prefix for it in sweeps}
        self._frozen_known = {it: known.copy() for it in concerned if (known := self._known.get(it)) is not None}
        self._changes = Changes(
            self.partition,
            frozen,
            self._frozen_known,
            self._cache,
            series_max=self._limits.series_max,
            silent_ms=silent_ms,
        )
        # At least as many entries as the commit before has added, so that expiry keeps up with new windows.
        self._swept_max = max(self._limits.expired_entries_max, self._added_count)
        return Lookup(self._changes.keys, sorted(frozen.cleared), sweeps, self._swept_max)

    def prepare_commit(
        self,
        values: Sequence[bytes | None],
        existing: Sequence[bytes] = (),
        swept: Sequence[Sequence[Entry]] = (),
        *,
        now_ms: int,
    ) -> Commit:
        """Return the commit, given what `freeze` asked for: the committed values of the keys, in their order, the existing
        keys under the prefixes, in order, and the entries in each of the sweeps.
        """
        self._step(TaskEvent.PREPARE)
        assert self._changes is not None
        frozen = self._frozen
        expired = self._expiry.find(swept, self._changes, self._frozen_known, entries_max=self._swept_max)
        self.counts.series_expired += len(expired)
        series, states = self._changes.merge(values)
        self.counts.series_overflowed += self._changes.overflow_count
        # Definitions stand before their series, tombstones of definitions behind: a follower knows the definition of each
        # series.
        keys, out = self._definition_entries(self._changes.new_counts)
        gone = gone_keys(existing, series, frozen.cleared)
        dropped = sorted(TAG_DEFINITION + prefix[1:] for prefix in frozen.cleared - self._frozen_known.keys())
        keys += [*series, *gone, *expired, *dropped]
        out += [*states, *[None] * (len(gone) + len(expired) + len(dropped))]
        for producer_id, producer in frozen.producers.items():
            keys.append(producer_key(producer_id))
            out.append(None if producer is None else codec.encode_folded(producer))
        version = self.position.definitions_version + bool(frozen.defined or dropped)
        self._pending = Position(frozen.next_offset, now_ms, frozen.source_at_ms, self._source_id, version)
        keys.append(POSITION_KEY)
        out.append(codec.encode_position(self._pending))
        letters = [(key, None if it is None else codec.encode_letter(it)) for key, it in frozen.letters.items()]
        return Commit(keys, out, letters, self._pending, len(series) + len(gone) + len(expired))

    def _definition_entries(self, new_counts: Mapping[bytes, int]) -> tuple[list[bytes], list[bytes | None]]:
        keys: list[bytes] = []
        out: list[bytes | None] = []
        frozen = self._frozen
        changed = frozen.defined | frozen.cleared | frozen.moved | new_counts.keys() | self._expiry.gone.keys()
        for prefix, known in sorted(self._frozen_known.items()):
            if prefix in changed:
                count = known.series_count + new_counts.get(prefix, 0)
                entry = DefinitionEntry(known.definition, count, known.defined_at_ms, known.expired_before_ms)
                keys.append(TAG_DEFINITION + prefix[1:])
                out.append(codec.encode_definition(entry))
        return keys, out

    def committed(self) -> None:
        """Note that the commit is durable in the log and in the store."""
        self._step(TaskEvent.COMMITTED)
        assert self._changes is not None
        for merged in self._changes.merged:
            if merged.prefix not in self._overlay.cleared:
                self._cache.update(merged)
        self._added_count = sum(self._changes.new_counts.values())
        for prefix, count in self._changes.new_counts.items():
            if prefix not in self._overlay.cleared:
                self._known[prefix].series_count += count
        self._expiry.committed(self._overlay)
        for producer_id, producer in self._frozen.producers.items():
            self._producers.keep(producer_id, producer)
        self.position = self._pending
        self._frozen, self._frozen_known, self._changes = Overlay(self._native), {}, None
