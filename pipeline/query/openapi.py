"""What `/openapi.json` says that FastAPI cannot know, and the page at `/docs`, which needs no internet."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import msgspec

from pipeline.core.answer import Answer, Changed, PartitionState, Status, Views
from pipeline.core.description import LetterText
from pipeline.core.kinds import KIND_NAMES
from pipeline.query.dead_letters import Listing, Outcome
from pipeline.query.idempotency import KEY_LENGTH_MAX, KEY_PATTERN
from pipeline.query.params import NDJSON, WINDOW_S_MAX
from pipeline.query.problems import MEDIA_TYPE, Problem
from pipeline.settings import QuerySettings

JSON = "application/json"
OPENMETRICS = "application/openmetrics-text"
READ_PATH = "/v1/views/{view}"
_TEMPLATE = "#/components/schemas/{name}"


class Accepted(msgspec.Struct):
    """What `POST /v1/deltas` answers."""

    accepted: int
    """Deltas in the request."""
    token: str
    """`after=<token>` of a read waits for them."""


class BatchesAccepted(msgspec.Struct):
    """What `POST /v1/batches` answers."""

    next_offsets: list[int]
    """Batch by batch: the position that covers it."""
    token: str


class LeftOut(msgspec.Struct):
    """A line of `POST /v1/openmetrics` that was not taken."""

    line: int
    """From 1."""
    reason: str
    detail: str


class MetricsAccepted(msgspec.Struct):
    """What `POST /v1/openmetrics` answers."""

    accepted: int
    """Samples that were taken."""
    refused: int
    """Lines that were not."""
    reasons: dict[str, int]
    """How many of those for each reason."""
    first_refused: list[LeftOut]
    token: str


class LettersReplayed(msgspec.Struct):
    """What `POST /v1/dead-letters/replay` answers."""

    outcomes: list[Outcome]
    after: str | None
    """Where the next request goes on; null: there is no more, or the time was over."""


_, _COMPONENTS = msgspec.json.schema_components(
    (
        *(Answer, Views, PartitionState, Changed, Accepted, BatchesAccepted, MetricsAccepted, Status, Problem),
        *(Listing, LetterText, LettersReplayed),
    ),
    ref_template=_TEMPLATE,
)

_PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _TEMPLATE.format(name="Problem")}}}}
_MEANINGS = {
    400: "The request is wrong; the detail says where.",
    404: "There is nothing of this name.",
    409: "`after` is a token of a topic that is not the one there now: made anew, or another app's or cluster's.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is compressed.",
    422: "The key in Idempotency-Key was used with another body.",
    503: "Not now: try again after the time in Retry-After.",
}


def answers(schema: str, *problems: int, description: str = "Done.") -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that answers `schema`, or one of these problems."""
    reference = {"schema": {"$ref": _TEMPLATE.format(name=schema)}}
    out: dict[int | str, dict[str, Any]] = {200: {"description": description, "content": {JSON: reference}}}
    for status in problems:
        out[status] = {"description": _MEANINGS[status], **_PROBLEM}
    return out


