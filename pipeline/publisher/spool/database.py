"""The database of a slot: SQLite, which only the owner of the slot's lock writes, one transaction for each change.

SQLite's pages have no checksums, and it passes over the end of a damaged log in silence. So each row has a checksum over
its kind, its owner, and all its fields. The *root*, of which there are two copies that each transaction writes, says how
many rows there must be. SEAL, another file, has the number of the last transaction.

Write-ahead log: a transaction is one write and, with `fsync`, one fsync; kill -9 leaves all of it or nothing. Without
`fsync` (`synchronous=OFF`) a power loss can damage the database, and the checks say so. SQLite's own locks are of no use:
they are lost when any file descriptor of the file is closed, and a fork does not inherit them. The slot has a lock.

Nobody forks (`fork_gate`) while a call of SQLite runs: a child would find mutexes of SQLite's own taken for ever.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from struct import unpack_from
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from google_crc32c import extend, value

from pipeline.core.codec import decode_batch, encode_batch
from pipeline.core.kinds import State
from pipeline.core.record import Batch, Definition, Group
from pipeline.core.sequence import Sealed
from pipeline.errors import BadRecord, Invalid, Unavailable
from pipeline.folders import check_file, open_file, read_file
from pipeline.publisher.batching import Pending
from pipeline.publisher.spool.slot import explained
from pipeline.threads import fork_gate

FORMAT = 3
"""The version of spool folders that this program reads and writes."""
NAME, LOG, SEAL = "spool.db", "spool.db-wal", "SEAL"
Rings = Mapping[int, tuple[int, int, int]]
_ROOTS = ("root", "mirror")
_SCHEMA = (
    "CREATE TABLE root (crc, value)",
    "CREATE TABLE mirror (crc, value)",
    "CREATE TABLE batches (id INTEGER PRIMARY KEY, partition, sequence, entry_count, crc, value)",
    "CREATE TABLE pending (number, place, crc, value)",
    "CREATE TABLE names (id INTEGER PRIMARY KEY, kind, crc, value)",
)
_PENDING_ENTRIES = 10_000
_SEAL_BYTES, _SEAL_PLACES = 4096, (0, 256)
_ROWS = 100
"""Rows that are read in one call."""
_FREE_PAGES = 256
"""Free pages that stay in the file."""
_encode = msgspec.msgpack.Encoder().encode


class Root(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The content of a slot, as of a transaction."""

    producer_id: str
    secret: str
    segment_bytes: int
    number: int = 1
    """Rises with every transaction."""
    epoch: int = 0
    next_sequences: dict[int, int] = {}
    batch_count: int = 0
    batch_sum: int = 0
    """Sum of the checksums of all batches, modulo 2**64."""
    pending_number: int = 0
    """The number of the transaction that has written the pending deltas."""
    pending_count: int = 0
    rings: dict[int, tuple[int, int, int]] = {}
    """By ring: the first segment, the offset in it up to which it is read, and the number of the next new segment."""


class Kept(NamedTuple):
    """A batch in a database."""

    id: int
    entry_count: int
    size: int
    crc: int


_decode_root = msgspec.msgpack.Decoder(Root).decode
_decode_pending = msgspec.msgpack.Decoder(tuple[list[int], bytes]).decode


def checksum(owner: bytes, what: str, *fields: Any) -> int:
    """Return the checksum of a row; the last field is its value."""
    return int(extend(value(_encode((owner, what, fields[:-1]))), bytes(fields[-1])))


def encode_pending(pending: Iterable[Pending]) -> list[bytes]:
    """Return merged deltas as values of rows, each with the groups of a batch and the number of deltas of each entry."""
    values: list[bytes] = []
    rest = iter(pending)
    while run := [*islice(rest, _PENDING_ENTRIES)]:
        columns: dict[Definition, tuple[list[bytes], list[State], list[int]]] = {}
        last: Definition | None = None
        for definition, suffix, state, count in run:
            if definition is not last:
                suffixes, states, counts = columns.setdefault(definition, ([], [], []))
                last = definition
            suffixes.append(suffix)
            states.append(state)
            counts.append(count)
        groups = [Group(definition, column[0], column[1]) for definition, column in columns.items()]
        all_counts = [count for column in columns.values() for count in column[2]]
        values.append(_encode((all_counts, encode_batch(Batch("-", 0, 0, 0, 0, 0, groups)))))
    return values


