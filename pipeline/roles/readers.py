"""`Reader` and `AsyncReader`, the public classes that read views from a URL."""

from __future__ import annotations

from typing import ClassVar

from pipeline.adapters.http import HttpReader
from pipeline.adapters.http_async import AsyncHttpReader
from pipeline.adapters.http_client import Client, HttpClient
from pipeline.ports import Clock

SCHEME = "embedded:"


class Reader(HttpReader):
    """Reads merged views. Safe from any thread.

        reader = Reader("http://localhost:8080")
        reader.get("revenue", where={"region": "eu"}, by=["product"], after=publisher.flush())

    `url` is `http://host:port` of a server, or `embedded:FOLDER`, the data directory of a `pipeline up` that was stopped: it
    is read without a server and not changed, and nothing can start on it before `close()` or the end of the `with` block.

    Raises `NotFound` for a view nobody has published, `Invalid` for a wrong request, `NotReady` if the server is
    restoring or what was asked to be waited for did not come in time, `Unavailable` if it does not answer, or if a process
    has the data directory.
    """

    @staticmethod
    def _connect(url: str, clock: Clock) -> Client:
        if not url.startswith(SCHEME):
            return HttpClient(url, clock)
        from pipeline.roles.stopped import StoppedDirectory  # loads RocksDB and the web framework

        return StoppedDirectory(url, clock)


class AsyncReader(AsyncHttpReader):
    """The calls of a `Reader`, which do not hold up the event loop: they run in threads.

    async with AsyncReader("http://localhost:8080") as reader:
        answer = await reader.get("hits", start="2030-01-31T08:00:00Z", step="1h")

    As many calls run at once as the loop's default executor has threads; a watch has a thread of its own. Raises as a
    `Reader` does.
    """

    reader_type: ClassVar[type[HttpReader]] = Reader
