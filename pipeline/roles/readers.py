"""`Reader` and `AsyncReader`, the public classes that read views from a URL."""

from __future__ import annotations

from typing import Any, Unpack

from pipeline.adapters.http import HttpReader
from pipeline.adapters.http_async import AsyncHttpReader
from pipeline.adapters.http_client import Client, HttpClient
from pipeline.ports import Clock
from pipeline.publisher.environment import find_settings
from pipeline.settings import ClientKeywords, ClientSettings, held

SCHEME = "embedded:"


class Reader(HttpReader):
    """Reads merged views. Safe from any thread.

        reader = Reader("http://localhost:8080")
        reader.get("revenue", where={"region": "eu"}, by=["product"], after=publisher.flush())

    `url` is `http://host:port` of a server, or `embedded:FOLDER`, the data directory of a `pipeline up` that was stopped: it
    is read without a server and not changed, and nothing can start on it before `close()` or the end of the `with` block.
    `token` or `token_file` is the access token for a server that needs one; without, PIPELINE_TOKEN or PIPELINE_TOKEN_FILE.

    Raises `NotFound` for a view nobody has published, `Invalid` for a wrong request, `NotReady` if the server is
    restoring or what was asked to be waited for did not come in time, `Unavailable` if it does not answer, or if a process
    has the data directory.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 30.0, clock: Clock | None = None, **settings: Unpack[ClientKeywords]
    ) -> None:
        given = held(settings)
        del settings  # a traceback with local variables would show it
        super().__init__(url, timeout_s=timeout_s, clock=clock, settings=_found(url, given))

    @staticmethod
    def _connect(url: str, clock: Clock, settings: ClientSettings | None) -> Client:
        if not url.startswith(SCHEME):
            return HttpClient(url, clock, settings)
        from pipeline.roles.stopped import StoppedDirectory  # loads RocksDB and the web framework

        return StoppedDirectory(url, clock)


class AsyncReader(AsyncHttpReader):
    """The calls of a `Reader`, which do not hold up the event loop: they run in threads.

    async with AsyncReader("http://localhost:8080") as reader:
        answer = await reader.get("hits", start="2030-01-31T08:00:00Z", step="1h")

    As many calls run at once as the loop's default executor has threads; a watch has a thread of its own. Raises as a
    `Reader` does.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 30.0, clock: Clock | None = None, **settings: Unpack[ClientKeywords]
    ) -> None:
        self._reader = Reader(url, timeout_s=timeout_s, clock=clock, **settings)


def _found(url: str, given: dict[str, Any]) -> ClientSettings:
    """Return the settings that were given, and others from the environment or the file that `PIPELINE_CONFIG` names."""
    if unknown := sorted(given.keys() - ClientKeywords.__annotations__.keys()):
        raise TypeError(f"Reader() got an unexpected keyword argument {unknown[0]!r}")
    found = {} if url.startswith(SCHEME) else find_settings(given, (ClientSettings,))
    return ClientSettings(**{**found, **given})
