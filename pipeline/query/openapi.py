"""The OpenAPI document (`openapi.json` beside this module), and Swagger UI at `/docs`, which needs no internet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from pipeline.core.answer import Answer, Answers, Changed, Status, Views
from pipeline.core.description import LetterText
from pipeline.core.kinds import KIND_NAMES
from pipeline.errors import NotFound
from pipeline.query.dead_letters import Listing
from pipeline.query.media import JSON
from pipeline.query.problems import Problem
from pipeline.query.responses import Accepted, BatchesAccepted, LettersReplayed, MetricsAccepted
from pipeline.settings import QuerySettings

READ_PATH = "/v1/views/{view}"
STREAM_PATH = f"{READ_PATH}/stream"
_BODIES = (
    *(Answer, Answers, Views, Changed, Accepted, BatchesAccepted, MetricsAccepted, Status, Problem),
    *(Listing, LetterText, LettersReplayed),
)
_SCHEME = "accessToken"
_BEARER = "A token that `pipeline tokens add` has printed."
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>pipeline</title><link rel="stylesheet" href="docs/swagger_style.css"></head>
<body><div id="docs"></div><script src="docs/swagger_bundle.js"></script><script src="docs/start.js"></script></body>
</html>
"""
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#docs", validatorUrl: null, deepLinking: true});\n'
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def openapi_document(
    operations: Collection[tuple[str, str]],
    settings: QuerySettings,
    needed: Mapping[tuple[str, str], Collection[str]] | None = None,
) -> dict[str, Any]:
    """Return the document of these operations, each a method in lower case and a path, with the limits of `settings`.

    `needed` has the scopes of which an operation needs one; None: no access tokens are needed.
    """
    text = (resources.files("pipeline.query") / "openapi.json").read_bytes()
    document: dict[str, Any] = msgspec.json.decode(text)
    paths = {
        path: {method: operation for method, operation in methods.items() if (method, path) in operations}
        for path, methods in document["paths"].items()
    }
    document["paths"] = {path: methods for path, methods in paths.items() if methods}
    _, schemas = msgspec.json.schema_components(_BODIES, ref_template="#/components/schemas/{name}")
    own = document["components"]["schemas"]
    for name in ("Delta", "DefinitionChoice", "Query"):
        own[name]["properties"]["kind"]["enum"][:0] = KIND_NAMES
    own.update(schemas)
    if READ_PATH in document["paths"]:
        parameters = document["paths"][READ_PATH]["get"]["parameters"]
        _set_limits(parameters, settings)
        if STREAM_PATH in document["paths"]:
            document["paths"][STREAM_PATH]["get"]["parameters"][:0] = parameters
        many = own["Queries"]["properties"]
        many["queries"]["maxItems"] = settings.queries_max
        many["timeout_ms"]["maximum"] = settings.timeout_ms_max
    if needed is not None:
        _set_security(document, needed)
    return document


def _set_security(document: dict[str, Any], needed: Mapping[tuple[str, str], Collection[str]]) -> None:
    """Say which scopes each operation needs, and how it refuses requests without them."""
    document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer", "description": _BEARER}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            scopes = sorted(needed[method, path])
            operation["security"] = [{_SCHEME: [it]} for it in scopes]
            if scopes:
                operation["responses"] |= {it: {"$ref": f"#/components/responses/{it}"} for it in ("401", "403")}


def _set_limits(parameters: list[dict[str, Any]], settings: QuerySettings) -> None:
    limits = {
        "where": {"maxItems": settings.matchers_max},
        "kind": {"enum": [*KIND_NAMES]},
        "by": {"maxItems": settings.matchers_max},
        "q": {"maxItems": settings.matchers_max},
        "top": {"maximum": settings.limit_max},
        "bottom": {"maximum": settings.limit_max},
        "limit": {"maximum": settings.limit_max, "default": min(settings.limit_default, settings.limit_max)},
        "timeout_ms": {
            "maximum": settings.timeout_ms_max,
            "default": min(settings.timeout_ms_default, settings.timeout_ms_max),
        },
    }
    for parameter in parameters:
        parameter.get("schema", {}).update(limits.get(parameter.get("name", ""), {}))


def docs_routes(document: dict[str, Any]) -> list[Route]:
    """Return the routes of the document and of Swagger UI, whose assets are in the package `offapi`."""
    encoded = msgspec.json.encode(document)
    package = find_spec("offapi")  # not imported: it would read ten megabytes into memory
    folder = Path(package.origin).parent if package is not None and package.origin is not None else None

    async def show_document(_: Request) -> Response:
        return Response(encoded, media_type=JSON)

    async def show_page(_: Request) -> Response:
        return Response(_PAGE, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    async def start(_: Request) -> Response:
        return Response(_START, media_type="text/javascript")

    def asset(name: str, media_type: str) -> Route:
        async def show_asset(_: Request) -> Response:
            if folder is None:
                raise NotFound("the page /docs needs the package offapi: pip install 'delta-pipeline[server]'")
            return FileResponse(folder / name, media_type=media_type)

        return Route(f"/docs/{name}", show_asset)

    return [
        Route("/openapi.json", show_document),
        Route("/docs", show_page),
        Route("/docs/start.js", start),
        asset("swagger_bundle.js", "text/javascript"),
        asset("swagger_style.css", "text/css"),
    ]
