"""The file of a slot that is appended to: found and repaired, written, and written anew once it is mostly dead."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from pipeline.core.sequence import Sealed
from pipeline.errors import Invalid, Unavailable
from pipeline.producer.sealing import Merged
from pipeline.producer.spool import ledger as records
from pipeline.producer.spool.frames import HEAD, Tail, frame, scan
from pipeline.producer.spool.ledger import Commit, Define, Header, Ledger, Where, commit_of, encode_commit
from pipeline.producer.spool.ring import Cursor
from pipeline.producer.spool.slot import CORRUPT, explained, sync_folder

REWRITE_BYTES_MIN = 4 * 2**20
REWRITE_RATIO = 4
_WRITE_BYTES = 2**20
_OWNER = re.compile(r"owner=(\d+) count=(\d+)")
_DEPTH = 3
"""How often a thread that was not interrupted holds the lock when the journal is written anew, at most."""


class Found(NamedTuple):
    """What a slot's journals say, and how they end."""

    number: int
    """Of the newest complete one; -1: none is."""
    ledger: Ledger
    tail: Tail
    fd: int


def journal_path(folder: Path, number: int) -> Path:
    """Where a generation of the journal is."""
    return folder / f"log-{number:08d}"


def journal_numbers(folder: Path) -> list[int]:
    """The generations that are there, newest first; more than one after a crash in the wrong moment."""
    numbers = [path.name.removeprefix("log-") for path in folder.glob("log-*")]
    return sorted([int(number) for number in numbers if number.isdecimal()], reverse=True)


def find(folder: Path) -> Found:
    """Read the newest complete journal of a slot, and change nothing. The caller closes `fd`."""
    corrupt = ""
    for number in journal_numbers(folder):
        fd = os.open(journal_path(folder, number), os.O_RDWR | os.O_CLOEXEC)
        try:
            ledger = Ledger()
            tail = scan(fd, ledger.apply)
        except BaseException:
            os.close(fd)
            raise
        if ledger.complete:
            return Found(number, ledger, tail, fd)
        os.close(fd)
        corrupt = corrupt or tail.corrupt or f"log-{number:08d} ends after {tail.end} bytes, within its first records"
    return Found(-1, Ledger(), Tail(0, 0, corrupt), -1)


