"""A `pushed.TotalsMemory` in a file of a data directory: a database of SQLite, each of whose transactions is on disk.

The file belongs to one log, and is begun anew with another one. So is a file that is damaged, which is kept aside: then the
totals of older streams are refused once, and none counts twice.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any
from zlib import crc32

from pipeline.adapters.datadir import aside, translate_os
from pipeline.core.distribution import Distribution
from pipeline.core.grants import Bounds
from pipeline.errors import NewerFormat, Unavailable
from pipeline.folders import open_file
from pipeline.ports import RawDelta, RequestKey
from pipeline.pushed import SavedTotals, SentIncreases, StreamTotals

_log = logging.getLogger(__name__)
_VERSION = 1
_TABLES = """
BEGIN;
CREATE TABLE streams (id INTEGER PRIMARY KEY, stream BLOB NOT NULL UNIQUE, totals BLOB NOT NULL);
CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), value BLOB NOT NULL);
PRAGMA user_version = 1;
COMMIT;
"""


class TotalsFile:
    """The file of a data directory that this process has locked.

    `log_id` names the log that the totals are counted in, and what else decides where a key goes in it.
    """

    def __init__(self, path: Path, log_id: str, now_ms: Callable[[], int]) -> None:
        self._path = path
        self._log_id = log_id
        self._now_ms = now_ms
        self._connection: sqlite3.Connection | None = None
        self._checksums: dict[bytes, int] = {}
        """Checksum of the row of each stream."""
        self._checksum = 0
        """All of them, by exclusive or: a row that is missing is noticed, too."""

    def load(self) -> SavedTotals | None:
        """Open the file, and return what it has; see `pushed.TotalsMemory`."""
        try:
            with translate_os(str(self._path)):
                saved = self._read()
        except sqlite3.OperationalError as error:  # of the disk, or of this process: the file can be right
            self.close()
            raise Unavailable(f"{self._path}: {error}") from None
        except (sqlite3.DatabaseError, ValueError, TypeError, LookupError) as error:
            saved, reason = None, f"is damaged: {error}"
        else:
            if saved is None or saved[0] == self._log_id:
                return saved and saved[1]
            reason = "belongs to another log, or was written with other `idempotent_partitions`"
        self.close()
        kept = aside(self._path, self._now_ms())
        _log.error("%s %s. It is kept as %s; what streams had before is not counted", self._path, reason, kept.name)
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(kept.with_name(kept.name + suffix))
        self._read()
        return None

    def _read(self) -> tuple[str, SavedTotals] | None:
        """Return the name of a log, and what is counted in it; None if the file is new."""
        os.close(open_file(self._path, os.O_RDWR | os.O_CREAT))
        self._connection = connection = sqlite3.connect(self._path, 1.0, isolation_level=None, check_same_thread=False)
        for pragma in ("locking_mode=EXCLUSIVE", "trusted_schema=OFF", "cell_size_check=ON", "journal_mode=WAL"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("PRAGMA synchronous=FULL")
        [[version]] = connection.execute("PRAGMA user_version").fetchall()
        if version > _VERSION:
            raise NewerFormat(f"{self._path} has version {version}; this program reads {_VERSION}")
        if version == 0:
            connection.executescript(_TABLES)
        if (found := connection.execute("PRAGMA integrity_check(1)").fetchall()) != [("ok",)]:
            raise ValueError(str(found))
        states = connection.execute("SELECT value FROM state").fetchall()
        rows = connection.execute("SELECT stream, totals FROM streams ORDER BY id").fetchall()
        self._checksums = {stream: crc32(sealed) for stream, sealed in rows}
        self._checksum = reduce(xor, self._checksums.values(), 0)
        if not states and not rows:
            return None
        log_id, known_from_ns, count, checksum, sent = _opened(states[0][0])
        known = {}
        for stream, sealed in rows:
            named, totals = _opened(sealed)
            if bytes.fromhex(named) != stream or stream in known:
                raise ValueError("a row of another stream")
            known[stream] = _totals(totals)
        if (count, checksum) != (len(known), self._checksum):
            raise ValueError(f"{count} rows were saved, and others are there")
        return log_id, SavedTotals(known, known_from_ns, None if sent is None else _sent(sent))

    def _summed(self, changed: Mapping[bytes, bytes | None]) -> tuple[int, int]:
        """Return how many rows there are after changes, and the checksum of all."""
        count, checksum = len(self._checksums), self._checksum
        for stream, row in changed.items():
            before, after = self._checksums.get(stream), None if row is None else crc32(row)
            count += (after is not None) - (before is not None)
            checksum ^= (before or 0) ^ (after or 0)
        return count, checksum

    def save(self, changes: Mapping[bytes, StreamTotals | None], known_from_ns: int, sent: SentIncreases | None) -> None:
        """Save all of this, or nothing; see `pushed.TotalsMemory`."""
        connection = self._connection
        if connection is None:
            raise Unavailable(f"{self._path} is closed")
        rows = {stream: None if it is None else _sealed([stream.hex(), _parts(it)]) for stream, it in changes.items()}
        count, checksum = self._summed(rows)
        parts = None if sent is None else _sent_parts(sent)
        state = self._log_id, known_from_ns, count, checksum, parts
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM streams WHERE stream = ?", [(stream,) for stream in changes])
            present = [(stream, row) for stream, row in rows.items() if row is not None]
            connection.executemany("INSERT INTO streams (stream, totals) VALUES (?, ?)", present)
            connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (_sealed(state),))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise Unavailable(f"{self._path}: {error}") from None
        for stream, row in rows.items():
            self._checksums.pop(stream, None)
            if row is not None:
                self._checksums[stream] = crc32(row)
        self._checksum = checksum

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _sealed(value: object) -> bytes:
    """Return a value as JSON behind its checksum."""
    encoded = json.dumps(value).encode()
    return b"%08x" % crc32(encoded) + encoded


def _opened(sealed: bytes) -> Any:
    if int(sealed[:8], 16) != crc32(sealed[8:]):
        raise ValueError("a row with another checksum")
    return json.loads(sealed[8:])


def _value_parts(value: Any) -> Any:
    if isinstance(value, Distribution):
        return [value.count, value.total, value.least, value.most, value.packed.hex()]
    return value


def _value(parts: Any) -> Any:
    if not isinstance(parts, list):
        return parts
    count, total, least, most, packed = parts
    return Distribution(count, total, least, most, bytes.fromhex(packed))


def _parts(it: StreamTotals) -> Any:
    return [it.start_ns, it.at_ns, [*map(_value_parts, it.values)]]


def _totals(parts: Any) -> StreamTotals:
    start_ns, at_ns, values = parts
    return StreamTotals(start_ns, at_ns, tuple(map(_value, values)))


def _sent_parts(sent: SentIncreases) -> Any:
    deltas = [it._replace(labels={**it.labels}, value=_value_parts(it.value)) for it in sent.deltas]
    key = sent.key.path, sent.key.key, sent.key.digest.hex()
    bounds = [] if sent.bounds is None else [sent.bounds.views, sent.bounds.labels]
    return deltas, sent.lines, key, {stream.hex(): _parts(it) for stream, it in sent.known.items()}, sent.at_ms, *bounds


def _sent(parts: Any) -> SentIncreases:
    rows, lines, (path, key, digest), known, at_ms, *bounded = parts
    deltas = [it._replace(value=_value(it.value)) for it in map(RawDelta._make, rows)]
    totals = {bytes.fromhex(stream): _totals(it) for stream, it in known.items()}
    bounds = Bounds(tuple(bounded[0]), tuple(map(tuple, bounded[1]))) if bounded else None
    return SentIncreases(deltas, lines, RequestKey(path, key, bytes.fromhex(digest)), totals, at_ms, bounds)
