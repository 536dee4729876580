"""Lists and replays the topic of dead letters.

A letter exists while the newest record of its key has a value; a tombstone means that it was folded. Each partition is read
once, up to the end that it had at the start. Values are not kept: memory holds a few hundred bytes for each of up to
`KEPT_MAX` letters of a partition, and less for each letter beyond.

When a task folds a replayed letter, the same commit writes to this topic: a tombstone, or, if the letter was refused again,
the letter with the offset of the record that replayed it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from sys import intern
from typing import Literal, NamedTuple

import msgspec

from pipeline.core.codec import DeadLetter, decode_letter
from pipeline.core.grants import Bounds
from pipeline.core.letters import held, partition_of_key, replaying
from pipeline.errors import BadRecord, Invalid, NewerFormat, NotFound, PipelineError, RecordsLost, Unavailable
from pipeline.ports import Clock, Log, LogReader, Message
from pipeline.topics import DEAD_LETTERS, DELTAS

KEPT_MAX = 100_000
"""Letters of a partition, the oldest first, of which a listing keeps more than key and size."""
CHUNK_COUNT_MAX = 1_000
CHUNK_BYTES_MAX = 16 * 2**20
"""Letters and bytes that are appended, and waited for, at once. A single letter can be larger."""
_POLL_COUNT_MAX = 1_000
_POLL_BYTES_MAX = 4 * 2**20
_POLL_S = 0.2
_SILENT_S = 30.0
"""Longest time that the log may return no record although there are more."""

_PLACE = re.compile(r"\d{1,9}-\d{1,18}-\d{1,18}\Z", re.ASCII)
Result = Literal["counted", "counted before", "counted in part", "refused again", "not replayed", "unknown", "replayable"]


class LetterCursor(NamedTuple):
    """A cursor in the topic of dead letters, for a replay in several calls."""

    partition: int
    letter_offset: int
    """Offset of the last letter that is done."""
    end_offset: int
    """End of the partition at the first call: later letters come from the replay itself."""

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> LetterCursor:
        """Return the place whose `str` is `text`; `Invalid` if there is none."""
        if not _PLACE.match(text):
            raise Invalid(f"not a place among dead letters: {text[:60]!r}; it looks like 0-17-42")
        return cls(*map(int, text.split("-")))


class LetterFilter(msgspec.Struct, frozen=True):
    """A filter of letters: all conditions must hold."""

    keys: frozenset[str] = frozenset()
    """Only letters with these keys; empty: with any."""
    view: str = ""
    reason: str = ""
    """Text that the reason contains."""
    partition: int | None = None
    since_ms: int = 0
    """Only letters whose record the log accepted at this time or later."""
    after: LetterCursor | None = None
    """Only letters after this place, where the previous call ended."""
    bounds: Bounds | None = None
    """Only letters of single groups whose views are within the bounds of an access token; a whole record has any views."""

    def matches(self, key: str, letter: DeadLetter) -> bool:
        """Return whether a letter passes."""
        return (
            (not self.keys or key in self.keys)
            and self.view in ("", letter.view)
            and self.reason in letter.reason
            and letter.at_ms >= self.since_ms
            and (self.bounds is None or (letter.view != "" and self.bounds.has_view(letter.view)))
        )

    def partitions(self, partition_count: int) -> list[int]:
        """Return the partitions that can hold such letters."""
        if self.partition is not None and self.partition >= partition_count:
            raise Invalid(f"there is no partition {self.partition} of dead letters, of {partition_count}")
        numbers = range(partition_count) if self.partition is None else (self.partition,)
        of_keys = {partition_of_key(key) for key in self.keys}
        first = 0 if self.after is None else self.after.partition
        return [number for number in numbers if number >= first and (not self.keys or number in of_keys)]


class LetterLine(msgspec.Struct, frozen=True, gc=False):
    """A letter in a listing."""

    key: str
    partition: int
    offset: int
    """Offset of the refused record in the topic of deltas."""
    at_ms: int
    """Time at which the log accepted that record."""
    reason: str
    view: str
    """View of the refused group; empty: the whole record was refused."""
    producer: str
    """Fingerprint of the producer; empty: the bytes are no batch."""
    size_bytes: int
    series_count: int
    letter_offset: int
    """Offset of the letter in the topic of dead letters."""


class Listing(msgspec.Struct, frozen=True):
    """Letters, by partition, the oldest first."""

    letters: list[LetterLine]
    letter_count: int
    """Count of all letters that pass the filter, listed or not."""
    bytes_total: int
    foreign_count: int
    """Records that no task wrote."""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of replaying one letter."""

    key: str
    result: Result
    reason: str = ""


