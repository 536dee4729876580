"""Reads of a data directory that no process has: the HTTP API of a server, without a server and read-only."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pipeline.topics as topics
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.integrity import describe_gaps, find_gaps
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.http_client import EventStream
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.adapters.rocks import RocksStores
from pipeline.core.answer import PartitionStatus, Status
from pipeline.errors import Invalid, LogCorrupt, NotFound, NotReady, StoreCorrupt, Unavailable
from pipeline.ports import Clock, ReadableStore, Store
from pipeline.query.api import create_app
from pipeline.query.ends import EndsNow
from pipeline.query.progress import read_positions
from pipeline.query.reader import ViewReader
from pipeline.roles.readers import SCHEME
from pipeline.settings import LogSettings, QuerySettings
from pipeline.threads import guarded
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.follower import read_meta

_log = logging.getLogger(__name__)
_START = "start `pipeline up` on it once"


class StoppedDirectory:
    """An `adapters.http_client.Client` of a directory that `pipeline up` has left. Safe from any thread.

    It is locked until `close`, so that nothing can start on it meanwhile. Raises `Unavailable` if a process has it,
    `Invalid` if it is no directory of `pipeline up`, `NotReady` if it was stopped before everything was restored,
    `LogCorrupt` or `StoreCorrupt` if it is damaged.
    """

    live = False

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url
        folder = Path(url.removeprefix(SCHEME)).expanduser().absolute()
        self._damage: StoreCorrupt | None = None
        self._pid = os.getpid()
        with ExitStack() as opening:
            data = opening.enter_context(DataDir(folder, read_only=True))
            settings = LogSettings(data=str(folder))
            try:
                log = EmbeddedLog(data.log, topics.load(), settings, clock, read_only=True)
            except NotFound:
                raise Invalid(f"{folder} has no log: nothing was ever published to it") from None
            self._log = opening.enter_context(closing(log))
            if gaps := find_gaps(log):
                raise LogCorrupt(f"{folder}: {describe_gaps(gaps)}; {_START}, which says what to do")
            opened = opening.enter_context(closing(RocksStores(data.stores, settings, read_only=True)))
            self._stores = {number: self._open(opened, number) for number in range(log.partition_count(DELTAS))}
            for number, position in read_positions(self._stores).items():
                if position.next_offset > (end := log.high_watermarks(DELTAS).get(number, 0)):
                    what = f"the store of partition {number} reflects {position.next_offset} records, and the log has {end}"
                    raise LogCorrupt(
                        f"{folder}: {what}: it was put back from an older copy; {_START}, which says what to do"
                    )
            query = QuerySettings()
            ends = EndsNow(
                partial(log.high_watermarks, DELTAS),
                partial(log.start_offsets, DELTAS),
                clock,
                source_id=log.topic_id(DELTAS),
            )
            self._reader = ViewReader(
                stores=lambda: self._stores, ends=ends, clock=clock, settings=query, on_damage=self._note_damage
            )
            self._app = create_app(self._reader, None, query, PrometheusMetrics(), self._status, lambda: True)
            self._loop = asyncio.new_event_loop()
            self._stop = asyncio.Event()
            started = threading.Event()
            self._thread = threading.Thread(
                target=guarded(_log, "stopped", self._loop.run_until_complete),
                args=[self._serve(started)],
                name="pipeline-stopped",
                daemon=True,
            )
            self._thread.start()
            started.wait()
            self._opened = opening.pop_all()
        atexit.register(self.close)  # a thread that is in RocksDB when the interpreter ends would abort the process

    def _open(self, stores: RocksStores, number: int) -> Store:
        try:
            store = stores.open(number)
            meta = read_meta(store)
        except NotFound as error:
            raise NotReady(f"{error}: {_START}") from None
        except StoreCorrupt as error:
            raise self._rebuild(error) from None
        # After kill -9 the newest commits can be in the changelog alone, until a start restores them.
        behind = meta.changelog_next_offset < self._log.high_watermarks(CHANGELOG).get(number, 0)
        if behind or meta.between_boundaries or meta.topic_id not in ("", self._log.topic_id(CHANGELOG)):
            raise NotReady(f"{self.url}: the store of partition {number} was not restored to its end: {_START}")
        return store

    @staticmethod
    def _rebuild(error: StoreCorrupt) -> StoreCorrupt:
        return StoreCorrupt(f"{error}; {_START}, which rebuilds the store")

    def _note_damage(self, number: int, store: ReadableStore, error: StoreCorrupt) -> None:
        self._damage = error
        raise LogCorrupt(str(error))  # nobody rebuilds the store

    def _status(self) -> Status:
        numbers = [*self._stores]
        partitions = [PartitionStatus(partition=number, phase="stopped") for number in numbers]
        return Status(
            role="stopped",
            ready=True,
            partition_count=len(numbers),
            partitions=partitions,
            topic_id=self._log.topic_id(DELTAS),
        )

    async def _serve(self, started: threading.Event) -> None:
        try:
            async with self._app.router.lifespan_context(self._app):
                started.set()
                await self._stop.wait()
        finally:
            started.set()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

    def request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        body: bytes | None = None,
        content_type: str = "",
        more_headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Answer a request as a server would."""
        if self._pid != os.getpid():
            raise Invalid(f"{self.url}: it was opened before a fork; open it in each process")
        if not self._thread.is_alive():
            raise Invalid(f"{self.url}: it is closed")
        headers = {"Accept": "application/json", "Content-Type": content_type, **(more_headers or {})}
        answer = asyncio.run_coroutine_threadsafe(self._call(method, path, body or b"", headers), self._loop)
        try:
            status, parts = answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise Unavailable(f"{self.url}: no answer in {timeout_s:g} s") from None
        if status >= 500 and self._damage is not None:
            raise self._rebuild(self._damage)
        return status, b"".join(parts)

    def stream(self, path: str, *, timeout_s: float, last_id: str) -> EventStream:
        """Refuse: no answer changes, so a watch takes a single one."""
        raise Invalid(f"{self.url}: nothing changes in a directory that was stopped")

    async def _call(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, list[bytes]]:
        raw_path, _, query = path.partition("?")
        status, parts = 0, []
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not requests:
                await asyncio.Event().wait()  # the caller does not go away
            return requests.pop()

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items() if value],
        }
        await self._app(scope, receive, send)
        return status, parts

    def close(self) -> None:
        """Close the directory, so that a process can start on it. May be called twice."""
        atexit.unregister(self.close)
        if self._pid == os.getpid() and self._thread.is_alive():
            self._reader.close()
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._loop.close()
            self._opened.close()
