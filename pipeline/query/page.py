"""The live page at `/`: files of `pipeline/page`, which ask the HTTP API that is served beside them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).resolve().parent.parent / "page"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}


def page_routes() -> list[Route]:
    """Return the routes of the page and of all its files."""

    async def show_page(_: Request) -> Response:
        return FileResponse(_FOLDER / "index.html", media_type="text/html", headers=_HEADERS)

    def file_route(file: Path) -> Route:
        async def show_file(_: Request) -> Response:
            return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)

        return Route(f"/page/{file.relative_to(_FOLDER).as_posix()}", show_file)

    files = [file for file in sorted(_FOLDER.rglob("*")) if file.suffix in _TYPES]
    return [Route("/", show_page), *map(file_route, files)]