_DELTA = {
    "type": "object",
    "required": ["view", "kind", "value"],
    "additionalProperties": False,
    "properties": {
        "view": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$", "maxLength": 200},
        "kind": {"enum": ["sum", "min", "max", "mean", "last"]},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "value": {"type": ["number", "string", "boolean", "null"], "description": "A number; `last` takes any of these."},
        "ts_ms": {"type": ["integer", "null"], "description": "When it was so; matters to `last`. Absent: now."},
        "window_s": {"type": ["integer", "null"]},
        "monotone": {
            "type": ["boolean", "null"],
            "description": "Whether a sum takes no negative value. Absent: as the view is known; a new one is not monotone.",
        },
    },
}
DELTAS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"type": "array", "items": _DELTA}},
            NDJSON: {"schema": {"type": "string", "description": "One delta, a JSON object, a line."}},
        },
    }
}
PRODUCER_HEADER = "Pipeline-Producer"
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": (
        "Makes a repeat safe: requests with one key and the same bytes count once within `producer_ttl_ms` (7 days), also "
        "if the first was cut, also at another server, or at once. With another body under a key that the server remembers "
        "it is 422; at one that does not, it is another request. Quoted or not."
    ),
    "schema": {"type": "string", "minLength": 1, "maxLength": KEY_LENGTH_MAX, "pattern": KEY_PATTERN},
}
DELTAS_BODY["parameters"] = [_KEY]
_PRODUCER = {
    "name": PRODUCER_HEADER,
    "in": "header",
    "required": False,
    "description": (
        "The secret of the batches' producer, whose id is the first 32 hex digits of SHA-256 over `producer`, a zero byte, "
        "and the secret. Batches of an id without its secret are refused."
    ),
    "schema": {"type": "string", "pattern": "^[!-~]*$", "maxLength": 200},
}
BATCHES_BODY = {
    "parameters": [_PRODUCER],
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
METRICS_BODY = {
    "parameters": [_KEY],
    "requestBody": {
        "required": True,
        "content": {
            "text/plain": {"schema": {"type": "string", "description": "Prometheus' text format."}},
            OPENMETRICS: {"schema": {"type": "string", "description": "OpenMetrics, with its `# EOF`."}},
        },
    },
}


ORDER_NOTE = (
    "It is an order in the log, so every partition carries it out once, between two batches: deltas that the log had before "
    "do not count any more, those that come behind it count from zero, publishers need not stop. The token stands for the "
    "order: a read with `after` waits until it is carried out. To send it again is safe with the same `Idempotency-Key`. "
    "The body chooses definitions by kind and by exactly these labels; `{}` is all of them."
)


def order_operation(action: str) -> dict[str, Any]:
    """What FastAPI is not told of `POST /v1/views/{view}/drop` and `reset`."""
    choice = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "kind": {"enum": [*KIND_NAMES, None]},
            "labels": {"type": ["array", "null"], "items": {"type": "string"}},
        },
    }
    view = {"name": "view", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[a-zA-Z_]"}}
    return {
        "operationId": f"{action}_view",
        "parameters": [view, _KEY],
        "requestBody": {"required": True, "content": {JSON: {"schema": choice}}},
    }


def scrape_answers() -> dict[int | str, dict[str, Any]]:
    """The `responses` of `GET /v1/openmetrics`."""
    text: dict[str, Any] = {"text/plain": {}, OPENMETRICS: {}}
    problems = {status: it for status, it in answers("Problem", 400, 404, 503).items() if status != 200}
    return {200: {"description": "The views.", "content": text}, **problems}


def scrape_parameters(settings: QuerySettings) -> dict[str, Any]:
    """What FastAPI is not told of the query of `GET /v1/openmetrics`."""
    view = {
        "name": "view",
        "in": "query",
        "required": False,
        "description": "Only this view. Repeat it.",
        "schema": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
            "maxItems": settings.matchers_max,
        },
    }
    return {"parameters": [view]}


