"""A file beside the embedded log that holds each partition's end offset, so that the loss of the newest files is detected.

RocksDB can't tell a write-ahead log that was removed or cut from one that was never written: it opens, with fewer records.
So each append writes the partition's end offset to this file, after the write to the log and before the acknowledgement. The
file is therefore never ahead of the log, whichever process is killed; only power loss without `fsync` can make it so, and
then acknowledged records are really gone. It lies beside the log's folder, so that an older copy of the folder is detected,
too. (Kafka has `recovery-point-offset-checkpoint` for a similar purpose.)

    32 bytes a partition, at (topic number * 1024 + partition) * 32:  start(8) flushed(8) end(8) crc-32(4)
    after the last of them, the topics and their numbers:             size(4) crc-32(4) the log's own encoding
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
from pipeline.folders import open_file

_log = logging.getLogger(__name__)
_PARTITIONS_MAX = 1_024
_SLOT_BYTES = 32
_OFFSETS = struct.Struct(">QQQ")
_CRC = struct.Struct(">I")
_HEAD = struct.Struct(">II")
_TOPICS_AT = 256 * _PARTITIONS_MAX * _SLOT_BYTES
_TOPICS_BYTES_MAX = 2**20


class CheckpointOffsets(NamedTuple):
    """Offsets of one partition in the file."""

    start_offset: int = 0
    flushed_offset: int = 0
    """RocksDB's manifest names the files of all records below it: if one of them is missing, RocksDB does not open."""
    end_offset: int = 0


class OffsetCheckpoint:
    """The file. With `read_only` it is not written, and may be missing."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._failed = False
        self._file = -1
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        with translate_os(str(path)):
            try:
                self._file = open_file(path, flags)
            except FileNotFoundError:
                if not read_only:
                    raise

    def get(self, partition: Partition) -> CheckpointOffsets:
        """Return the offsets of a partition: zeros if there are none, or they are damaged, which is logged."""
        with translate_os(str(self.path)):
            data = os.pread(self._file, _SLOT_BYTES, _place(partition)) if self._file >= 0 else b""
        data = data[: _OFFSETS.size + _CRC.size]
        if not any(data):
            return CheckpointOffsets()
        offsets, crc = data[: _OFFSETS.size], data[_OFFSETS.size :]
        if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(offsets):
            _log.warning("%s is damaged: whether %s lost its newest records can't be told", self.path, partition.name)
            return CheckpointOffsets()
        return CheckpointOffsets(*_OFFSETS.unpack(offsets))

    def put(self, partition: Partition, checkpointed: CheckpointOffsets) -> None:
        """Write the offsets of a partition. The first failure is logged; the records themselves are safe."""
        offsets = _OFFSETS.pack(*checkpointed)
        self._write(offsets + _CRC.pack(zlib.crc32(offsets)), _place(partition))

    def get_topics(self) -> bytes:
        """Return the text of the last `put_topics`; empty if there is none, or it is damaged."""
        with translate_os(str(self.path)):
            data = os.pread(self._file, _TOPICS_BYTES_MAX, _TOPICS_AT) if self._file >= 0 else b""
        if len(data) < _HEAD.size:
            return b""
        size, crc = _HEAD.unpack(data[: _HEAD.size])
        text = data[_HEAD.size : _HEAD.size + size]
        return text if zlib.crc32(text) == crc else b""

    def put_topics(self, text: bytes) -> None:
        """Keep a copy of the topics' numbers, without which the remains of a damaged log could not be read."""
        self._write(_HEAD.pack(len(text), zlib.crc32(text)) + text, _TOPICS_AT)

    def _write(self, data: bytes, place: int) -> None:
        try:
            os.pwrite(self._file, data, place)
        except OSError as error:
            if not self._failed:
                _log.error("%s can't be written: %s; if newest records are lost, nobody may notice", self.path, error)
            self._failed = True

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _place(partition: Partition) -> int:
    return (partition.topic_number * _PARTITIONS_MAX + partition.number) * _SLOT_BYTES
