"""Reads of views, and watches of them, for an event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from pipeline.adapters.http import HttpReader
from pipeline.adapters.read_parameters import QueryKeywords, WatchKeywords
from pipeline.core.answer import Answer, View
from pipeline.errors import PipelineError
from pipeline.ports import Clock
from pipeline.settings import ClientSettings

if TYPE_CHECKING:
    import asyncio

    from pipeline.adapters.watch import WatchLink

T = TypeVar("T")


async def _in_thread(work: Callable[..., T], *arguments: Any, **options: Any) -> T:
    from asyncio import to_thread  # an app that reads without an event loop loads this module, too

    return await to_thread(work, *arguments, **options)


class AsyncHttpReader:
    """Reads merged views from a server without holding up the event loop: the calls of a `Reader`, in threads.

        async with AsyncReader("http://localhost:8080") as reader:
            answer = await reader.get("hits", start="2030-01-31T08:00:00Z", step="1h")

    As many calls run at once as the loop's default executor has threads; a watch has a thread of its own. Raises as a
    `Reader` does.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        clock: Clock | None = None,
        settings: ClientSettings | None = None,
    ) -> None:
        self._reader = HttpReader(url, timeout_s=timeout_s, clock=clock, settings=settings)

    async def get(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        **options: Any,
    ) -> Answer:
        """Return the merged view; the options are those of `Reader.get`."""
        return await _in_thread(self._reader.get, view, where, by, **options)

    async def pages(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        **options: Any,
    ) -> AsyncIterator[Answer]:
        """Yield all series that match, in answers of one moment; the options are those of `Reader.pages`."""
        pages = self._reader.pages(view, where, by, **options)
        while (answer := await _in_thread(next, pages, None)) is not None:
            yield answer

    def watch(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        **options: Unpack[WatchKeywords],
    ) -> AsyncWatch:
        """Yield the merged view, and again whenever it has changed, to `async for`; as `Reader.watch`."""
        return AsyncWatch(self._reader.watch_link(view, where, by, options))

    async def query(self, queries: Iterable[QueryKeywords], **options: Any) -> list[Answer]:
        """Return the answer to each query, all of one moment; the options are those of `Reader.query`."""
        return await _in_thread(self._reader.query, queries, **options)

    async def views(self) -> list[View]:
        """Return the definitions of all views."""
        return await _in_thread(self._reader.views)

    async def status(self) -> dict[str, Any]:
        """Return the server's partitions, their lag and staleness, and whether it is ready."""
        return await _in_thread(self._reader.status)

    def close(self) -> None:
        """End all watches, and close idle connections."""
        self._reader.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncWatch:
    """Async iterator over the answers to one read, made by `AsyncReader.watch`; otherwise as a `Watch`.

    An `anext` that is cancelled, as by a time-out, loses nothing: the next one goes on.
    """

    def __init__(self, link: WatchLink) -> None:
        self._link = link

    @property
    def problem(self) -> PipelineError | None:
        """Reason why the last answer is no newer, such as a lost connection; None while answers come."""
        return self._link.problem

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Answer:
        import asyncio

        self._link.start()
        loop = asyncio.get_running_loop()
        while not self._link.ready():
            woken: asyncio.Future[None] = loop.create_future()
            if not self._link.ready(partial(_call_in, loop, woken)):
                await woken
        answer = self._link.take()
        if answer is None:
            raise StopAsyncIteration
        return answer

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._link.close()

    def __del__(self) -> None:
        self._link.close()


def _call_in(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[Any]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_set, woken)


def _set(woken: asyncio.Future[Any]) -> None:
    if not woken.done():
        woken.set_result(None)