class Replayed(msgspec.Struct, frozen=True):
    """Results of one call of `replay`."""

    outcomes: list[Outcome]
    after: LetterCursor | None = None
    """Cursor at which the next call continues; None: no letters are left, or the time is over."""


_Record = tuple[int, str | None, bytes | None]


class _PartitionLetters(msgspec.Struct):
    """Letters of one partition that pass a filter."""

    start_offset: int
    end_offset: int
    until_offset: int
    """Letters from this offset on are ignored, apart from what they say of earlier ones."""
    kept: dict[str, LetterLine] = {}
    beyond: dict[str, int] = {}
    """Sizes of further letters, by key."""
    settled: set[str] = set()
    """Keys of the filter that have a tombstone."""
    foreign_count: int = 0


class DeadLetters:
    """The dead letters of a log. Safe from any thread: each call has cursors of its own, and blocks."""

    def __init__(self, log: Log, clock: Clock, *, kept_max: int = KEPT_MAX) -> None:
        self._log = log
        self._clock = clock
        self._kept_max = kept_max

    def listing(self, only: LetterFilter, limit: int) -> Listing:
        """Return up to `limit` of the letters that are there, and how many there are."""
        lines: list[LetterLine] = []
        count = size = foreign = 0
        for number in only.partitions(self._log.partition_count(DEAD_LETTERS)):
            found = self._find(number, only)
            lines += islice(found.kept.values(), limit - len(lines))
            count += len(found.kept) + len(found.beyond)
            size += sum([line.size_bytes for line in found.kept.values()]) + sum(found.beyond.values())
            foreign += found.foreign_count
        return Listing(lines, count, size, foreign)

    def get(self, key: str) -> bytes:
        """Return the value of a letter; `NotFound` if there is none, `Invalid` if no letter has such a key."""
        partition = partition_of_key(key)
        if partition is None:
            raise Invalid(f"not the key of a dead letter: {key[:100]!r}; it looks like 1f2e3d4c.0-17-2")
        value, settled = None, False
        if partition < self._log.partition_count(DEAD_LETTERS):
            end_offset = self._end_of(partition)
            for _, record_key, record_value in self._records(partition, 0, end_offset):
                if record_key == key and (record_value is None or _decoded(partition, record_value) is not None):
                    value, settled = record_value, record_value is None
        if value is None:
            raise NotFound(
                f"dead letter {key} was replayed, and is counted" if settled else f"there is no dead letter {key}"
            )
        return value

    def replay(
        self, only: LetterFilter, *, limit: int, timeout_s: float, dry_run: bool = False, forgotten: bool = False
    ) -> Replayed:
        """Replay up to `limit` letters, and wait up to `timeout_s` until a task has folded them. Each counts once.

        With `dry_run` nothing is appended. For `forgotten` see `core.letters.replaying`.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        outcomes: list[Outcome] = []
        missing, left = set(only.keys), max(limit, len(only.keys))
        for number in only.partitions(self._log.partition_count(DEAD_LETTERS)):
            found = self._find(number, only)
            missing -= found.kept.keys() | found.beyond.keys() | found.settled
            outcomes += [Outcome(key, "counted before") for key in sorted(found.settled)]
            lines = [*islice(found.kept.values(), left)]
            left -= len(lines)
            if lines:
                run = _Replay(self._log, self._clock, number, found, deadline_s, dry_run=dry_run, forgotten=forgotten)
                outcomes += run.replay(lines, self._records(number, lines[0].letter_offset, found.end_offset))
            if any(outcome.result == "unknown" for outcome in outcomes):
                return Replayed(outcomes)
            if len(lines) < len(found.kept) + len(found.beyond):
                done = lines[-1].letter_offset if lines else found.start_offset - 1
                return Replayed(outcomes, LetterCursor(number, done, found.until_offset))
        outcomes += [Outcome(key, "not replayed", "there is no such letter") for key in sorted(missing)]
        return Replayed(outcomes)

    def _find(self, number: int, only: LetterFilter) -> _PartitionLetters:
        end = self._end_of(number)
        found = _PartitionLetters(0, end, end)
        if only.after is not None and only.after.partition == number:
            found = _PartitionLetters(only.after.letter_offset + 1, end, only.after.end_offset)
        for offset, key, value in self._records(number, found.start_offset, end):
            if key is None:
                found.foreign_count += 1
            elif value is None:
                found.kept.pop(key, None)
                found.beyond.pop(key, None)
                if key in only.keys:
                    found.settled.add(key)
            else:
                self._note(number, found, only, offset, key, value)
        return found

    def _note(self, number: int, found: _PartitionLetters, only: LetterFilter, offset: int, key: str, value: bytes) -> None:
        letter = _decoded(number, value)
        if letter is None:
            found.foreign_count += 1
            return
        found.kept.pop(key, None)
        found.beyond.pop(key, None)
        found.settled.discard(key)
        if offset >= found.until_offset or not only.matches(key, letter):
            return
        size = len(letter.value or b"")
        if len(found.kept) >= self._kept_max:
            found.beyond[key] = size
            return
        what = held(letter.value)
        producer, count = ("", 0) if what is None else (intern(what.producer), what.series_count)
        at = letter.partition, letter.offset, letter.at_ms
        found.kept[key] = LetterLine(key, *at, intern(letter.reason), intern(letter.view), producer, size, count, offset)

    def _end_of(self, number: int) -> int:
        return self._log.watermarks(DEAD_LETTERS, number).end_offset

    def _records(self, number: int, start: int, end: int) -> Iterator[_Record]:
        """Yield offset, key and value of the records between two offsets. The key is None if it is no key of a letter.

        Records that retention deletes meanwhile are skipped: in this topic that is no loss.
        """
        reader = self._log.reader(DEAD_LETTERS)
        try:
            next_offset = max(start, self._log.watermarks(DEAD_LETTERS, number).start_offset)
            if next_offset >= end:
                return
            reader.assign({number: next_offset})
            heard_s = self._clock.monotonic_s()
            while next_offset < end:
                try:
                    polled = reader.poll(record_count_max=_POLL_COUNT_MAX, bytes_max=_POLL_BYTES_MAX, timeout_s=_POLL_S)
                except RecordsLost:
                    next_offset = max(next_offset, self._log.watermarks(DEAD_LETTERS, number).start_offset)
                    reader.assign({number: next_offset})
                    polled = []
                for records in polled:
                    heard_s = self._clock.monotonic_s()
                    for offset, key, value in zip(records.offsets, records.keys, records.values, strict=True):
                        if start <= offset < end:
                            yield offset, _key(number, key), value
                    next_offset = records.next_offset
                if self._clock.monotonic_s() - heard_s > _SILENT_S:
                    raise Unavailable(f"{DEAD_LETTERS}-{number}: nothing comes from {next_offset} on, of {end}")
        finally:
            reader.close()


class _Replay:
    """The replay of letters of one partition."""

    def __init__(
        self,
        log: Log,
        clock: Clock,
        number: int,
        found: _PartitionLetters,
        deadline_s: float,
        *,
        dry_run: bool,
        forgotten: bool,
    ) -> None:
        self._log = log
        self._clock = clock
        self._number = number
        self._deadline_s = deadline_s
        self._dry_run = dry_run
        self._forgotten = forgotten
        self._next_offset = found.end_offset
        self._keys: Collection[str] = found.kept.keys()
        self._reader: LogReader | None = None
        self._said: dict[str, DeadLetter | None] = {}
        """Newest letter of each key since the listing; None: a tombstone."""
        self._groups: dict[str, list[DeadLetter]] = {}
        """Letters of single groups since the listing, by the key of the letter that contained the group."""

    def replay(self, lines: Sequence[LetterLine], records: Iterator[_Record]) -> list[Outcome]:
        """Replay the letters of these lines, whose values are in `records`."""
        try:
            return [*self._replay(lines, records)]
        finally:
            if self._reader is not None:
                self._reader.close()

    def _replay(self, lines: Sequence[LetterLine], records: Iterator[_Record]) -> Iterator[Outcome]:
        partition_count = self._log.partition_count(DELTAS)
        if self._number >= partition_count:
            why = f"the topic of deltas has {partition_count} partitions, and no partition {self._number}"
            yield from [Outcome(line.key, "not replayed", why) for line in lines]
            return
        wanted = {line.letter_offset: line.key for line in lines}
        chunk: list[tuple[str, bytes]] = []
        size = 0
        for offset, key, value in records:
            if wanted.get(offset) != key or key is None or value is None:
                continue
            del wanted[offset]
            try:
                batch = replaying(key.encode(), decode_letter(value), forgotten=self._forgotten)
            except BadRecord as error:
                yield Outcome(key, "not replayed", str(error))
                continue
            chunk.append((key, batch))
            size += len(batch)
            if len(chunk) >= CHUNK_COUNT_MAX or size >= CHUNK_BYTES_MAX:
                yield from self._send(chunk)
                chunk, size = [], 0
            if not wanted:
                break
        if chunk:
            yield from self._send(chunk)
        for key in wanted.values():
            yield Outcome(key, "not replayed", "it is not there any more")

    def _send(self, chunk: Sequence[tuple[str, bytes]]) -> Iterator[Outcome]:
        if self._dry_run:
            yield from [Outcome(key, "replayable") for key, _ in chunk]
            return
        if self._clock.monotonic_s() >= self._deadline_s:
            yield from [Outcome(key, "unknown", "there was no time for it: it was not sent") for key, _ in chunk]
            return
        self._catch_up()  # another process may have replayed some meanwhile
        sent: list[tuple[str, bytes]] = []
        for key, batch in chunk:
            if key in self._said and self._said[key] is None:
                yield Outcome(key, "counted before", "somebody else has replayed it meanwhile")
            else:
                sent.append((key, batch))
        messages = [Message(DELTAS, self._number, None, batch) for _, batch in sent]
        timeout_s = max(1.0, self._deadline_s - self._clock.monotonic_s())
        results = self._log.append(messages, timeout_s=timeout_s) if messages else []
        pending: dict[str, int | PipelineError] = {}
        for (key, _), result in zip(sent, results, strict=True):
            if isinstance(result, Invalid):
                yield Outcome(key, "not replayed", str(result))
            else:
                pending[key] = result
        yield from self._wait(pending)

    def _wait(self, pending: dict[str, int | PipelineError]) -> Iterator[Outcome]:
        """Yield results of appended letters; `pending` has the `next_offset` of each, or the error of an unsure append."""
        while pending:
            for key in [*pending]:
                outcome = self._outcome(key, pending[key])
                if outcome is not None:
                    del pending[key]
                    yield outcome
            if not pending:
                return
            left_s = self._deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            self._poll(min(left_s, _POLL_S))
            self._catch_up()  # up to the end of the commit: one letter can have several records in it
        for key, result in pending.items():
            why = f"not acknowledged: {result}" if isinstance(result, PipelineError) else "no worker has folded it yet"
            yield Outcome(key, "unknown", f"{why}; if it is in the log, it counts once when it is folded")

    def _outcome(self, key: str, result: int | PipelineError) -> Outcome | None:
        if key not in self._said:
            return None
        letter = self._said[key]
        if letter is not None:
            if isinstance(result, int) and letter.offset < result - 1:
                return None  # refused in an earlier attempt of another process
            return Outcome(key, "refused again", letter.reason)
        groups = self._groups.get(key, [])
        if groups:
            return Outcome(key, "counted in part", f"{len(groups)} groups are letters of their own: {groups[0].reason}")
        return Outcome(key, "counted")

    def _catch_up(self) -> None:
        end = self._log.watermarks(DEAD_LETTERS, self._number).end_offset
        heard_s = self._clock.monotonic_s()
        while self._next_offset < end:
            if self._poll(_POLL_S):
                heard_s = self._clock.monotonic_s()
            elif self._clock.monotonic_s() - heard_s > _SILENT_S:
                raise Unavailable(f"{DEAD_LETTERS}-{self._number}: nothing comes from {self._next_offset} on, of {end}")

    def _poll(self, timeout_s: float) -> bool:
        """Note records that tasks have written since; return whether there were any."""
        if self._reader is None:
            self._reader = self._log.reader(DEAD_LETTERS)
            self._reader.assign({self._number: self._next_offset})
        try:
            polled = self._reader.poll(record_count_max=_POLL_COUNT_MAX, bytes_max=_POLL_BYTES_MAX, timeout_s=timeout_s)
        except RecordsLost as error:  # the replay paused for longer than retention keeps letters
            raise Unavailable(f"{error}; list them anew") from None
        for records in polled:
            for record_key, value in zip(records.keys, records.values, strict=True):
                key = _key(self._number, record_key)
                letter = None if value is None else _decoded(self._number, value)
                if key is None or (value is not None and letter is None):
                    continue
                said = None if letter is None else msgspec.structs.replace(letter, value=None)
                record = key.rpartition("-")[0]
                if key in self._keys:
                    self._said[key] = said
                elif said is not None and record in self._keys:
                    self._groups.setdefault(record, []).append(said)
            self._next_offset = records.next_offset
        return bool(polled)


def _key(partition: int, key: bytes | None) -> str | None:
    """Return the key of a record as text; None if it is no key of a letter of this partition."""
    text = (key or b"").decode("ascii", "replace")
    return text if partition_of_key(text) == partition else None


def _decoded(partition: int, value: bytes) -> DeadLetter | None:
    """Return the letter; None if it was not written by a task of this version."""
    try:
        letter = decode_letter(value)
    except (BadRecord, NewerFormat):
        return None
    return letter if letter.partition == partition else None
