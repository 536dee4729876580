"""A file beside the embedded log that says how far each partition goes, so that the loss of its newest files is noticed.

RocksDB can't tell a write-ahead log that was removed, or cut, from one that was never written: it opens, and has less. So
each append also notes, in a file of its own, where the partition ends now. It is written behind the log and before the
acknowledgement, so it is never ahead of the log, whatever is killed. Only power loss can make it so, and only without
`fsync`: then acknowledged records are gone indeed. The file is beside the log's folder, not in it, so that an older copy of
the folder that is put in its place is noticed too.

    32 bytes a partition, at (topic number * 1024 + partition) * 32:  start(8) flushed(8) end(8) crc-32(4)
    behind the last of them, the numbers of the topics:               size(4) crc-32(4) as the log has them
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from pipeline.adapters.datadir import translate_os
from pipeline.adapters.embedded.chunks import Partition

_log = logging.getLogger(__name__)
_PARTITIONS_MAX = 1_024
_SLOT_BYTES = 32
_OFFSETS = struct.Struct(">QQQ")
_CRC = struct.Struct(">I")
_HEAD = struct.Struct(">II")
_TOPICS_AT = 256 * _PARTITIONS_MAX * _SLOT_BYTES
_TOPICS_BYTES_MAX = 2**20


class Noted(NamedTuple):
    """The offsets of one partition that are noted in the file: where it starts, is flushed to, and ends."""

    start_offset: int = 0
    flushed_offset: int = 0
    """RocksDB has everything below it in files that its manifest names: without one of them it does not open."""
    end_offset: int = 0


class Ends:
    """The file. With `read_only` nothing is written, and it need not be there."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._failed = False
        self._file = -1
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        with translate_os(str(path)):
            try:
                self._file = os.open(path, flags | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                if not read_only:
                    raise

    def get(self, partition: Partition) -> Noted:
        """What is noted of a partition: nothing, if it or the file is new. Damage is logged, and counts as nothing."""
        with translate_os(str(self.path)):
            data = os.pread(self._file, _SLOT_BYTES, _place(partition)) if self._file >= 0 else b""
        data = data[: _OFFSETS.size + _CRC.size]
        if not any(data):
            return Noted()
        offsets, crc = data[: _OFFSETS.size], data[_OFFSETS.size :]
        if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(offsets):
            _log.warning("%s is damaged: whether %s lost its newest records can't be told", self.path, partition.name)
            return Noted()
        return Noted(*_OFFSETS.unpack(offsets))

    def put(self, partition: Partition, noted: Noted) -> None:
        """Note something of a partition. A disk that refuses it is logged once: what it guards is there all the same."""
        offsets = _OFFSETS.pack(*noted)
        self._write(offsets + _CRC.pack(zlib.crc32(offsets)), _place(partition))

    def get_topics(self) -> bytes:
        """What `put_topics` was given last; empty if it was not, or can't be read."""
        with translate_os(str(self.path)):
            data = os.pread(self._file, _TOPICS_BYTES_MAX, _TOPICS_AT) if self._file >= 0 else b""
        if len(data) < _HEAD.size:
            return b""
        size, crc = _HEAD.unpack(data[: _HEAD.size])
        text = data[_HEAD.size : _HEAD.size + size]
        return text if zlib.crc32(text) == crc else b""

    def put_topics(self, text: bytes) -> None:
        """Keep a copy of which topic has which number: without that, what is left of a damaged log is of no use."""
        self._write(_HEAD.pack(len(text), zlib.crc32(text)) + text, _TOPICS_AT)

    def _write(self, data: bytes, place: int) -> None:
        try:
            os.pwrite(self._file, data, place)
        except OSError as error:
            if not self._failed:
                _log.error("%s can't be written: %s; if newest records are lost, nobody may notice", self.path, error)
            self._failed = True

    def close(self) -> None:
        """Let go of the file. Twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _place(partition: Partition) -> int:
    return (partition.topic_number * _PARTITIONS_MAX + partition.number) * _SLOT_BYTES
