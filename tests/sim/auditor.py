"""Counts on its own what every partition must hold, by the simplest means there are: lists of deltas, sets of numbers.

It shares no code with `pipeline.core`: it knows what was sealed because it was told so when it was sealed, knows the order
in the log because it sees every append, reads entries with bare msgpack, and never merges anything.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import msgspec

POSITION, DEFINITION, SERIES, PRODUCER, META = b"\x00", b"\x01", b"\x02", b"\x03", b"\xff"

Series = tuple[str, tuple[str, ...]]
Entries = dict[bytes, bytes]


class Failure(AssertionError):
    """What the code did contradicts the count, or the law."""


@dataclass(frozen=True)
class View:
    """A definition, as the publisher meant it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    monotone: bool = False

    def as_stored(self) -> list[Any]:
        """What a partition's definition entry must say of it."""
        return [self.name, self.kind, list(self.labels), 0, *[True] * self.monotone]


@dataclass(frozen=True)
class Sent:
    """What a sealed batch says. Two batches with one identity say the same, unless a zombie made one of them."""

    producer_id: str
    epoch: int
    partition: int
    sequence: int
    floor: int
    views: tuple[View, ...]
    deltas: tuple[tuple[Series, Any], ...]
    malformed: bool = False
    """Whether a series of it can't be one of its view."""
    unreadable: bool = False
    """Whether a state of it can't be one of its view: so its bytes are no batch, whoever sent them and when."""

    @property
    def identity(self) -> tuple[str, int, int]:
        return self.producer_id, self.partition, self.sequence


@dataclass
class Producer:
    """What is known of one producer in one partition."""

    epoch: int = 0
    floor: int = 0
    seen_at_ms: int = 0
    accepted: set[int] = field(default_factory=set)

    def settled(self, sequence: int) -> bool:
        return sequence in self.accepted or sequence < self.floor

    def as_stored(self) -> list[Any]:
        """The entry that a partition must hold: all below the first gap as one number, the rest as ranges."""
        start = self.floor
        while start in self.accepted:
            start += 1
        ranges: list[list[int]] = []
        for sequence in sorted(s for s in self.accepted if s > start):
            if ranges and ranges[-1][1] == sequence:
                ranges[-1][1] += 1
            else:
                ranges.append([sequence, sequence + 1])
        return [self.epoch, start, ranges, self.seen_at_ms]


@dataclass(frozen=True)
class Row:
    """A record of the deltas topic, as the log accepted it; or an offset that the log uses for itself."""

    at_ms: int
    value: bytes | None
    sent: Sent | None
    hole: bool = False


class Count:
    """The naive count of one partition: takes its records one by one, in the order of the log."""

    def __init__(self, partition: int, views_max: int) -> None:
        self.partition = partition
        self.next_offset = 0
        self.source_at_ms = 0
        self.verdicts: list[str] = []
        self.views: dict[str, View] = {}
        self.producers: dict[str, Producer] = {}
        self.deltas: dict[Series, list[Any]] = {}
        self.had_loss = False
        self._views_max = views_max

    def take(self, row: Row, *, lost: bool) -> str:
        verdict = "lost" if lost else "hole" if row.hole else self._judge(row.sent)
        self.verdicts.append(verdict)
        self.next_offset += 1
        self.had_loss |= lost
        if lost or row.hole:
            return verdict
        self.source_at_ms = row.at_ms
        if verdict in ("folded", "duplicate"):
            assert row.sent is not None
            producer = self.producers.setdefault(row.sent.producer_id, Producer())
            producer.epoch = row.sent.epoch
            if verdict == "folded":
                producer.floor = max(producer.floor, row.sent.floor)
                producer.seen_at_ms = row.at_ms
                producer.accepted.add(row.sent.sequence)
                for view in row.sent.views:
                    self.views.setdefault(view.name, view)
                for series, delta in row.sent.deltas:
                    self.deltas.setdefault(series, []).append(delta)
        return verdict

    def _judge(self, sent: Sent | None) -> str:
        if sent is None or sent.unreadable or sent.partition != self.partition:
            return "bad"
        producer = self.producers.get(sent.producer_id, Producer())
        if sent.epoch < producer.epoch:
            return "stale"
        if producer.settled(sent.sequence):
            return "duplicate"
        views = dict(self.views)
        if sent.malformed or any(views.setdefault(view.name, view) != view for view in sent.views):
            return "bad"
        return "bad" if len(views) > self._views_max else "folded"


