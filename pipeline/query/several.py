"""Parses the body of `POST /v1/query`: several queries for one moment, each with the parameters of a read of a view."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pipeline.core.grants import Bounds
from pipeline.errors import Invalid
from pipeline.json_errors import json_error
from pipeline.query.params import PER_QUERY, WAITS, SeveralRequest, parse_query, waiting
from pipeline.settings import QuerySettings

_LISTS = ("where", "by", "q")


def parse_several(body: bytes, settings: QuerySettings, bounds: Bounds | None = None) -> SeveralRequest:
    """Return the queries of a body, within the bounds of an access token.

    `Invalid` says which query is wrong, by its index from 0, and where.
    """
    try:
        request = json.loads(body, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the body is not JSON: {json_error(body) or error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("queries"), list):
        raise Invalid('the body is a JSON object with an array: {"queries": [{"view": ...}, ...]}')
    for name in request:
        if name not in ("queries", *WAITS):
            raise Invalid(f"unknown field {name[:100]!r}; known: queries, {', '.join(WAITS)}")
    queries = request["queries"]
    if not 0 < len(queries) <= settings.queries_max:
        raise Invalid(f"{len(queries)} queries; from 1 to {settings.queries_max} (setting queries_max) are answered")
    single = {name: _text(name, request[name]) for name in WAITS if request.get(name) is not None}
    return SeveralRequest(
        queries=tuple(it.within(bounds) for it in _queries(queries, settings)), **waiting(single, settings)
    )


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Invalid(f"field {next(name for name in names if names.count(name) > 1)[:100]!r} stands twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _queries(queries: Sequence[Any], settings: QuerySettings) -> Iterator[Any]:
    for i, it in enumerate(queries):
        try:
            if not isinstance(it, dict):
                raise Invalid("a JSON object is needed")
            view = it.pop("view", None)
            if not isinstance(view, str):
                raise Invalid("view: the name of a view is needed")
            yield parse_query(view, [*_pairs(it, settings.matchers_max)], settings, PER_QUERY)[0]
        except Invalid as error:
            raise type(error)(f"query {i}: {error}") from None


def _pairs(fields: Mapping[str, Any], most: int) -> Iterator[tuple[str, str]]:
    """Yield the parameters as a URL would have them; a field that is null is left out."""
    for name, value in fields.items():
        if isinstance(value, list) and name in _LISTS:
            if len(value) > most:
                raise Invalid(f"{name}: {len(value)} items; at most {most}")
            if not value and name == "by":
                yield name, ""
            for it in value:
                yield name, _text(name, it)
        elif value is not None:
            yield name, _text(name, value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # thousands of digits
            raise Invalid(f"{name[:100]}: a number out of range") from None
    several = ", or an array of them" if name in _LISTS else ""
    raise Invalid(f"{name[:100]}: a text or a number is needed{several}")
