"""Pages of answers: all series that a query selects, of one commit of each partition, kept until they are fetched.

A cursor names the server, one of its lists of pages, and a page. The lists are in memory, encoded, bounded in bytes and in
the time without use; a list that is gone can only be begun anew.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

import pipeline.metrics as m
from pipeline.budget import checked
from pipeline.core.answer import Answer, Series
from pipeline.core.query import Query
from pipeline.core.record import Position
from pipeline.errors import CursorGone, Invalid
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.found import FoundAnswer, release
from pipeline.query.kept import texts_bytes
from pipeline.query.media import JSON, encode_body
from pipeline.settings import QuerySettings

_CURSOR = re.compile(r"([A-Za-z0-9_-]{1,64})\.([0-9]{1,9})\.([0-9]{1,9})")
_OVERHEAD_BYTES = 2_000
_AGAIN = "begin again with the first page (cursor=)"
_encode = msgspec.json.Encoder().encode


class AnswerPages:
    """All pages of an answer."""

    def __init__(self, query: Query, found: FoundAnswer) -> None:
        """`query` is the one that was asked; its limit is the number of series on a page, and `found` has all pages'."""
        series, size = found.answer.series, query.limit
        self.query = query
        self.positions: Mapping[int, Position] = found.positions
        cut = found.answer.truncated
        total = found.answer.series_total if cut else len(series)
        self._cut = cut
        self.head = replace(found.answer, series=[], series_total=total)
        self._pages = [_encode(series[i : i + size]) for i in checked(range(0, len(series), size))] or [b"[]"]
        release(found.answer)
        self.size_bytes = _OVERHEAD_BYTES + texts_bytes(query) + sum(map(len, self._pages))
        self.used_s = 0.0

    @property
    def count(self) -> int:
        """Number of pages."""
        return len(self._pages)

    def page(self, number: int, head: Answer, next_cursor: str | None, media_type: str) -> tuple[Answer, bytes]:
        """Return what is said beside the series of a page, and its body; `head` has what the clock says."""
        head = replace(head, next_cursor=next_cursor, truncated=next_cursor is not None or self._cut)
        if not head.truncated and self.count == 1:
            head = replace(head, series_total=None)
        series: Any = self._pages[number]
        if media_type == JSON:
            return head, encode_body(replace(head, series=msgspec.Raw(series)), JSON)
        return head, encode_body(replace(head, series=msgspec.json.decode(series, type=list[Series])), media_type)


class Place(NamedTuple):
    """A page that a cursor stands for."""

    pages: AnswerPages
    list_number: int
    number: int


class PageLists:
    """Lists of pages of one server; to be used on its event loop."""

    def __init__(self, clock: Clock, settings: QuerySettings, metrics: Metrics) -> None:
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._server_id = clock.new_id()[:16]
        self._next = 0
        self._lists: OrderedDict[int, AnswerPages] = OrderedDict()
        self._bytes = 0
        for why in ("expired", "evicted"):
            metrics.inc(m.CURSORS_LOST, 0, why)
        metrics.set(m.CURSOR_BYTES, 0)

    def check(self, pages: AnswerPages) -> None:
        """Raise `Invalid` for pages that are too large to be kept."""
        most = self._settings.cursor_bytes_max
        if pages.count > 1 and pages.size_bytes > most:
            raise Invalid(
                f"view {pages.query.view}: the pages have {pages.size_bytes} bytes; at most {most} are kept (setting "
                "cursor_bytes_max): keep fewer labels, ask for a shorter range, or narrow `where`"
            )

    def keep(self, pages: AnswerPages) -> Place:
        """Keep pages, if there are several; lists that were used least recently make room. Return the first page."""
        self.expire()
        if pages.count == 1:
            return Place(pages, -1, 0)
        number = self._next
        self._next += 1
        self._lists[number] = pages
        pages.used_s = self._clock.monotonic_s()
        self._bytes += pages.size_bytes
        while self._bytes > self._settings.cursor_bytes_max:
            self._drop("evicted")
        self._metrics.set(m.CURSOR_BYTES, self._bytes)
        return Place(pages, number, 0)

    def find(self, cursor: str, query: Query) -> Place:
        """Return the page. Raises `CursorGone` if it is kept no more, `Invalid` if it never was, or is of another query."""
        self.expire()
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            raise Invalid(f"cursor: not a cursor of this API: {cursor[:100]!r}; the first page has cursor=")
        if match[1] != self._server_id:
            raise CursorGone(f"cursor: of another server, or of this one before it was started anew; {_AGAIN}")
        number, page = int(match[2]), int(match[3])
        pages = self._lists.get(number)
        if pages is None and number < self._next:
            raise CursorGone(
                "cursor: its pages are not kept any more: they were not used for cursor_ttl_ms="
                f"{self._settings.cursor_ttl_ms}, or made room for others; {_AGAIN}"
            )
        if pages is None or not page < pages.count:
            raise Invalid(f"cursor: no such page was given out: {cursor[:100]!r}")
        if pages.query != query:
            raise Invalid("cursor: it is of another query; repeat all other parameters of the first page")
        self._lists.move_to_end(number)
        pages.used_s = self._clock.monotonic_s()
        return Place(pages, number, page)

    def cursor_after(self, place: Place) -> str | None:
        """Return the cursor of the next page; None after the last one."""
        following = place.number + 1
        return f"{self._server_id}.{place.list_number}.{following}" if following < place.pages.count else None

    def expire(self) -> None:
        """Drop lists that were not used for `cursor_ttl_ms`."""
        before_s = self._clock.monotonic_s() - self._settings.cursor_ttl_ms / 1000
        while self._lists and next(iter(self._lists.values())).used_s < before_s:
            self._drop("expired")

    def _drop(self, why: str) -> None:
        _, pages = self._lists.popitem(last=False)
        self._bytes -= pages.size_bytes
        self._metrics.inc(m.CURSORS_LOST, 1, why)
        self._metrics.set(m.CURSOR_BYTES, self._bytes)
