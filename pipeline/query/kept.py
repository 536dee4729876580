"""Answers that are kept in memory for equal reads of the same commit, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b

import msgspec

import pipeline.metrics as m
from pipeline.core.query import Query
from pipeline.core.record import Position
from pipeline.core.span import Span
from pipeline.metrics import Metrics
from pipeline.query.codings import Coded
from pipeline.query.found import Asked, FoundAnswer, release, span_of
from pipeline.query.media import split
from pipeline.query.read_pool import SharedWork

_encode = msgspec.msgpack.Encoder().encode
_OVERHEAD_BYTES = 2_000
"""About what a kept answer takes beside its bodies and the texts of its query."""
_TEXT_BYTES = 100
"""About what a text of a query takes beside its characters."""
AnswerKey = tuple[Query, str]
"""A query, and the media type of its answer."""


def texts_bytes(query: Query) -> int:
    """Return about how much memory the conditions and labels of a query take: a long one can have a small answer."""
    texts = [*(query.by or ()), *[text for it in query.where for text in (it.label, it.pattern)]]
    return sum([_TEXT_BYTES + len(it) * (1 if it.isascii() else 4) for it in texts])


class EntityTags:
    """Entity tags of answers. They are weak, because equal answers say how stale they are in different words."""

    def __init__(self) -> None:
        self._last: tuple[Mapping[int, Position], bytes] = {}, b""

    def of(self, key: AnswerKey, span: Span | None, positions: Mapping[int, Position]) -> bytes:
        """Return the tag of the answer over a range that was read at these positions; another process has other tags."""
        last, digest = self._last
        if positions != last or not digest:
            digest = blake2b(_encode(positions), digest_size=12).hexdigest().encode()
            self._last = dict(positions), digest
        return b'W/"%s-%x"' % (digest, hash((key, span)) & 0xFFFF_FFFF_FFFF_FFFF)


class KeptAnswer:
    """An answer that is encoded, but for what the clock says of it."""

    def __init__(self, found: FoundAnswer, key: AnswerKey, tags: EntityTags) -> None:
        """Encode an answer, which has no series afterwards."""
        self.key = key
        self.head, self.start = split(found.answer, key[1])
        release(found.answer)
        self.positions: Mapping[int, Position] = found.positions
        self.span = span_of(found.answer)
        self.etag = tags.of(key, self.span, found.positions)
        self._beside_bytes = _OVERHEAD_BYTES + texts_bytes(key[0])
        self.coded: dict[str, Coded] = {}
        """Compressed bodies, by content coding."""
        self.coding: dict[str, SharedWork[Coded]] = {}
        """Compressions that are under way."""

    @property
    def size_bytes(self) -> int:
        """Memory that the answer takes."""
        return self._beside_bytes + len(self.start) + sum(len(it.start) for it in self.coded.values())

    def answers(self, asked: Asked) -> bool:
        """Return whether this is what an equal query is answered with that is asked now."""
        return self.span == asked.span and self.positions == asked.positions


class AnswerCache:
    """The newest answer to each query, those that were asked for last; all together have at most `bytes_max`."""

    def __init__(self, bytes_max: int, metrics: Metrics) -> None:
        self._bytes_max = bytes_max
        self._metrics = metrics
        self._kept: OrderedDict[AnswerKey, tuple[KeptAnswer, int]] = OrderedDict()
        self._bytes = 0
        metrics.set(m.ANSWERS_KEPT, 0)

    def get(self, key: AnswerKey, asked: Asked) -> KeptAnswer | None:
        """Return the answer, if it is of the commits that the stores are at."""
        entry = self._kept.get(key)
        if entry is None or not entry[0].answers(asked):
            return None
        self._kept.move_to_end(key)
        return entry[0]

    def put(self, answer: KeptAnswer) -> None:
        """Keep an answer in place of an older one; those used least recently make room."""
        key = answer.key
        self._bytes -= self._kept.pop(key, (None, 0))[1]
        size = answer.size_bytes
        if size <= self._bytes_max // 2:  # one alone must not push out all others
            self._kept[key] = answer, size
            self._bytes += size
        while self._bytes > self._bytes_max:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed
        self._metrics.set(m.ANSWERS_KEPT, self._bytes)

    def grown(self, answer: KeptAnswer) -> None:
        """Take note that an answer takes more memory now, if it is still kept."""
        if self._kept.get(answer.key, (None, 0))[0] is answer:
            self.put(answer)
