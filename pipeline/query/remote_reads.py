"""Answers remote reads of Prometheus: `POST /api/v1/read` serves views with windows, late deltas included.

Views and their series have the names that `GET /v1/openmetrics` gives them. Views without windows are left out: they have
no history that could be read, so Prometheus scrapes them and keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import cramjam
from msgspec.structs import replace

from pipeline.core import codec
from pipeline.core.exposition import choose
from pipeline.core.grants import Bounds
from pipeline.core.query import Matcher, MergedDefinition, merged
from pipeline.core.remote_read import NAME_LABEL, SeriesQuery, decode_request, encode_response
from pipeline.errors import BadRecord, Unreadable
from pipeline.metrics import NAMES
from pipeline.query.cuts import Cut
from pipeline.query.matchers import Test, compile_matcher
from pipeline.query.plans import all_definitions, is_seen, versions
from pipeline.query.problems import Refused
from pipeline.query.reader import ViewReader
from pipeline.query.view_series import Room, histogram_names, sample_names, view_series
from pipeline.settings import QuerySettings

REQUEST_TYPE = "application/x-protobuf"
_LISTINGS_MAX = 100
"""Bounds of access tokens for which the list of views is kept."""
REQUEST_BYTES_MAX = 2**18
"""Largest request, before and after it is decompressed."""


class _Readable(NamedTuple):
    """A view with windows, and the names of its samples."""

    merged: MergedDefinition
    names: tuple[str, ...]


class _ListedViews(NamedTuple):
    """All views that can be read, and the versions of each partition's definitions they were found in."""

    stores: Mapping[int, object]  # a rebuilt store counts the versions of its definitions from 0 again
    versions: Mapping[int, int]
    views: Sequence[_Readable]
    broken: Mapping[str, Unreadable]
    """By name of a view whose definition can't be decoded, the error."""


class RemoteReads:
    """Answers remote reads from a reader's stores. Safe from any thread."""

    def __init__(self, reader: ViewReader, settings: QuerySettings) -> None:
        self._reader = reader
        self._settings = settings
        self._listings: dict[Bounds | None, _ListedViews] = {}

    def answer(self, body: bytes, bounds: Bounds | None = None, *, deadline_s: float) -> bytes:
        """Return the compressed answer to a compressed request, within the bounds of an access token.

        Raises `BadRecord` or `Invalid` for a request that can't be answered, and what `ViewReader.on_cut` raises.
        """
        queries = decode_request(_decompressed(body), matchers_max=self._settings.matchers_max)
        own = [Matcher(label, "=", value) for label, value in bounds.labels] if bounds is not None else ()
        queries = [replace(it, matchers=(*it.matchers, *own)) for it in queries]
        answer = self._reader.on_cut(partial(self._read, queries, bounds), deadline_s=deadline_s)
        return bytes(cramjam.snappy.compress_raw(answer))

    def _read(self, queries: Sequence[SeriesQuery], bounds: Bounds | None, cut: Cut) -> bytes:
        listing = self._listed(bounds, cut)
        room = Room(self._settings.answer_points_max, self._settings.remote_read_bytes_max)
        return encode_response([[*self._series(query, listing, cut, room)] for query in queries])

    def _listed(self, bounds: Bounds | None, cut: Cut) -> _ListedViews:
        """Return all views within bounds, from memory unless the definitions of a partition have changed."""
        found_in = versions(cut.positions)
        known = self._listings.get(bounds)
        if known is not None and known.versions == found_in and known.stores == cut.stores:
            return known
        found: dict[str, list[codec.DefinitionEntry]] = {}
        broken: dict[str, Unreadable] = {}
        for view, entry in all_definitions(cut.snapshots):
            if not is_seen(bounds, view, entry):
                continue
            if isinstance(entry, Unreadable):
                broken[view] = entry
            else:
                found.setdefault(view, []).append(entry)
        whole = {view: merged(view, entries) for view, entries in found.items() if view not in broken}
        chosen, _ = choose(whole, NAMES)
        views = [_Readable(whole[it.view], sample_names(it)) for it in chosen if it.window_s]
        if len(self._listings) >= _LISTINGS_MAX:
            self._listings.clear()
        listing = self._listings[bounds] = _ListedViews(dict(cut.stores), found_in, views, broken)
        return listing

    def _series(self, query: SeriesQuery, listing: _ListedViews, cut: Cut, room: Room) -> Iterator[bytes]:
        tests = [(matcher.label, self._test(matcher, cut)) for matcher in query.matchers]
        named = [test for label, test in tests if label == NAME_LABEL]
        others = [(label, test) for label, test in tests if label != NAME_LABEL]

        def fitting(names: Sequence[str]) -> list[str]:
            return [name for name in names if all(test([name])[0] for test in named)]

        for view, error in listing.broken.items():
            if fitting([view, *histogram_names(view)]):
                raise error
        for it in listing.views:
            if names := fitting(it.names):
                yield from view_series(query, it.merged, names, others, cut, room)

    def _test(self, matcher: Matcher, cut: Cut) -> Test:
        longest = self._settings.regex_bytes_max
        return compile_matcher(matcher, regex_bytes_max=longest, check=lambda: cut.check(matcher.label))


def _decompressed(body: bytes) -> bytes:
    """Return the content of a snappy block, whose size is checked before memory is taken for it."""
    try:
        if cramjam.snappy.decompress_raw_len(body) > REQUEST_BYTES_MAX:
            raise Refused(413, f"a request of over {REQUEST_BYTES_MAX} bytes")
        return bytes(cramjam.snappy.decompress_raw(body))
    except cramjam.DecompressionError as error:
        raise BadRecord(f"not a block compressed by snappy: {error}") from None