def decode_pending(encoded: bytes) -> list[Pending]:
    """Return the merged deltas of a row, or raise `BadRecord`."""
    try:
        counts, batch = _decode_pending(encoded)
        rows = [(g.definition, *row) for g in decode_batch(batch).groups for row in zip(g.suffixes, g.states, strict=True)]
        return [Pending(*row, count) for row, count in zip(rows, counts, strict=True)]
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRecord(f"pending: {error}") from None


def _root_row(table: str, root: Root) -> tuple[int, bytes]:
    encoded = _encode(root)
    return checksum(b"", table, encoded), encoded


def _seal_word(owner: bytes, number: int) -> int:
    number &= 0xFFFFFFFF
    return int(value(owner + number.to_bytes(4, "little"))) << 32 | number


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    for suffix in ("", "-wal", "-journal"):
        check_file(path.with_name(path.name + suffix))
    uri = f"{path.absolute().as_uri()}?vfs=unix-none&mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.text_factory = bytes
    for pragma in ("locking_mode=EXCLUSIVE", "trusted_schema=OFF", "cell_size_check=ON", "secure_delete=OFF"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


class Contents:
    """The rows of a database that are whole, and the damages of the others. Reading changes nothing in the slot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damages: list[str] = []
        """Descriptions of the damages that were found in the database and in SEAL."""
        self.lost = -1
        """Number of transactions that SEAL has counted and the database lacks; -1: not known."""
        self.root: Root | None = None
        self.owner = b""
        self.batches: dict[tuple[int, int], Kept] = {}
        self.pending: list[Pending] = []
        self.names: dict[int, tuple[int, bytes]] = {}
        """Definitions and series: types and payloads of their records, by id."""
        self._connection: sqlite3.Connection | None = None
        with fork_gate:
            self._open(folder)
        roots = self._read_roots()
        if roots:
            root = self.root = max(roots, key=lambda root: root.number)
            self.owner = fingerprint_of(root.producer_id)
            self._read_seal(root.number)
            self._read_batches(root)
            self._read_pending(root)
            for number, kind, crc, encoded in self._rows("SELECT * FROM names"):
                if self._is_whole(crc, self.owner, "name", number, kind, encoded):
                    self.names[number] = kind, encoded

    def _open(self, folder: Path) -> None:
        # SQLite may delete the log when it closes a database that it has only read: so it reads hard links to both files.
        names = Path(tempfile.mkdtemp(prefix=".look-", dir=folder))
        try:
            for name in (NAME, LOG):
                with suppress(FileNotFoundError):
                    check_file(folder / name)
                    os.link(folder / name, names / name, follow_symlinks=False)
            self._connection = _connect(names / NAME, "ro")
            self._connection.execute("SELECT * FROM sqlite_master").fetchall()  # opens both
        except (sqlite3.Error, Invalid) as error:
            self._damaged(error)
        finally:
            shutil.rmtree(names, ignore_errors=True)

    def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            with fork_gate:
                self._connection.close()

    def load(self, partition: int, sequence: int) -> bytes:
        """Return the bytes of a batch, or raise `BadRecord` if they have changed since the database was read."""
        kept = self.batches[partition, sequence]
        for [found] in self._rows("SELECT value FROM batches WHERE id = ?", kept.id):
            if kept.crc == checksum(self.owner, "batch", kept.id, partition, sequence, kept.entry_count, found):
                return bytes(found)
        raise BadRecord(f"batch {sequence} of partition {partition} is damaged")

    def _damaged(self, what: object, name: str = NAME) -> None:
        self.damages.append(f"{name}: {what}")

    def _rows(self, query: str, *arguments: Any) -> Iterator[tuple[Any, ...]]:
        try:
            if self._connection is not None:
                with fork_gate:
                    cursor = self._connection.execute(query, arguments)
                while True:
                    with fork_gate:
                        rows = cursor.fetchmany(_ROWS)
                    if not rows:
                        break
                    yield from rows
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            self._damaged(error)

    def _is_whole(self, crc: Any, owner: bytes, what: str, *fields: Any) -> bool:
        with suppress(TypeError, OverflowError):
            if type(fields[-1]) is bytes and crc == checksum(owner, what, *fields):
                return True
        self._damaged(f"wrong checksum, {what} {'-'.join(map(str, fields[:-1]))}")
        return False

    def _read_roots(self) -> list[Root]:
        for [found] in self._rows("PRAGMA quick_check(1)"):
            if found not in (b"ok", "ok"):
                self._damaged(found)
        schema = [sql for [sql] in self._rows("SELECT sql FROM sqlite_master ORDER BY rowid")]
        if schema != [sql.encode() for sql in _SCHEMA]:
            self._damaged("another schema")
        roots = []
        for table in _ROOTS:
            for crc, encoded in self._rows(f"SELECT crc, value FROM {table}"):  # nosec B608  # names of this module
                if self._is_whole(crc, b"", table, encoded):
                    roots.append(_decode_root(encoded))
        if len(roots) != len(_ROOTS) or roots[0] != roots[1]:
            self._damaged(f"{len(roots)} of {len(_ROOTS)} copies of the root are whole, or they differ")
        return roots

    def _read_seal(self, number: int) -> None:
        try:
            data = read_file(self.folder / SEAL, _SEAL_BYTES)[0].ljust(_SEAL_BYTES, b"\0")
        except (FileNotFoundError, Invalid):
            data = bytes(_SEAL_BYTES)
        words = [unpack_from("<Q", data, place)[0] for place in _SEAL_PLACES]
        seen = [word & 0xFFFFFFFF for word in words if word == _seal_word(self.owner, word)]
        if len(seen) != len(words):
            self._damaged(f"{len(seen)} of its {len(words)} numbers are whole", SEAL)
        self.lost = max(0, max(seen) - number) if seen else -1
        if self.lost > 0:
            self._damaged(f"its last {self.lost} transactions are missing")

    def _read_batches(self, root: Root) -> None:
        for row_id, partition, sequence, count, crc, encoded in self._rows("SELECT * FROM batches"):
            if self._is_whole(crc, self.owner, "batch", row_id, partition, sequence, count, encoded):
                self.batches[partition, sequence] = Kept(row_id, count, len(encoded), crc)
        total = sum([kept.crc for kept in self.batches.values()]) % 2**64
        if (len(self.batches), total) != (root.batch_count, root.batch_sum):
            self._damaged(f"{len(self.batches)} batches are whole, and not the {root.batch_count} that there should be")

    def _read_pending(self, root: Root) -> None:
        count = 0
        for number, place, crc, encoded in self._rows("SELECT * FROM pending"):
            if self._is_whole(crc, self.owner, "pending", number, place, encoded) and number == root.pending_number:
                count += 1
                self.pending += decode_pending(encoded)
        if count != root.pending_count:
            self._damaged(f"{count} of {root.pending_count} rows of pending deltas are whole")


def fingerprint_of(producer_id: str) -> bytes:
    """Return the bytes that tie rows and segments to their producer."""
    return sha256(b"spool\x00" + producer_id.encode()).digest()[:8]


def create(folder: Path, root: Root, *, fsync: bool) -> Database:
    """Make an empty database for a slot. It must be closed before it is moved."""
    with explained("making a database"), fork_gate:
        os.close(os.open(folder / NAME, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = _connect(folder / NAME, "rw")
        try:
            connection.executescript("PRAGMA auto_vacuum=INCREMENTAL; BEGIN;" + ";".join(_SCHEMA))
            for table in _ROOTS:
                connection.execute(f"INSERT INTO {table} VALUES (?, ?)", _root_row(table, root))  # nosec B608
            connection.execute("COMMIT")
        finally:
            connection.close()
    return Database(folder, fsync=fsync)


class Database:
    """The database of a slot that this process has locked. Safe from any thread."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        """Open a database that was just made, or that `Contents` has found whole."""
        self.lock = threading.RLock()
        self.is_writing = False
        self.pending_bytes = 0
        self.log_bytes_max = 2**21
        self._folder = folder
        with explained("opening the database"), fork_gate:
            self._connection: sqlite3.Connection | None = _connect(folder / NAME, "rw")
            # A forked child must not close it, not even at its end: that would write to the parent's database.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            modes = "journal_mode=WAL", f"synchronous={'FULL' if fsync else 'OFF'}"
            for pragma in (*modes, "wal_autocheckpoint=0", "fullfsync=ON", "temp_store=MEMORY"):
                self._connection.execute(f"PRAGMA {pragma}").fetchall()
            self._load()
            self.owner = fingerprint_of(self.root.producer_id)
            fd = open_file(folder / SEAL, os.O_RDWR | os.O_CREAT)
            try:
                os.posix_fallocate(fd, 0, _SEAL_BYTES)
                self._seal = mmap.mmap(fd, _SEAL_BYTES)
            finally:
                os.close(fd)
            self._store_seal()

    def _load(self) -> None:
        assert self._connection is not None
        [[encoded]] = self._connection.execute(f"SELECT value FROM {_ROOTS[0]}").fetchall()  # nosec B608
        self.root = _decode_root(encoded)
        """The root as of the last transaction."""
        rows = self._connection.execute("SELECT partition, sequence, id, entry_count, length(value), crc FROM batches")
        self.batches = {row[:2]: Kept(*row[2:]) for row in rows.fetchall()}
        """The batches that are not acknowledged, by partition and sequence."""
        self._next_id = 1 + max([kept.id for kept in self.batches.values()], default=0)

    def _store_seal(self) -> None:
        with memoryview(self._seal) as data, data.cast("Q") as words:
            for place in _SEAL_PLACES:
                words[place >> 3] = _seal_word(self.owner, self.root.number)

    @contextmanager
    def transaction(self, **changes: Any) -> Iterator[sqlite3.Connection]:
        """Change rows and the root, all or nothing. The caller has held the lock since it read what it changes."""
        with self.lock, fork_gate, explained("writing to the database"):
            if self._connection is None:
                raise Invalid("the spool is closed")
            if self.is_writing:
                raise Unavailable("this thread was interrupted while it writes to the spool")
            self.is_writing = True
            try:
                root = msgspec.structs.replace(self.root, number=self.root.number + 1, **changes)
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                for table in _ROOTS:
                    self._connection.execute(f"UPDATE {table} SET crc = ?, value = ?", _root_row(table, root))  # nosec B608
                self._connection.execute("COMMIT")
                self.root = root
                self._store_seal()  # before anybody acts on this transaction
            except BaseException:
                if self._connection is None:
                    raise Unavailable("this process was forked while it wrote to its parent's spool") from None
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._load()  # a signal handler can have raised behind the commit
                raise
            finally:
                self.is_writing = False

    def commit(
        self,
        batches: Iterable[Sealed],
        pending: Sequence[bytes],
        rings: Rings,
        names: Mapping[int, tuple[int, bytes]] = MappingProxyType({}),
        gone: Iterable[int] = (),
    ) -> None:
        """Write batches, pending deltas in place of the old ones, and names; delete the names in `gone`. All or nothing."""
        owner = self.owner
        with self.lock:
            root, number = self.root, self.root.number + 1
            kept: dict[tuple[int, int], Kept] = {}
            next_sequences = dict(root.next_sequences)
            rows: list[tuple[Any, ...]] = []
            fresh = [new for new in batches if (new.partition, new.sequence) not in self.batches]  # it can be the second try
            for row_id, new in enumerate(fresh, self._next_id):
                key = new.partition, new.sequence, new.entry_count
                crc = checksum(owner, "batch", row_id, *key, new.value)
                kept[key[:2]] = Kept(row_id, new.entry_count, len(new.value), crc)
                rows.append((row_id, *key, crc, new.value))
                next_sequences[new.partition] = max(new.sequence + 1, next_sequences.get(new.partition, 0))
            waiting = [(number, i, checksum(owner, "pending", number, i, item), item) for i, item in enumerate(pending)]
            with self.transaction(
                next_sequences=next_sequences,
                batch_count=root.batch_count + len(kept),
                batch_sum=(root.batch_sum + sum([new.crc for new in kept.values()])) % 2**64,
                pending_number=number,
                pending_count=len(pending),
                rings=dict(rings),
            ) as connection:
                connection.execute("DELETE FROM pending")
                connection.executemany("INSERT INTO pending VALUES (?, ?, ?, ?)", waiting)
                connection.executemany("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", rows)
                connection.executemany("DELETE FROM names WHERE id = ?", ((key,) for key in gone))
                named = ((key, kind, checksum(owner, "name", key, kind, item), item) for key, (kind, item) in names.items())
                connection.executemany("INSERT INTO names VALUES (?, ?, ?, ?)", named)
            self.batches.update(kept)
            self._next_id += len(kept)
            self.pending_bytes = sum(map(len, pending))
            self.shrink(everything=False)

    def acknowledge(self, batches: Iterable[tuple[int, int]]) -> None:
        """Forget batches, each a partition and a sequence."""
        with self.lock:
            known = {key: self.batches[key] for key in batches if key in self.batches}
            total = (self.root.batch_sum - sum([kept.crc for kept in known.values()])) % 2**64
            if known:
                with self.transaction(batch_count=self.root.batch_count - len(known), batch_sum=total) as connection:
                    connection.executemany("DELETE FROM batches WHERE id = ?", [(kept.id,) for kept in known.values()])
                for key in known:
                    del self.batches[key]
                self.shrink(everything=False)

    def load(self, partition: int, sequence: int) -> bytes:
        """Return the bytes of a batch. Raise `Invalid` if it is not there, `BadRecord` if it is damaged."""
        with self.lock, explained("reading a batch"):
            kept = self.batches.get((partition, sequence))
            if kept is None or self._connection is None:
                raise Invalid(f"the spool has no batch {sequence} of partition {partition}")
            with fork_gate:
                rows = self._connection.execute("SELECT value FROM batches WHERE id = ?", (kept.id,)).fetchall()
        for [found] in rows:
            if checksum(self.owner, "batch", kept.id, partition, sequence, kept.entry_count, found) == kept.crc:
                return bytes(found)
        raise BadRecord(f"the spool's batch {sequence} of partition {partition} is damaged")

    def shrink(self, *, everything: bool = True) -> None:
        """Give back all free pages and the log; without `everything`, only once most pages are free or the log is long."""
        with self.lock, suppress(sqlite3.Error, FileNotFoundError), fork_gate:  # it can wait
            if self._connection is not None and not self.is_writing:
                queries = "PRAGMA page_count", "PRAGMA freelist_count"
                [pages], [free] = (self._connection.execute(query).fetchone() for query in queries)
                stays = 0 if everything else _FREE_PAGES
                if free > (0 if everything else max(stays, pages // 2)):
                    self._connection.execute(f"PRAGMA incremental_vacuum({free - stays})").fetchall()
                if (self._folder / LOG).stat().st_size > (0 if everything else self.log_bytes_max):
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @property
    def used_bytes(self) -> int:
        """The bytes of the database on the disk."""
        sizes = [path.stat().st_size for name in (NAME, LOG) if (path := self._folder / name).exists()]
        return sum(sizes) + _SEAL_BYTES

    def close(self) -> None:
        """Close the database."""
        with self.lock, fork_gate, explained("closing the database"):
            connection, self._connection = self._connection, None
            if connection is not None:
                self._seal.close()
                connection.close()
                ctypes.pythonapi.Py_DecRef(ctypes.py_object(connection))

    def abandon(self) -> None:
        """Forget the parent's database, in a forked child, without closing it or writing to it."""
        self.lock = threading.RLock()
        self._connection = None
