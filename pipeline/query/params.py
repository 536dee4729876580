"""Parses reads: queries and what they wait for. `Invalid` says where a request is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from pipeline.core.grants import Bounds
from pipeline.core.kinds import KIND_NAMES
from pipeline.core.kinds.histogram import parse_quantiles
from pipeline.core.query import Matcher, Query, parse_matcher
from pipeline.core.record import WINDOW_S_MAX
from pipeline.core.span import NO_RANGE, AskedRange
from pipeline.core.times import length_ms, time_ms
from pipeline.core.token import Token
from pipeline.errors import Invalid
from pipeline.query.codings import preferred_coding
from pipeline.query.media import JSON, preferred
from pipeline.query.problems import Refused
from pipeline.settings import QuerySettings

QUERY_BYTES_MAX = 60_000
_TIMES = ("start", "end", "at")
_LENGTHS = ("step", "over", "compare")
_RANGE = (*_TIMES, *_LENGTHS, "fill")
WAITS = ("after", "max_staleness_ms", "timeout_ms")
PER_QUERY = ("kind", "window_s", "top", "bottom", "limit", *_RANGE, "fn")
"""Parameters of a query that may stand once."""
_SINGLE = (*PER_QUERY, *WAITS, "cursor", "allow_partial")
STALENESS_MS_MAX = 10**15 - 1
_READ_HEADERS = (b"accept", b"accept-encoding", b"if-none-match")
_WHOLE = re.compile(r"[0-9]{1,16}")


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Time that a read may take, and conditions to wait for before it."""

    timeout_ms: int
    after: Token | None = None
    max_staleness_ms: int | None = None

    @property
    def waits(self) -> bool:
        """Return whether the read has to wait for newer data."""
        return self.after is not None or self.max_staleness_ms is not None


class SeveralRequest(Waiting, frozen=True, kw_only=True):
    """Several reads at one moment."""

    queries: tuple[Query, ...]


class ReadRequest(Waiting, frozen=True, kw_only=True):
    """A read."""

    query: Query
    media_type: str = JSON
    """Media type of the answer."""
    coding: str = ""
    """Content coding that the client prefers; empty: none."""
    allow_partial: bool = False
    """True if a server that merges several may leave out partitions of which no server answers."""
    known: tuple[bytes, ...] = ()
    """Entity tags of answers that the client has; `*` is any."""
    cursor: str | None = None
    """Page to answer; empty: the first one. None: no pages."""

    @property
    def key(self) -> tuple[Query, str]:
        """The query, and the media type of its answer."""
        return self.query, self.media_type

    def knows(self, etag: bytes) -> bool:
        """Return whether the client has the answer with this entity tag."""
        return bool(self.known) and (etag.removeprefix(b"W/") in self.known or b"*" in self.known)


class ReadHeaders(NamedTuple):
    """Headers of a read."""

    accept: str = ""
    encoding: str = ""
    if_none_match: bytes = b""


