"""Arguments of readers as parameters of the HTTP API."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Required, TypedDict
from urllib.parse import quote, urlencode

from pipeline.core.times import Length, Time, length_ms, length_text, time_ms
from pipeline.core.token import Token


def _condition(label: str, value: str) -> str:
    if value.startswith("~"):  # `label=~...` would be read as a regular expression
        return f"{label}=~{re.escape(value)}"
    return f"{label}={value}"


_SEVERAL = ("where", "by", "q")
"""Parameters that may stand several times."""


class _ReadKeywords(TypedDict, total=False):
    """Arguments of `Reader.get` that choose series and points, for every way to read."""

    kind: str | None
    window_s: int | None
    top: int | None
    bottom: int | None
    limit: int | None
    start: Time | None
    end: Time | None
    at: Time | None
    step: Length | None
    over: Length | None
    fill: str | None
    fn: str | None
    q: Sequence[float] | float | None


class QueryKeywords(_ReadKeywords, total=False):
    """A query of `Reader.query`: the arguments of `Reader.get`, but for those that are of all queries together."""

    view: Required[str]
    where: Mapping[str, str] | Sequence[str] | None
    by: Sequence[str] | None
    compare: Length | None


class WatchKeywords(_ReadKeywords, total=False):
    """Arguments of `Reader.watch` behind the first three: those of `Reader.get` that a stream has."""

    after: Token | str | None
    max_staleness_ms: int | None
    timeout_ms: int | None


def _parameters(options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the options of a read that are given, as the API has them: each with its values, in the order of options."""
    found: dict[str, list[Any]] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "where" and isinstance(value, Mapping):
            found[name] = [_condition(*item) for item in value.items()]
        elif name in _SEVERAL:
            several = isinstance(value, Iterable) and not isinstance(value, str)
            found[name] = [*value] if several else [value]
        elif name in ("start", "end", "at"):
            found[name] = [time_ms(name, value)]
        elif name in ("step", "over", "compare"):
            found[name] = [length_text(length_ms(name, value))]
        else:
            found[name] = [value]
    return found


def view_path(view: str, **options: object) -> str:
    """Return path and query of a read; options that are None are left out."""
    query: list[tuple[str, str]] = []
    for name, values in _parameters(options).items():
        query += [(name, str(it)) for it in values] or ([("by", "")] if name == "by" else [])
    return f"/v1/views/{quote(view, safe='')}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")


def json_query(keywords: QueryKeywords) -> dict[str, Any]:
    """Return a query as it stands in the body of `POST /v1/query`."""
    found = _parameters(keywords)
    return {name: values if name in _SEVERAL else values[0] for name, values in found.items()}