class Auditor:
    """Sees every seal, append and commit, and says at once when a commit is not exactly what the log calls for."""

    def __init__(self, partition_count: int, *, views_max: int, producer_ttl_ms: int) -> None:
        self.digest = 0
        """Changes with every byte that became durable: equal digests, equal runs."""
        self.states: list[Entries] = [{} for _ in range(partition_count)]
        """What the commits of each partition add up to."""
        self.boundaries: list[dict[int, Entries]] = [{0: {}} for _ in range(partition_count)]
        """The state at each commit, by its position."""
        self._views_max = views_max
        self._ttl_ms = producer_ttl_ms
        self._sealed: dict[bytes, Sent] = {}
        self.rows: list[list[Row]] = [[] for _ in range(partition_count)]
        self._lost: list[set[int]] = [set() for _ in range(partition_count)]
        self._committed = [Count(p, views_max) for p in range(partition_count)]
        self._ahead = [Count(p, views_max) for p in range(partition_count)]
        self._acknowledged: list[Sent] = []

    # What happens

    def sealed(self, value: bytes, sent: Sent) -> None:
        self._sealed[value] = sent

    def appended(self, partition: int, at_ms: int, value: bytes | None) -> None:
        self._hash(b"%d" % partition, value)
        self.rows[partition].append(Row(at_ms, value, self._sealed.get(value or b"")))

    def skipped(self, partition: int) -> None:
        """An offset that holds no record, as the end of somebody's transaction leaves one."""
        self.rows[partition].append(Row(0, None, None, hole=True))

    def torn(self, partition: int, end_offset: int) -> None:
        """The log lost its tail, which nobody had read and nobody was told to be safe."""
        check(self._ahead[partition].next_offset <= end_offset, "the simulator tore off records that were read")
        del self.rows[partition][end_offset:]

    def acknowledged(self, value: bytes) -> None:
        self._acknowledged.append(self._sealed[value])

    def lost(self, partition: int, next_offset: int, start_offset: int) -> None:
        """A worker was told to go on without the records of this range."""
        self._lost[partition].update(range(next_offset, start_offset))
        self._ahead[partition] = Count(partition, self._views_max)

    def position(self, partition: int) -> int:
        """The position of the last commit."""
        return self._committed[partition].next_offset

    # What must be

    def committed(self, partition: int, messages: list[tuple[str, int, bytes | None, bytes | None]]) -> None:
        """A transaction went through: it must be the next commit, whole and exact."""
        for topic, at, key, value in messages:
            self._hash(topic.encode(), key, value)
            if at != partition or key is None:
                raise Failure(f"partition {partition} wrote to {topic}-{at}, key {key!r}")
        check(messages[-1][:3] == ("changelog", partition, POSITION), "the position is not the last of its commit")
        count, state = self._committed[partition], self.states[partition]
        before = count.next_offset
        entries = {key: value for topic, _, key, value in messages if topic == "changelog" and key is not None}
        check(len(entries) == sum(m[0] == "changelog" for m in messages), "a key stands twice in one commit")
        for key, value in entries.items():
            if value is None:
                check(key[:1] == PRODUCER, "a commit deletes an entry that is for ever")
                state.pop(key, None)
            else:
                state[key] = value
        position = unpack(state[POSITION])
        check(position[0] >= before, f"the position fell from {before} to {position[0]}")
        check(position[0] <= len(self.rows[partition]), f"position {position[0]} is beyond the log")
        self._advance(count, position[0])
        check(position[2] == count.source_at_ms, f"source_at_ms {position[2]}, not {count.source_at_ms}")
        self._check_letters(partition, before, messages)
        fresh = {
            series
            for row, verdict in zip(self.rows[partition][before:], count.verdicts[before:], strict=False)
            if verdict == "folded" and row.sent is not None
            for series, _ in row.sent.deltas
        }
        for series in fresh | {series_of(key) for key in entries if key[:1] == SERIES}:
            self._check_series(count, state, series)
        self._check_producers(count, state)
        self._check_views(count, state)
        self.boundaries[partition][position[0]] = dict(state)

    def check_counts(self, partition: int, start_offset: int, next_offset: int, counts: Any) -> None:
        """What a task has counted since it started at `start_offset`."""
        ahead = self._ahead[partition]
        self._advance(ahead, next_offset)
        verdicts = ahead.verdicts[start_offset:next_offset]
        seen = Counter(verdicts)
        expected = (seen["folded"], seen["duplicate"], seen["stale"], seen["bad"] + seen["stale"])
        got = (counts.batches_folded, counts.batches_duplicate, counts.batches_stale, counts.records_bad)
        check(got == expected, f"partition {partition}: (folded, duplicate, stale, bad) is {got}, not {expected}")

    def check_entries(self, partition: int, entries: Entries) -> None:
        """A store's entries, without what it says of itself, at the end of its changelog."""
        compare(f"partition {partition}: store", entries, self.states[partition])
        count = self._committed[partition]
        for series in count.deltas.keys() | {series_of(key) for key in entries if key[:1] == SERIES}:
            self._check_series(count, entries, series)
        self._check_producers(count, entries)
        self._check_views(count, entries)
        known = (POSITION, DEFINITION, SERIES, PRODUCER)
        check(all(key[:1] in known for key in entries), "an entry of no known kind")

    def check_drained(self, partition: int, letters: list[bytes | None]) -> None:
        """The whole log is folded: nothing is missing, and every bad record is a dead letter, once."""
        count = self._committed[partition]
        check(count.next_offset == len(self.rows[partition]), f"partition {partition} is not drained")
        bad = [b"%d-%d" % (partition, o) for o, verdict in enumerate(count.verdicts) if verdict in ("bad", "stale")]
        check(letters == bad, f"partition {partition}: dead letters {letters}, not {bad}")
        doubtful = {
            row.sent.identity
            for row, verdict in zip(self.rows[partition], count.verdicts, strict=True)
            if row.sent and verdict in ("bad", "stale", "lost")
        }
        for sent in self._acknowledged:
            if sent.partition == partition and sent.identity not in doubtful:
                producer = count.producers.get(sent.producer_id)
                if producer is None or sent.sequence not in producer.accepted:
                    raise Failure(f"acknowledged but not in: {sent}")

    def verdict(self, partition: int, offset: int) -> str:
        """What became of a record below the position."""
        return self._committed[partition].verdicts[offset]

    # How

    def _hash(self, *parts: bytes | None) -> None:
        for part in parts:
            self.digest = crc32(part or b"-", self.digest)

    def _advance(self, count: Count, next_offset: int) -> None:
        rows, lost = self.rows[count.partition], self._lost[count.partition]
        while count.next_offset < next_offset:
            offset = count.next_offset
            row = rows[offset]
            verdict = count.take(row, lost=offset in lost)
            if verdict == "duplicate" and row.sent and not count.had_loss:
                known = row.sent.sequence in count.producers[row.sent.producer_id].accepted
                if not known and all(r.sent is None or r.sent.identity != row.sent.identity for r in rows[:offset]):
                    raise Failure(f"a floor above a batch that was still to come: {row.sent}")

    def _check_letters(self, partition: int, before: int, messages: list[tuple[str, int, bytes | None, Any]]) -> None:
        count = self._committed[partition]
        letters = [(key, msgspec.msgpack.decode(value)) for topic, _, key, value in messages if topic == "dead-letters"]
        offsets = [o for o in range(before, count.next_offset) if count.verdicts[o] in ("bad", "stale")]
        got = [letter["offset"] for _, letter in letters]
        check(got == offsets, f"partition {partition}: dead letters for {got}, not for {offsets}")
        for key, letter in letters:
            row = self.rows[partition][letter["offset"]]
            check(key == b"%d-%d" % (partition, letter["offset"]), f"a dead letter with the key {key!r}")
            kept = letter["partition"], letter["value"], letter["at_ms"]
            if kept != (partition, row.value, row.at_ms) or not letter["reason"]:
                raise Failure(f"dead letter {letter} is not the record {row}")

    def _check_series(self, count: Count, entries: Entries, series: Series) -> None:
        deltas = count.deltas.get(series)
        value = entries.get(key_of(series))
        if deltas is None or value is None:
            raise Failure(f"partition {count.partition}: {series} has deltas {deltas}, and the entry {value!r}")
        expected, found = naive(count.views[series[0]].kind, deltas), unpack(value)
        same_types = expected[0] in ("min", "max") or [*map(type, found)] == [*map(type, expected)]
        if found != expected or not same_types:  # 1 and 1.0 and True are one to Python; only min and max may mix them up
            raise Failure(f"partition {count.partition}: {series} is {found}, not {expected}")

    def _check_producers(self, count: Count, entries: Entries) -> None:
        stored = {key[1:].decode(): unpack(value) for key, value in entries.items() if key[:1] == PRODUCER}
        for producer_id, producer in count.producers.items():
            found = stored.pop(producer_id, None)
            if found is None:
                silent_ms = count.source_at_ms - producer.seen_at_ms
                check(silent_ms > self._ttl_ms, f"producer {producer_id} was forgotten after {silent_ms} ms")
            else:
                expected = producer.as_stored()
                if found != expected:
                    raise Failure(f"partition {count.partition}: producer {producer_id} is {found}, not {expected}")
        check(not stored, f"producers that folded nothing: {stored}")

    def check_forgotten(self, partition: int, producer_ids: list[str]) -> None:
        """None of these producers, all silent for too long, is remembered."""
        for producer_id in producer_ids:
            check(PRODUCER + producer_id.encode() not in self.states[partition], f"{producer_id} was not forgotten")

    def expired(self, partition: int) -> list[str]:
        """Producers that were silent for too long at the time of the last commit's newest record."""
        count = self._committed[partition]
        return [k for k, p in count.producers.items() if p.seen_at_ms + self._ttl_ms < count.source_at_ms]

    def _check_views(self, count: Count, entries: Entries) -> None:
        counts = Counter(view for view, _ in count.deltas)
        expected = {DEFINITION + v.name.encode(): [v.as_stored(), counts[v.name]] for v in count.views.values()}
        found = {key: unpack(value) for key, value in entries.items() if key[:1] == DEFINITION}
        if found != expected:
            raise Failure(f"partition {count.partition}: definitions {found}, not {expected}")


