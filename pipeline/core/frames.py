"""Several encoded batches as one request body."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import BadRecord


def encode_frames(batches: Sequence[bytes]) -> bytes:
    """Return encoded batches as one request body, each behind its length: four bytes, big endian."""
    return b"".join(part for batch in batches for part in (len(batch).to_bytes(4, "big"), batch))


def decode_frames(body: bytes, count_max: int | None = None) -> list[bytes]:
    """Decode what `encode_frames` returned, up to `count_max` batches. Raises `BadRecord` if a length is wrong."""
    batches: list[bytes] = []
    start = 0
    while start < len(body) and len(batches) != count_max:
        size = int.from_bytes(body[start : start + 4], "big")
        start += 4 + size
        if size == 0 or start > len(body):
            raise BadRecord(f"frame {len(batches)}: {size} bytes announced, {max(0, len(body) - start + size)} there")
        batches.append(body[start - size : start])
    return batches