class Journal:
    """The journal of a slot that this process has locked. Safe from any thread; `lock` is the spool's.

    A write that fails leaves the file as it was, and can be tried again.
    """

    def __init__(self, folder: Path, number: int, fd: int, ledger: Ledger, end: int, *, fsync: bool) -> None:
        self.lock = threading.RLock()
        self.ledger = ledger
        self.end = end
        """Where the next record will stand: the size of the file."""
        self.drained_end = 0
        """States that stand before this place are in somebody's hands, to be in the next commit."""
        self.rewrite_bytes_min = REWRITE_BYTES_MIN
        self._folder = folder
        self._number = number
        self._fd = fd
        self._fsync = fsync
        self._rewriting = False
        self._begun: tuple[int, bytes] | None = None
        """A record that is being appended, and its place, or one that was."""

    @staticmethod
    def create(folder: Path, header: Header, *, fsync: bool) -> Journal:
        """The first journal of a slot, or the next one after one that is corrupt."""
        number = header.generation
        with explained("making a journal"):
            fd = os.open(journal_path(folder, number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        journal = Journal(folder, number, fd, Ledger(), 0, fsync=fsync)
        try:
            journal.append(records.HEADER, records.encode(header))
            journal.ledger.apply(records.HEADER, HEAD.size, records.encode(header))
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def held_count(self) -> int:
        """How often this thread holds the lock."""
        found = _OWNER.search(repr(self.lock))  # the only way to look at it
        return int(found[2]) if found and int(found[1]) == threading.get_ident() else 0

    # Writing

    def append(self, kind: int, payload: bytes) -> int:
        """Write a record at the end; where its payload stands. It survives kill -9 of this process from then on."""
        with self.lock:
            if self._fd < 0:
                raise Invalid("the spool is closed")
            if self._rewriting:  # a finaliser, in the midst of it
                raise Unavailable("the spool's journal is just being rewritten by this thread")
            # A signal handler or finaliser can come in anywhere, and append too. It first ends what it has interrupted, so
            # that nothing is written over what it appends: writing the same bytes once more changes nothing.
            begun = self._begun
            if begun is not None and begun[0] == self.end:
                end = begun[0] + len(begun[1])
                self._write(begun[1], begun[0])
                if self.end == begun[0]:
                    self.end = end
            while True:
                place = self.end
                data = frame(kind, payload, place)
                end = place + len(data)
                self._begun = place, data
                if self.end == place:
                    break
            self._write(data, place)
            if self.end == place:  # no call from here on
                self.end = end
            return place + HEAD.size

    def _write(self, data: bytes, place: int) -> None:
        try:
            _write_all(self._fd, data, place)
        except OSError as error:
            self._begun = None
            with suppress(OSError):  # what stays behind is no record, and the next one overwrites it
                os.ftruncate(self._fd, self.end)
            raise Unavailable(f"the spool can't be written: {error}") from error

    def sync(self) -> None:
        """Make everything written so far durable."""
        with self.lock:
            if self._fd < 0:
                return
            fd = os.dup(self._fd)
        try:
            with explained("syncing the journal"):
                os.fsync(fd)
        finally:
            os.close(fd)

    def commit(self, cursor: Cursor, batches: Sequence[Sealed], pending: Sequence[Merged], *, room: int) -> None:
        """Write a commit of what was read up to `cursor` and `drained_end`; `Unavailable` if it takes more than `room`."""
        next_sequences = {sealed.partition: sealed.sequence + 1 for sealed in batches}
        heads, pending_blobs = records.encode_pending(pending)
        blobs = [*[sealed.value for sealed in batches], *pending_blobs]
        with self.lock:
            commit = commit_of(cursor, self.drained_end, next_sequences, batches, heads)
            payload = encode_commit(commit, blobs)
            if len(payload) > room and self.dead_bytes > len(payload):
                room += self.rewrite()
                commit = msgspec.structs.replace(commit, states_end=self.drained_end)
                payload = encode_commit(commit, blobs)
            if len(payload) > room:
                raise Unavailable(f"the spool has no room for a commit of {len(payload)} bytes; {max(0, room)} are free")
            start = self.append(records.COMMIT, payload)
            self.ledger.committed(commit, start + len(payload) - sum(map(len, blobs)))
        if self._fsync:
            self.sync()

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Write that these batches need never be sent again."""
        with self.lock:
            known = [key for key in batches if key in self.ledger.batches]
            if known:
                self.append(records.ACK, records.encode(known))
                self.ledger.acknowledge(known)

    def load(self, partition: int, sequence: int) -> bytes:
        """The bytes of a committed batch that is not acknowledged."""
        with self.lock:
            waiting = self.ledger.batches.get((partition, sequence))
            if waiting is None:
                raise Invalid(f"the spool has no batch {sequence} for partition {partition}")
            return self.read(waiting.where)

    def read(self, where: Where) -> bytes:
        """A part of the file."""
        with self.lock, explained("reading the journal"):
            data = os.pread(self._fd, where.size, where.place)
        if len(data) != where.size:
            raise Unavailable(f"the spool's journal has lost {where.size - len(data)} bytes at {where.place}")
        return data

    # Writing anew

    @property
    def dead_bytes(self) -> int:
        """What `rewrite` would give back, about."""
        return self.end - self.ledger.live_bytes

    def tidy(self, *, pressed: bool = False) -> None:
        """Write the journal anew if most of it is dead; if `pressed`, half. Failing to do so costs nothing but room."""
        with self.lock:
            mostly = self.end > self.rewrite_bytes_min and self.end > REWRITE_RATIO * self.ledger.live_bytes
            if mostly or (pressed and self.dead_bytes > self.end // 2):
                with suppress(Unavailable):
                    self.rewrite()

    def rewrite(self) -> int:
        """Begin the next generation of the journal with what is alive; how many bytes that gives back."""
        with self.lock:
            if self._rewriting or self._fd < 0 or self._is_interrupted():
                return 0
            self._rewriting = True
            try:
                return self._rewrite()
            except OSError as error:
                raise Unavailable(f"the spool's journal can't be rewritten: {error}") from error
            finally:
                self._rewriting = False

    def _is_interrupted(self) -> bool:
        """Whether a signal handler has come in between a record and the ledger's knowing of it."""
        return self.held_count > _DEPTH

    def _rewrite(self) -> int:
        number = self._number + 1
        new = self._folder / f"new-{number:08d}"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            copy = _Copy(fd, number, self)
            end, ledger = copy.write()
            if self._fsync:
                os.fsync(fd)
            new.rename(journal_path(self._folder, number))
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            journal_path(self._folder, number).unlink(missing_ok=True)  # a handler raised just behind the renaming
            raise
        back = self.end - end
        old_fd, old_number = self._fd, self._number
        self._fd, self._number, self.ledger, self.end, self.drained_end = fd, number, ledger, end, copy.drained_end
        self._begun = None
        with suppress(OSError):
            if self._fsync:
                sync_folder(self._folder)
            os.close(old_fd)
            journal_path(self._folder, old_number).unlink(missing_ok=True)
        return back

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Copy:
    """What is alive in a journal, as a new one."""

    def __init__(self, fd: int, number: int, journal: Journal) -> None:
        self._fd = fd
        self._number = number
        self._journal = journal
        self._place = 0
        self._waiting = bytearray()
        self._flushed = 0
        self.drained_end = 0

    def write(self) -> tuple[int, Ledger]:
        """Write all of it; how long it is, and what it says."""
        old, new = self._journal.ledger, Ledger()
        assert old.header is not None
        batches = [*old.batches.items()]
        count = len(old.series) + len(batches) + 1 + len(old.states)
        header = msgspec.structs.replace(old.header, generation=self._number, epoch=old.epoch, snapshot_count=count)
        payload = records.encode(header)
        new.apply(records.HEADER, self._put(records.HEADER, payload), payload)
        for series_id, (definition, suffix) in [*old.series.items()]:
            define = Define(series_id, definition, suffix)
            self._put(records.DEFINE, records.encode(define))
            new.add_series(define)
        for (partition, sequence), waiting in batches:
            value = self._journal.read(waiting.where)
            self._commit(new, [Sealed(partition, sequence, value, waiting.entry_count)], {})
        self._commit(new, [], dict(old.next_sequences), old)
        for where in old.states:
            payload = self._journal.read(where)
            start = self._put(records.STATE, payload)
            new.add_state(start, where.size)
            if where.place < self._journal.drained_end:
                self.drained_end = self._place
        new.record_count = count + 1
        self._flush()
        return self._place, new

    def _commit(self, new: Ledger, batches: list[Sealed], next_sequences: dict[int, int], old: Ledger | None = None) -> None:
        cursor = old.cursor if old else ()
        pending = [(item.where.size, item.delta_counts) for item in old.pending] if old else []
        commit: Commit = commit_of(cursor, 0, next_sequences, batches, pending)
        blobs = [sealed.value for sealed in batches]
        blobs += [self._journal.read(item.where) for item in old.pending] if old else []
        payload = encode_commit(commit, blobs)
        start = self._put(records.COMMIT, payload)
        new.committed(commit, start + len(payload) - sum(map(len, blobs)))

    def _put(self, kind: int, payload: bytes) -> int:
        data = frame(kind, payload, self._place)
        self._waiting += data
        self._place += len(data)
        if len(self._waiting) > _WRITE_BYTES:
            self._flush()
        return self._place - len(payload)

    def _flush(self) -> None:
        _write_all(self._fd, self._waiting, self._flushed)
        self._flushed = self._place
        self._waiting.clear()


def _write_all(fd: int, data: bytes | bytearray, place: int) -> None:
    done = os.pwrite(fd, data, place)
    while done < len(data):
        done += os.pwrite(fd, data[done:], place + done)


def recover(folder: Path, producer_id: str, *, fsync: bool) -> tuple[Journal, Tail]:
    """The journal that a process has left, fit to be appended to, and how it ended. The caller has locked the slot.

    A torn tail is cut off. A corrupt journal is kept as it is for a human; the next one begins with the batches that were
    whole, and without the deltas of which nobody can say any more whether they were in a batch.
    """
    with explained(f"reading {folder}"):
        found = find(folder)
        numbers = journal_numbers(folder)
        if found.number >= 0 and not found.tail.corrupt:
            os.ftruncate(found.fd, found.tail.end)
            journal = Journal(folder, found.number, found.fd, found.ledger, found.tail.end, fsync=fsync)
            for number in numbers:
                if number > found.number:
                    _set_aside(folder, number)
                elif number < found.number:
                    journal_path(folder, number).unlink()
            return journal, found.tail
        corrupt = bool(numbers) or any(folder.glob("ring-*"))
        if found.fd >= 0:
            return _begin_anew(folder, found, numbers[0] + 1, fsync=fsync), found.tail
        header = Header(producer_id, numbers[0] + 1 if numbers else 0, 0, lossy=corrupt)
        journal = Journal.create(folder, header, fsync=fsync)
        for number in numbers:
            _set_aside(folder, number)
        return journal, found.tail._replace(corrupt=found.tail.corrupt or ("the journal is missing" if corrupt else ""))


def _begin_anew(folder: Path, found: Found, number: int, *, fsync: bool) -> Journal:
    ledger = found.ledger
    journal = Journal(folder, number - 1, found.fd, ledger, found.tail.end, fsync=fsync)
    assert ledger.header is not None
    ledger.header = msgspec.structs.replace(ledger.header, lossy=True)
    ledger.pending, ledger.pending_bytes, ledger.states, ledger.state_bytes = [], 0, [], 0
    kept = journal_path(folder, found.number).with_suffix(CORRUPT)
    with suppress(FileExistsError):  # this is the second attempt
        os.link(journal_path(folder, found.number), kept)  # the name goes with the rewrite, the file stays
    journal.rewrite()
    for old in journal_numbers(folder):
        if old < number:
            journal_path(folder, old).unlink()
    return journal


def _set_aside(folder: Path, number: int) -> None:
    path = journal_path(folder, number)
    path.rename(path.with_suffix(CORRUPT))


def payloads(journal: Journal) -> Iterator[bytes]:
    """Of the states that no commit has."""
    for where in journal.ledger.states:
        yield journal.read(where)
