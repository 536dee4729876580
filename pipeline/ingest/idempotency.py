"""Requests with an `Idempotency-Key`: a repeat counts once, whichever server takes it, and whatever became of the first try.

A task counts each (producer, partition, sequence) once. So the batches of such a request have a producer of their own, made
from what the client repeats: path, key and body. Then a repeat is the same batches again, if two things are the same in
every try, without any memory that servers would have to share:

- which deltas are in which batch: the request is cut by its own content, never by a setting, by the known definition of a
  view, or by refusals;
- which partition they go to: the partition of a series depends on the number of partitions, which may grow between two
  tries; so all go to one of the first partitions, which are always there (`idempotent_partitions`), chosen by the producer.
  Any partition is right for any series, because reads merge all of them.

The body is part of the identity. So another body under the same key, at a server that does not remember the first one, is
another request, and is counted; if it were not, its deltas would be acknowledged and dropped. A server that remembers
answers 422.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from zlib import crc32

from pipeline.core.distribution import Distribution
from pipeline.ingest.admission import KEY_PREFIX
from pipeline.ports import RawDelta, RequestKey

# These constants, `_size`, `partition_of_request` and `producer_of_request` are part of a request's identity: servers of two
# versions must cut alike. If they did not, a repeat at the other one would have other deltas under the sequence of a batch
# that is counted, and they would be acknowledged and dropped. So any change here needs another `KEY_PREFIX`, and even then a
# repeat that crosses the upgrade counts twice.
CHUNK_BYTES_MAX = 262_144
"""The most bytes of one batch, unless a delta is larger by itself: every log takes so many, and no batch has more groups
than a task reads, even if each delta is a group of its own."""
_DELTA_BYTES = 160
"""The most bytes that a delta takes in a batch beyond its texts and digits, as a group of its own."""


def producer_of_request(key: RequestKey) -> str:
    """Return the producer id of the batches of a request."""
    said = (key.path.encode(), key.key.encode(), key.digest)
    return KEY_PREFIX + sha256(b"".join([len(part).to_bytes(4, "big") + part for part in said])).hexdigest()


def partition_of_request(producer_id: str, partitions: int) -> int:
    """Return the partition of all batches of a request: one of the first `partitions`."""
    return crc32(producer_id.encode()) % partitions


def chunks(deltas: Sequence[RawDelta]) -> Iterator[range]:
    """Return the deltas of each batch, by number."""
    start = size = 0
    for number, delta in enumerate(deltas):
        more = _size(delta)
        if number > start and size + more > CHUNK_BYTES_MAX:
            yield range(start, number)
            start, size = number, 0
        size += more
    if start < len(deltas):
        yield range(start, len(deltas))


def _size(delta: RawDelta) -> int:
    """Return the most bytes that a delta takes in a batch; any number if it is not valid."""
    try:
        size = _DELTA_BYTES + _text_bytes(delta.view)
        for name, text in delta.labels.items():
            size += 8 + _text_bytes(name) + _text_bytes(text)
    except (AttributeError, TypeError):
        return _DELTA_BYTES
    value = delta.value
    if type(value) is int:
        return size + value.bit_length() // 8
    if isinstance(value, Distribution):
        return size + _DELTA_BYTES + len(value.packed)
    return size + _text_bytes(value) if isinstance(value, str) else size


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)