NO_HEADERS = ReadHeaders()


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> ReadHeaders:
    """Return the headers of a read, out of those of a request."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _READ_HEADERS:
            found[name] = found[name] + b"," + value if name in found else value
    if not found:
        return NO_HEADERS
    accept, encoding, known = [found.get(name, b"") for name in _READ_HEADERS]
    return ReadHeaders(accept.decode("latin-1"), encoding.decode("latin-1"), known)


def parse_read(
    view: str,
    query_string: bytes,
    settings: QuerySettings,
    headers: ReadHeaders = NO_HEADERS,
    bounds: Bounds | None = None,
) -> ReadRequest:
    """Return the read that a URL and its headers ask for, within the bounds of an access token."""
    if len(query_string) > QUERY_BYTES_MAX:
        raise Refused(414, f"a query string of {len(query_string)} bytes; at most {QUERY_BYTES_MAX}")
    query, single = parse_query(view, _pairs(query_string, settings.matchers_max), settings, _SINGLE)
    cursor = single.get("cursor")
    if cursor and ("after" in single or "max_staleness_ms" in single):
        raise Invalid("after and max_staleness_ms are for the first page: later ones are of the same moment")
    return ReadRequest(
        query=query.within(bounds),
        cursor=cursor,
        media_type=preferred(headers.accept),
        coding=preferred_coding(headers.encoding),
        allow_partial=_flag(single, "allow_partial"),
        known=_tags(headers.if_none_match) if headers.if_none_match else (),
        **waiting(single, settings),
    )


def waiting(single: Mapping[str, str], settings: QuerySettings) -> dict[str, Any]:
    """Return the fields of a `Waiting`."""
    after = single.get("after")
    timeout_ms = whole_number(single, "timeout_ms", settings.timeout_ms_max)
    return {
        "timeout_ms": timeout_ms or min(settings.timeout_ms_default, settings.timeout_ms_max),
        "after": None if after is None else Token.parse(after),
        "max_staleness_ms": whole_number(single, "max_staleness_ms", STALENESS_MS_MAX),
    }


def parse_query(
    view: str, pairs: Iterable[tuple[str, str]], settings: QuerySettings, known: Sequence[str]
) -> tuple[Query, dict[str, str]]:
    """Return the query that parameters stand for, and those that may stand once, out of `known`."""
    where: list[Matcher] = []
    by: list[str] = []
    quantiles: list[str] = []
    single: dict[str, str] = {}
    for name, value in pairs:
        if name == "where":
            where.append(parse_matcher(value))
        elif name == "by":
            by.append(value)
        elif name == "q":
            quantiles.append(value)
        elif name not in known:
            raise Invalid(f"unknown parameter {name[:100]!r}; known: where, by, q, {', '.join(known)}")
        elif name in single:
            raise Invalid(f"parameter {name} stands twice")
        else:
            single[name] = value
    if (count := len(where) + len(by) + len(quantiles)) > settings.matchers_max:
        raise Invalid(f"{count} `where`, `by` and `q` parameters; at most {settings.matchers_max}")
    kind = single.get("kind")
    if kind is not None and kind not in KIND_NAMES:
        raise Invalid(f"kind: one of {', '.join(KIND_NAMES)} is needed, got {kind[:50]!r}")
    if "top" in single and "bottom" in single:
        raise Invalid("top and bottom: only one of them can be given")
    query = Query(
        view,
        tuple(where),
        tuple(dict.fromkeys(label for label in by if label)) if by else None,
        whole_number(single, "top", settings.limit_max),
        whole_number(single, "limit", settings.limit_max) or min(settings.limit_default, settings.limit_max),
        kind,
        whole_number(single, "window_s", WINDOW_S_MAX, least=0),
        _range(single) if not single.keys().isdisjoint(_RANGE) else NO_RANGE,
        single.get("fn"),
        parse_quantiles(quantiles),
        whole_number(single, "bottom", settings.limit_max),
    )
    return query, single


def _tags(if_none_match: bytes) -> tuple[bytes, ...]:
    """Return the entity tags of an If-None-Match header, which are compared as weak ones."""
    return tuple(tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b","))


def _range(single: Mapping[str, str]) -> AskedRange:
    times = {f"{name}_ms": time_ms(name, single[name]) for name in _TIMES if name in single}
    lengths = {f"{name}_ms": length_ms(name, single[name]) for name in _LENGTHS if name in single}
    return AskedRange(**times, **lengths, fill=single.get("fill"))


def _flag(single: Mapping[str, str], name: str) -> bool:
    """Return a parameter that is true or false; False without it."""
    text = single.get(name, "false")
    if text not in ("true", "false"):
        raise Invalid(f"{name}: true or false is needed, got {text[:50]!r}")
    return text == "true"


def parse_scrape(query_string: bytes, settings: QuerySettings) -> tuple[tuple[str, ...], bool]:
    """Return the views that a scrape asks for, none for all, and whether views with windows are to be in it."""
    if len(query_string) > QUERY_BYTES_MAX:
        raise Refused(414, f"a query string of {len(query_string)} bytes; at most {QUERY_BYTES_MAX}")
    views: list[str] = []
    windowed = True
    for name, value in _pairs(query_string, settings.matchers_max, "`view`"):
        if name == "view":
            views.append(value)
        elif name != "windowed":
            raise Invalid(f"unknown parameter {name[:100]!r}; known: view, windowed")
        else:
            windowed = _flag({name: value}, name)
    if len(views) > settings.matchers_max:
        raise Invalid(f"{len(views)} `view` parameters; at most {settings.matchers_max}")
    return tuple(views), windowed


def _pairs(query_string: bytes, matchers_max: int, what: str = "`where`, `by` and `q`") -> list[tuple[str, str]]:
    most = matchers_max + len(_SINGLE)
    if query_string.count(b"&") >= most:
        raise Invalid(f"over {matchers_max} {what} parameters")
    try:
        text = query_string.decode()
        if "%" in text or "+" in text:
            return parse_qsl(text, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("the query string is not UTF-8") from None
    pairs = [part.partition("=") for part in text.split("&") if part]  # five times as fast as parse_qsl
    return [(name, value) for name, _, value in pairs]


def single_parameters(query_string: bytes, known: Sequence[str]) -> dict[str, str]:
    """Return the parameters of a query string, each of which may stand once."""
    if len(query_string) > QUERY_BYTES_MAX:
        raise Refused(414, f"a query string of {len(query_string)} bytes; at most {QUERY_BYTES_MAX}")
    single: dict[str, str] = {}
    for name, value in _pairs(query_string, 100, "query"):
        if name not in known:
            raise Invalid(f"unknown parameter {name[:100]!r}; known: {', '.join(known)}")
        if name in single:
            raise Invalid(f"parameter {name} stands twice")
        single[name] = value
    return single


def whole_number(single: Mapping[str, str], name: str, most: int, *, least: int = 1) -> int | None:
    """Return a parameter that is a whole number in a range; None without it."""
    text = single.get(name)
    if text is None:
        return None
    if not _WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise Invalid(f"{name}: a whole number from {least} to {most} is needed, got {text[:50]!r}")
    return int(text)
