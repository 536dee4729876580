"""Counts on its own, by the simplest means, what every partition must hold, and watches every commit.

The auditor shares no code with `pipeline.core`: each publisher tells it what it seals, the log shows it every append, it
reads entries with bare msgpack, and it never merges anything. What is exact it judges by what the log accepted, never by
the clock of a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any
from zlib import crc32

from tests.sim.clocks import TrueTime
from tests.sim.count import NONE_LATE, Count, Limits, Row, Sent
from tests.sim.entries import (
    DEFINITION,
    FENCE,
    POSITION,
    PRODUCER,
    SERIES,
    Entries,
    Failure,
    View,
    check,
    compare,
    definition_key,
    expires_at_ms,
    overflow_key,
    series_prefix,
    start_of,
    state,
    unpack,
)
from tests.sim.expiry import Expiry
from tests.sim.laws import verdict as verdict_of


def place(key: bytes) -> bytes:
    """Return the part of a dead letter's key that follows its topic."""
    return key.rpartition(b".")[2]


def no_letter(partition: int) -> bytes:
    """Return the key of a record in the dead letters that says nothing, but has a marker behind it."""
    return b"%d-%d" % (partition, 2**63 - 1)


class Auditor:
    """Sees every seal, append and commit, and says at once when a commit is not exactly what the log calls for."""

    def __init__(self, partition_count: int, limits: Limits, true_time: TrueTime) -> None:
        self.digest = 0
        """Hash of every byte that became durable: equal digests mean equal runs."""
        self.states: list[Entries] = [{} for _ in range(partition_count)]
        """Sum of the commits of each partition."""
        self.boundaries: list[dict[bytes, Entries]] = [{b"": {}} for _ in range(partition_count)]
        """The state at each commit, by its position record."""
        self._limits = limits
        self._time = true_time
        self._sealed: dict[bytes, Sent] = {}
        self.rows: list[list[Row]] = [[] for _ in range(partition_count)]
        self._lost: list[set[int]] = [set() for _ in range(partition_count)]
        self._refused: list[set[int]] = [set() for _ in range(partition_count)]
        """Offsets of records that a task refused although the law allowed it to fold them."""
        self._forgotten: list[dict[int, list[str]]] = [{} for _ in range(partition_count)]
        """Producers that were forgotten, by the position of the commit that forgot them."""
        self._expiry = [Expiry(true_time) for _ in range(partition_count)]
        self._committed = [Count(p, limits) for p in range(partition_count)]
        self._ahead = [Count(p, limits) for p in range(partition_count)]
        self._acknowledged: list[Sent] = []
        self._gone: set[tuple[str, int, int]] = set()
        """Identities of the batches that the log has lost."""
        self._rewound: set[int] = set()
        self.holes: dict[int, int] = {}
        """First offset that is gone from the middle of the log, by partition."""

    # What happens

    def sealed(self, value: bytes, sent: Sent) -> None:
        self._sealed[value] = sent

    def appended(self, partition: int, at_ms: int, value: bytes | None) -> None:
        self._hash(b"%d" % partition, value)
        self.rows[partition].append(Row(at_ms, self._time.at_ms, value, self._sealed.get(value or b"")))

    def skipped(self, partition: int) -> None:
        """Note an offset that holds no record, such as the one at the end of a foreign transaction."""
        self.rows[partition].append(Row(0, 0, None, None, hole=True))

    def torn(self, partition: int, end_offset: int) -> None:
        """Note that the log lost a tail that nobody had read and nobody had been told was safe."""
        check(self._ahead[partition].next_offset <= end_offset, "the simulator tore off records that were read")
        del self.rows[partition][end_offset:]

    def cut(self, partition: int, end_offset: int) -> None:
        """Note that the log lost a tail of which some was folded: unless a worker notices, the rest must be exact."""
        self._gone |= {row.sent.identity for row in self.rows[partition][end_offset:] if row.sent}
        del self.rows[partition][end_offset:]
        if self._committed[partition].next_offset <= end_offset:
            self._recount(partition, self._committed[partition].next_offset)
        self._ahead[partition] = Count(partition, self._limits)

    def holed(self, partition: int, start_offset: int) -> None:
        """Note a hole in the middle of the log, from this offset on: a worker that folds what follows must have noticed."""
        self.holes[partition] = start_offset

    def rewound(self, partition: int, record: bytes) -> None:
        """Note that the changelog lost its tail and now ends with the commit of this position record."""
        position = unpack(record)[0] if record else 0
        self._rewound.add(partition)
        self._forgotten[partition] = {p: gone for p, gone in self._forgotten[partition].items() if p <= position}
        self._expiry[partition].rewound(record, position)
        self.states[partition] = dict(self.boundaries[partition][record])
        self._recount(partition, position)

    def _recount(self, partition: int, position: int) -> None:
        self._committed[partition] = Count(partition, self._limits)
        self._ahead[partition] = Count(partition, self._limits)
        self._advance(self._committed[partition], position)
        self._committed[partition].expire(self._expiry[partition].gone_at(position))

    def acknowledged(self, value: bytes) -> None:
        self._acknowledged.append(self._sealed[value])

    def lost(self, partition: int, next_offset: int, start_offset: int) -> None:
        """Note that a worker was told to go on without the records of this range."""
        self._lost[partition].update(range(next_offset, start_offset))
        self._ahead[partition] = Count(partition, self._limits)

    def position(self, partition: int) -> int:
        """Return the position of the last commit."""
        return self._committed[partition].next_offset

    # What must be

    def committed(self, partition: int, messages: list[tuple[str, int, bytes | None, bytes | None]]) -> bool:
        """Check a transaction that went through, and return whether it was a commit.

        It must be either the next commit, whole and exact, or a fence record.
        """
        for topic, at, key, value in messages:
            self._hash(topic.encode(), key, value)
            if at != partition or key is None:
                raise Failure(f"partition {partition} wrote to {topic}-{at}, key {key!r}")
        if messages[-1][2] == FENCE:
            nothing = ("dead-letters", partition, no_letter(partition), None)
            check(messages[-1][0] == "changelog" and messages[:-1] in ([], [nothing]), "a fence record is not alone")
            return False
        check(messages[-1][:3] == ("changelog", partition, POSITION), "the position is not the last of its commit")
        count, state_now = self._committed[partition], self.states[partition]
        before, old = count.next_offset, dict(state_now)
        entries = {key: value for topic, _, key, value in messages if topic == "changelog" and key is not None}
        check(len(entries) == sum(m[0] == "changelog" for m in messages), "a key stands twice in one commit")
        for key, value in entries.items():
            if value is None:
                state_now.pop(key, None)
            else:
                state_now[key] = value
        position = unpack(state_now[POSITION])
        if position[0] < before:
            raise Failure(f"the position fell from {before} to {position[0]}")
        if position[0] > len(self.rows[partition]):
            raise Failure(f"position {position[0]} is beyond the log")
        if position[0] > self.holes.get(partition, position[0]):
            raise Failure(f"partition {partition} is folded beyond a hole")
        letters = {
            place(key): unpack(value) for topic, _, key, value in messages if topic == "dead-letters" and value and key
        }
        self._choose(partition, before, position[0], letters)
        expiry = self._expiry[partition]
        expiry.note_letters(self.rows[partition], before, position[0], letters)
        self._advance(count, position[0])
        expiry.check_rows(self.rows[partition], count, before, position[0], old, state_now)
        count.expire(expiry.note_gone(count, state_now[POSITION], position[0], old, state_now))
        if position[2] != count.source_at_ms:
            raise Failure(f"source_at_ms {position[2]}, not {count.source_at_ms}")
        self._check_letters(partition, before, letters)
        self._check_entries(count, state_now, entries.keys(), count.touched)
        count.touched.clear()
        count.ghosts = {key: ghost for key, ghost in count.ghosts.items() if key in state_now}
        self.boundaries[partition][state_now[POSITION]] = dict(state_now)
        gone = [k for k in count.producers if PRODUCER + k.encode() not in state_now]
        if gone:
            self._forgotten[partition][position[0]] = gone
        if gone or self._ahead[partition].unsure:  # by now it is known what became of those records
            self._ahead[partition] = Count(partition, self._limits)
            self._advance(self._ahead[partition], position[0])
            self._ahead[partition].unsure = False
        return True

    def check_counts(
        self, partition: int, start_offset: int, next_offset: int, counts: Any, forgetting: Collection[str] = ()
    ) -> None:
        """Return a task's counts since it started at `start_offset`, with a commit under way that forgets some producers.

        The outcome for records of these producers behind that commit is known once the commit went through.
        """
        ahead = self._ahead[partition]
        self._advance(ahead, next_offset)
        behind = self.rows[partition][self.position(partition) : next_offset] if forgetting else ()
        if ahead.unsure or any(row.sent and row.sent.producer_id in forgetting for row in behind):
            return
        verdicts = ahead.verdicts[start_offset:next_offset]
        seen = Counter(verdicts)
        groups = sum(len(found) for offset, found in ahead.refused.items() if start_offset <= offset < next_offset)
        expected = (seen["folded"], seen["duplicate"], seen["stale"], seen["bad"] + seen["stale"], groups)
        got = (
            counts.batches_folded,
            counts.batches_duplicate,
            counts.batches_stale,
            counts.records_bad,
            counts.groups_refused,
        )
        if got != expected:
            raise Failure(f"partition {partition}: (folded, duplicate, stale, bad, groups) is {got}, not {expected}")

    def check_entries(self, partition: int, entries: Entries) -> None:
        """Check a store's entries, without those about the store itself, against the end of its changelog."""
        compare(f"partition {partition}: store", entries, self.states[partition])
        count = self._committed[partition]
        self._check_entries(count, entries, entries.keys(), count.views.keys())
        known = (POSITION, DEFINITION, SERIES, PRODUCER)
        check(all(key[:1] in known for key in entries), "an entry of no known kind")

    def check_drained(self, partition: int, letters: list[bytes | None]) -> None:
        """Check a partition whose whole log is folded: nothing is missing, and every bad record is a dead letter, once."""
        count = self._committed[partition]
        if count.next_offset != len(self.rows[partition]):
            raise Failure(f"partition {partition} is not drained")
        letters = [key and place(key) for key in letters if key != no_letter(partition)]
        bad = self._letter_keys(count, 0)
        again = len(letters) - len(set(letters))  # what is folded again, because commits were lost, is refused again
        known = {*letters}
        if partition in self._rewound:  # what was refused before the log lost that may be folded by now
            known -= self._expiry[partition].refused_ever - bad
        if known != bad or (again and partition not in self._rewound):
            raise Failure(f"partition {partition}: dead letters {letters}, not {bad}")
        doubtful = {
            row.sent.identity
            for row, verdict in zip(self.rows[partition], count.verdicts, strict=True)
            if row.sent and verdict in ("bad", "stale", "lost")
        } | self._gone
        for sent in self._acknowledged:
            is_in = (sent.producer_id, sent.sequence) in count.folded
            if sent.partition == partition and sent.identity not in doubtful and not is_in:
                raise Failure(f"acknowledged but not in: {sent}")

    def verdict(self, partition: int, offset: int) -> str:
        """Return the fate of a record below the position."""
        return self._committed[partition].verdicts[offset]

    # How

    def _hash(self, *parts: bytes | None) -> None:
        for part in parts:
            self.digest = crc32(part or b"-", self.digest)

    def _choose(self, partition: int, start: int, end: int, letters: dict[bytes, list[Any]]) -> None:
        """Note how the task chose where the law leaves it free."""
        for offset in range(start, end):
            sent = self.rows[partition][offset].sent
            if sent is not None and sent.law and b"%d-%d" % (partition, offset) in letters:
                self._refused[partition].add(offset)

    def _letter_keys(self, count: Count, start: int) -> set[bytes]:
        """Return the keys of the dead letters of everything from this offset on."""
        verdicts = enumerate(count.verdicts[start:], start)
        keys = {b"%d-%d" % (count.partition, offset) for offset, verdict in verdicts if verdict in ("bad", "stale")}
        for offset, found in count.refused.items():
            if offset >= start:
                keys |= {b"%d-%d-%d" % (count.partition, offset, index) for index in found}
        for offset, late in self._expiry[count.partition].late.items():
            if start <= offset < count.next_offset and count.verdicts[offset] == "folded":
                keys |= {b"%d-%d-%d" % (count.partition, offset, index) for index in late}
        return keys

    def _advance(self, count: Count, next_offset: int) -> None:
        partition = count.partition
        rows, lost, refused = self.rows[partition], self._lost[partition], self._refused[partition]
        expiry = self._expiry[partition]
        while count.next_offset < next_offset:
            offset = count.next_offset
            row = rows[offset]
            for producer_id in self._forgotten[partition].get(offset, ()):
                count.producers.pop(producer_id, None)
            count.expire(expiry.gone_at(offset))
            late = expiry.late.get(offset, NONE_LATE)
            verdict = count.take(row, lost=offset in lost, refused=offset in refused, late=late)
            if verdict == "duplicate" and row.sent and not count.had_loss:
                known = row.sent.sequence in count.producers[row.sent.producer_id].accepted
                if not known and all(r.sent is None or r.sent.identity != row.sent.identity for r in rows[:offset]):
                    raise Failure(f"a floor above a batch that was still to come: {row.sent}")

    def _check_letters(self, partition: int, before: int, letters: dict[bytes, list[Any]]) -> None:
        count = self._committed[partition]
        expected = self._letter_keys(count, before)
        if letters.keys() != expected:
            raise Failure(f"partition {partition}: dead letters {[*letters]}, not {expected}")
        for key, (at, offset, at_ms, reason, view, value) in letters.items():
            row = self.rows[partition][offset]
            indexes = [int(index) for index in key.split(b"-")[2:]]
            kept = value == row.value
            if indexes:
                assert row.sent is not None
                kept = bool(value) and view == row.sent.groups[indexes[0]].view.name
            if (
                not kept
                or not reason
                or (at, at_ms) != (partition, row.at_ms)
                or not key.startswith(b"%d-%d" % (at, offset))
            ):
                raise Failure(f"dead letter {key!r}, {reason}, is not the record {row}")

    def _check_entries(self, count: Count, entries: Entries, keys: Iterable[bytes], views: Iterable[View]) -> None:
        for key in keys:
            if key[:1] != SERIES or key not in entries or key in count.deltas:
                continue
            if key in count.ghosts:
                if entries[key] != count.ghosts[key][1]:
                    raise Failure(f"partition {count.partition}: {key!r} has expired, and is written")
                continue
            prefixes = {view: series_prefix(view) for view in count.views}
            view = next((view for view in count.views if key.startswith(prefixes[view])), None)
            if view is None or overflow_key(view, start_of(key, view)) != key:
                raise Failure(f"partition {count.partition}: {key!r} is there, and has no deltas")
        for view in views:
            self._check_series(count, entries, view)
        self._check_producers(count, entries)
        self._check_views(count, entries)

    def _check_series(self, count: Count, entries: Entries, view: View) -> None:
        """Check that each series of a definition equals its deltas; those without an entry are in the overflow series."""
        keys = count.views.get(view, set())
        overflows = {start: overflow_key(view, start) for start in {start_of(key, view) for key in keys}}
        excess: dict[int, list[Any]] = {}
        present = [key for key in keys if key in entries and key not in overflows.values()]
        room = self._limits.series_max
        for key in keys:
            start = start_of(key, view)
            if key == overflows[start] or (key not in entries and view.labels and len(keys) > room):
                excess.setdefault(start, []).extend(count.deltas[key])
            else:
                self._check_state(count, view, entries.get(key), count.deltas[key])
        for start, overflow in overflows.items():
            if start in excess:
                if not (overflow in keys or len(present) >= room - len(overflows)):
                    raise Failure(f"{view} overflows with {len(present)} series")
                self._check_state(count, view, entries.get(overflow), excess[start])
            elif not (overflow not in entries or not view.labels):
                raise Failure(f"partition {count.partition}: {view} has not overflowed")
        if not (len(present) <= room or not view.labels):
            raise Failure(f"partition {count.partition}: {view} has {len(present)} series")

    def _check_state(self, count: Count, view: View, value: bytes | None, deltas: list[Any]) -> None:
        if value is None:
            raise Failure(f"partition {count.partition}: {view} lacks a series with deltas {deltas}")
        kind, found = state(value)
        if bool(expires_at_ms(value)) is not view.is_silent:
            raise Failure(f"partition {count.partition}: a series of {view} expires at {expires_at_ms(value)}")
        wrong = verdict_of(kind, deltas, found) if kind == view.kind else f"is a {kind}"
        if wrong:
            raise Failure(f"partition {count.partition}: a series of {view} {wrong}; its deltas: {deltas}")

    def _check_producers(self, count: Count, entries: Entries) -> None:
        stored = {key[1:].decode(): unpack(value) for key, value in entries.items() if key[:1] == PRODUCER}
        for producer_id, producer in count.producers.items():
            found = stored.pop(producer_id, None)
            if found is None:
                silent_ms = self._time.at_ms - producer.seen_at_ms
                remembered = count.remembers(producer, self._time.at_ms)
                if remembered:
                    raise Failure(f"producer {producer_id} was forgotten after {silent_ms} ms")
            else:
                expected = producer.as_stored()
                if found[: len(expected)] != expected:
                    raise Failure(f"partition {count.partition}: producer {producer_id} is {found}, not {expected}")
        if stored:
            raise Failure(f"producers that folded nothing: {stored}")

    def check_forgotten(self, partition: int, keys: list[bytes]) -> None:
        """Check that none of these producers, all silent for too long, is remembered."""
        for key in keys:
            if key in self.states[partition]:
                raise Failure(f"{key!r} was not forgotten")

    def check_expired(self, partition: int, *, all_of_it: bool) -> None:
        """Check that nothing that has expired is left; with `all_of_it` every series with a retention has expired by now."""
        count, states = self._committed[partition], self.states[partition]
        left = [key for key in count.ghosts if key in states]
        if all_of_it:
            left += [key for key in count.deltas if count.series[key][0].retention_s]
        if left:
            raise Failure(f"partition {partition}: {left} have expired, and are there")

    def _check_views(self, count: Count, entries: Entries) -> None:
        """Check which definitions are there, in the order of their first batches, and how many series each has."""
        found = {key: unpack(value) for key, value in entries.items() if key[:1] == DEFINITION}
        since: dict[str, int] = {}
        for view in count.views:
            entry = found.pop(definition_key(view), None)
            if entry is None or entry[0] != view.as_stored():
                raise Failure(f"partition {count.partition}: the definition of {view} is {entry}")
            prefix = series_prefix(view)
            series_count = sum(key.startswith(prefix) for key in entries)
            if entry[1] != series_count:
                raise Failure(f"partition {count.partition}: {entry[1]} series of {view}, not {series_count}")
            if entry[2] < since.get(view.name, 0):
                raise Failure(f"{view} seems to be defined before one that was there first")
            since[view.name] = entry[2]
        if found:
            raise Failure(f"partition {count.partition}: definitions of nothing: {found}")
