"""Content codings of answers: gzip and zstd, cheap levels, in two parts.

A *start* is compressed once and kept; what follows it, which is short and differs from answer to answer, is put behind it
uncompressed, in blocks that each format has for that. Both together are one ordinary gzip member, or zstd frame.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import cramjam

from pipeline.budget import check_budget

GZIP, ZSTD = "gzip", "zstd"
_CODINGS = (ZSTD, GZIP)
"""The first of equals is preferred."""
_CHUNK = 2**18
"""Bytes that are compressed at once: a compressor holds the interpreter's lock."""
_STORED_MAX = 65_535
"""Most bytes of an uncompressed block; zstd takes twice as much."""


class Coded(NamedTuple):
    """The compressed start of a body, up to the end of a block."""

    coding: str
    start: bytes
    crc: int
    """CRC-32 of the start before it was compressed; gzip needs it at the end."""
    size: int
    """Length of the start before it was compressed."""


def preferred_coding(accept: str) -> str:
    """Return the coding that an Accept-Encoding header prefers; empty: none, which every client takes."""
    if "zstd" not in accept and "gzip" not in accept and "*" not in accept:
        return ""
    qualities = qualities_of(accept)
    rest = qualities.get("*", 0.0)
    quality, best = max((qualities.get(name, rest), -place) for place, name in enumerate(_CODINGS))
    return _CODINGS[-best] if quality > 0 and quality >= qualities.get("identity", 0.0) else ""


def qualities_of(accept: str) -> dict[str, float]:
    """Return the quality of each item of an Accept or Accept-Encoding header; 0 for a quality that is no number."""
    found: dict[str, float] = {}
    for item in accept.lower().split(","):
        name, *parameters = [part.strip() for part in item.split(";")]
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        found[name] = max(quality if 0 <= quality <= 1 else 0.0, found.get(name, 0.0))
    return found


def encode_start(coding: str, start: bytes) -> Coded:
    """Compress the start of a body, which must not be empty."""
    compressor = cramjam.gzip.Compressor(level=1) if coding == GZIP else cramjam.zstd.Compressor(level=1)
    for i in range(0, len(start), _CHUNK):
        check_budget()
        compressor.compress(start[i : i + _CHUNK])
    return Coded(coding, bytes(compressor.flush()), zlib.crc32(start) if coding == GZIP else 0, len(start))


def encode_end(coded: Coded, end: bytes) -> bytes:
    """Return what follows the compressed start, if `end` follows the start."""
    blocks = [end[i : i + _STORED_MAX] for i in range(0, len(end), _STORED_MAX)] or [b""]
    parts: list[bytes] = []
    for block in blocks:
        last = block is blocks[-1]
        if coded.coding == ZSTD:
            parts += [(len(block) << 3 | last).to_bytes(3, "little"), block]
        else:
            size = len(block).to_bytes(2, "little")
            parts += [bytes([last]), size, bytes([size[0] ^ 0xFF, size[1] ^ 0xFF]), block]
    if coded.coding == GZIP:
        crc, size_mod = zlib.crc32(end, coded.crc), (coded.size + len(end)) & 0xFFFF_FFFF
        parts += [crc.to_bytes(4, "little"), size_mod.to_bytes(4, "little")]
    return b"".join(parts)