def check(condition: bool, message: str) -> None:
    """Like assert, but there when Python optimises."""
    if not condition:
        raise Failure(message)


def compare(what: str, got: Entries, expected: Entries) -> None:
    """Raise `Failure` with the keys that differ."""
    if got != expected:
        keys = sorted(k for k in got.keys() | expected.keys() if got.get(k) != expected.get(k))
        raise Failure(f"{what}: " + "; ".join(f"{k!r} is {got.get(k)!r}, not {expected.get(k)!r}" for k in keys[:5]))


def unpack(value: bytes) -> list[Any]:
    """An entry's value, without its version; ints that travelled as bytes are ints again."""
    check(value[:1] == b"\x01", "an entry of another version")
    found = msgspec.msgpack.decode(value[1:])
    return [int.from_bytes(x.data, "big", signed=True) if isinstance(x, msgspec.msgpack.Ext) else x for x in found]


def key_of(series: Series) -> bytes:
    """The key of a series' entry."""
    return SERIES + series[0].encode() + bytes(9) + msgspec.msgpack.encode(series[1])


def series_of(key: bytes) -> Series:
    """The inverse of `key_of`."""
    name, rest = key[1:].split(b"\x00", 1)
    return name.decode(), tuple(msgspec.msgpack.decode(rest[8:]))


def naive(kind: str, deltas: list[Any]) -> list[Any]:
    """What the entry of a series with these deltas says."""
    if kind == "sum":
        return [kind, 0, sum(deltas)]
    if kind == "min":
        return [kind, 0, sorted(deltas)[0]]
    if kind == "max":
        return [kind, 0, sorted(deltas)[-1]]
    if kind == "mean":
        return [kind, 0, sum(deltas), len(deltas)]
    newest = max(ts_ms for ts_ms, _ in deltas)
    return [kind, 0, newest, max((value for ts_ms, value in deltas if ts_ms == newest), key=encoding)]


def encoding(value: Any) -> bytes:
    """What decides between two values of one time."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    return msgspec.msgpack.encode(value)