def _read_operation(settings: QuerySettings) -> dict[str, Any]:
    def parameter(name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}

    def whole(most: int, **more: Any) -> dict[str, Any]:
        return {"type": "integer", "minimum": 1, "maximum": most, **more}

    def texts(pattern: str) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string", "pattern": pattern}, "maxItems": settings.matchers_max}

    return {
        "tags": ["read"],
        "summary": "A merged view",
        "operationId": "read_view",
        "description": (
            "Each answer is at one commit boundary in every partition; `as_of` says which, and how stale it can be at "
            "most. `truncated` and `series_total` are there when there are more series than the answer holds. All "
            "definitions of one kind and window are merged, a label that one of them lacks being empty; `also` names the "
            "other kinds and windows that the view has, for `kind` and `window_s` to choose."
        ),
        "parameters": [
            {"name": "view", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[a-zA-Z_]"}},
            parameter(
                "where",
                "A condition on a label: `region=eu`, `region!=eu`, `region=~e.*`, `region!~e.*`. Repeat it: all must "
                "hold. Regular expressions are RE2's and match the whole value.",
                texts("^[a-zA-Z_][a-zA-Z0-9_]*(=|!=|=~|!~)"),
            ),
            parameter(
                "by",
                "A label to keep. Repeat it. Absent: each series by itself; empty: one total.",
                texts("^([a-zA-Z_][a-zA-Z0-9_]*)?$"),
            ),
            parameter(
                "kind",
                "Of a view with definitions of several kinds, which of them; absent: the kind that was defined first.",
                {"enum": [*KIND_NAMES]},
            ),
            parameter(
                "window_s",
                "The same for the length of windows in seconds; 0: without windows.",
                {"type": "integer", "minimum": 0, "maximum": WINDOW_S_MAX},
            ),
            parameter("top", "Only so many series, those with the largest values first.", whole(settings.limit_max)),
            parameter("limit", "Most series in the answer.", whole(settings.limit_max, default=settings.limit_default)),
            parameter(
                "after",
                "A token: wait until what it stands for is in.",
                {"type": "string", "pattern": "^([0-9]{1,9}-[0-9]{1,19}([.][0-9]{1,9}-[0-9]{1,19})*)?$"},
            ),
            parameter("max_staleness_ms", "Wait, then fail, rather than answer with older data.", whole(10**15 - 1)),
            parameter(
                "timeout_ms",
                "How long the read may wait and work.",
                whole(settings.timeout_ms_max, default=settings.timeout_ms_default),
            ),
        ],
        "responses": {
            str(status): answer
            for status, answer in answers("Answer", 400, 404, 409, 503, description="The view, merged.").items()
        },
    }


def complete(document: dict[str, Any], settings: QuerySettings) -> dict[str, Any]:
    """FastAPI's document, with the hot path and the schemas that FastAPI does not know."""
    if "/v1/views" in document["paths"]:
        document["paths"][READ_PATH] = {"get": _read_operation(settings)}
    document["paths"] = dict(sorted(document["paths"].items()))
    document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
    return document


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border-top: 1px solid #ccc; margin-top: 1.5rem; }
code, pre { font-family: ui-monospace, monospace; background: #f4f4f4; padding: .1rem .3rem; }
pre { padding: .6rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; }
b.verb { display: inline-block; min-width: 4rem; }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """The document as a page: no script, nothing from elsewhere."""
    sections = [
        _section(path, verb, operation)
        for path, operations in document["paths"].items()
        for verb, operation in operations.items()
    ]
    title = escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{_text(document['info'].get('description', ''))} "
        f'Machines read <a href="openapi.json">openapi.json</a>.</p>{"".join(sections)}</body></html>'
    )


def _text(text: str) -> str:
    """Plain text, in which `...` is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _section(path: str, verb: str, operation: Mapping[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(it['name'])}</code></td><td>{_text(it.get('description', it['in']))}</td></tr>"
        for it in operation.get("parameters", ())
    )
    responses = "".join(
        f"<tr><td>{escape(status)}</td><td>{_text(it.get('description', ''))}</td></tr>"
        for status, it in operation["responses"].items()
    )
    bodies = ", ".join(operation.get("requestBody", {}).get("content", ()))
    plain = verb == "get" and "{" not in path
    shown = f'<a href="{escape(path)}">{escape(path)}</a>' if plain else escape(path)
    return (
        f'<section><h2><b class="verb">{verb.upper()}</b> <code>{shown}</code></h2>'
        f"<p><b>{_text(operation.get('summary', ''))}.</b> {_text(operation.get('description', ''))}</p>"
        + (f"<table>{parameters}</table>" if parameters else "")
        + (f"<p>Body: <code>{escape(bodies)}</code></p>" if bodies else "")
        + f"<table>{responses}</table></section>"
    )
