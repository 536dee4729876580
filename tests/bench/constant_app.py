"""A bare Starlette route behind the server that `pipeline up` uses: as fast as a read could ever be."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.roles.http_server import HttpServer, bind, url_of
from pipeline.settings import QuerySettings


def main() -> None:
    """Serve until it is killed."""
    body = b'{"view":"sales","value":1}'

    async def constant(_: Request) -> Response:
        return Response(body, media_type="application/json")

    settings = QuerySettings(port=0)
    listener = bind(settings)
    print(url_of(listener, settings), flush=True)
    HttpServer(Starlette(routes=[Route("/v1/views/{view}", constant)]), listener, settings).run()


if __name__ == "__main__":
    main()
