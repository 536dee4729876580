"""A whole server in this process on the log and stores in memory: real partitions commit, real uvicorn serves."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode
from zlib import crc32

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.core.answer import Answer, PartitionStatus, Status
from pipeline.core.codec import decode_definition, encode_batch, encode_definition
from pipeline.core.gathered import STATES_PATH, STATES_TYPE
from pipeline.core.grants import Bounds
from pipeline.core.query import Query
from pipeline.core.record import (
    Batch,
    Definition,
    Group,
    canonical,
    definition_key,
    producer_id_of,
    series_prefix,
    series_suffix,
)
from pipeline.core.token import Token
from pipeline.errors import NotFound, NotReady
from pipeline.ingest.gateway import Gateway
from pipeline.ingest.openmetrics import parse_pushed
from pipeline.ingest.otlp import parse_export
from pipeline.ingest.totals import RunningTotals
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Ingest, Message, Store, Stores
from pipeline.query.access import Access
from pipeline.query.api import create_app
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.ends import EndsNow, EndsPolled, LogEnds
from pipeline.query.otlp_api import ExportTaking
from pipeline.query.reader import ViewReader
from pipeline.query.stored_state import StoredState, find_definitions
from pipeline.roles.acceptor import MakeContext
from pipeline.roles.http_server import HttpServer, bind, open_tls
from pipeline.settings import PublisherSettings, QuerySettings, WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import OwnedPartition
from tests.support import again_and_again

SECRET = "support"
"""Secret of the producer of a world's batches."""


_TYPES = {
    "/v1/batches": "application/octet-stream",
    "/v1/openmetrics": "text/plain; version=0.0.4",
    "/api/v1/read": "application/x-protobuf",
    STATES_PATH: STATES_TYPE,
}
"""Media types of bodies, by path; of others JSON."""


class World:
    """Log, stores (in memory, unless given), partitions, a reader. Partitions fold only when `fold` or `folding` says so."""

    def __init__(
        self,
        partition_count: int = 4,
        *,
        clock: Clock | None = None,
        settings: QuerySettings | None = None,
        stores: Stores | None = None,
        worker: WorkerSettings | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.clock = clock or SystemClock()
        self.settings = settings or QuerySettings()
        self.metrics = PrometheusMetrics()
        topics = dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), partition_count)
        self.log = MemoryLog(topics, self.clock.now_ms)
        self._stores = stores or MemoryStores()
        self.partitions: list[OwnedPartition] = []
        self._partition_count = partition_count
        self.work(worker or WorkerSettings(ts_ahead_max_ms=2**53))
        self.ready = True
        self.reader = self.new_reader()
        self.ingest: Ingest | None = Gateway(
            self.log,
            self.clock,
            PublisherSettings(),
            self._definition_of,
            facts=StoredState(self.stores),
            definitions_of=lambda *asked: find_definitions(self.reader, *asked),
        )
        self.letters = DeadLetters(self.log, self.clock)
        self._lock = threading.Lock()
        self._sequences: dict[int, int] = {}

    def work(self, settings: WorkerSettings) -> None:
        """Fold with these settings from now on: other owners take the partitions over."""
        for partition in self.partitions:
            partition.close()
        self.partitions = [
            OwnedPartition(
                number,
                log=self.log,
                stores=self._stores,
                clock=self.clock,
                settings=settings,
                delete_retention_ms=86_400_000,
                name=self.name,
            )
            for number in range(self._partition_count)
        ]
        for partition in self.partitions:
            partition.start()

    def part(self, *numbers: int, settings: QuerySettings | None = None) -> Part:
        """A server of some of the partitions."""
        return Part(self, frozenset(numbers), settings or self.settings)

    def new_reader(self) -> ViewReader:
        return ViewReader(
            stores=self.stores,
            ends=EndsNow(
                partial(self.log.high_watermarks, DELTAS),
                partial(self.log.start_offsets, DELTAS),
                self.clock,
                source_id=self.log.topic_id(DELTAS),
            ),
            clock=self.clock,
            settings=self.settings,
            metrics=self.metrics,
        )

    def stores(self) -> Mapping[int, Store]:
        if not self.ready:
            raise NotReady("restoring: about 7 changelog records to go")
        return {partition.number: partition.store for partition in self.partitions}

    def _definition_of(self, view: str, bounds: Bounds | None = None) -> Definition | None:
        try:
            return self.reader.definition(view, bounds)
        except (NotFound, NotReady):
            return None

    def status(self) -> Status:
        return Status(
            ready=self.ready,
            partition_count=len(self.partitions),
            topic_id=self.log.topic_id(DELTAS),
            partitions=[PartitionStatus(partition=it.number, phase="folding") for it in self.partitions],
        )

    def token(self, next_offsets: Mapping[int, int]) -> Token:
        """Return a token of this log."""
        return Token(next_offsets, self.log.topic_id(DELTAS))

    def batch(
        self, partition: int, definition: Definition, series: Mapping[Sequence[str], Any], window_start_ms: int = 0
    ) -> bytes:
        """Return a sealed batch of states by label values, all of one window."""
        with self._lock:
            sequence = self._sequences.get(partition, 0)
            self._sequences[partition] = sequence + 1
        group = Group(definition, [series_suffix(labels, window_start_ms) for labels in series], [*series.values()])
        return encode_batch(Batch(producer_id_of(SECRET), 0, partition, sequence, 0, self.clock.now_ms(), [group]))

    def append(
        self, partition: int, definition: Definition, series: Mapping[Sequence[str], Any], window_start_ms: int = 0
    ) -> int:
        """Put states into one partition's log, and return the `next_offset` that covers them."""
        definition, series = travelling(definition, series)
        (result,) = self.log.append(
            [Message(DELTAS, partition, None, self.batch(partition, definition, series, window_start_ms))], timeout_s=1
        )
        assert isinstance(result, int)
        return result

    def publish(self, definition: Definition, series: Mapping[Sequence[str], Any]) -> None:
        """Route, append and fold states, as a publisher and the worker would."""
        definition, series = travelling(definition, series)
        prefix = series_prefix(definition)
        parts: dict[int, dict[Sequence[str], Any]] = {}
        for labels, state in series.items():
            number = crc32(prefix + series_suffix(labels)) % len(self.partitions)
            parts.setdefault(number, {})[labels] = state
        for number, part in parts.items():
            self.append(number, definition, part)
        self.fold()

    def fold(self, *numbers: int) -> None:
        """Fold and commit everything in the log of these partitions, or of all."""
        for number in numbers or range(len(self.partitions)):
            partition = self.partitions[number]
            reader = self.log.reader(DELTAS)
            reader.assign({number: partition.task.next_offset})
            end_offset = self.log.watermarks(DELTAS, number).end_offset
            while partition.task.next_offset < end_offset:
                for records in reader.poll(record_count_max=1_000, bytes_max=2**30, timeout_s=0):
                    partition.fold(records)
            if partition.task.dirty:
                partition.commit()

    def expire(self, definition: Definition, before_ms: int, *numbers: int) -> None:
        """Have the windows of a definition that start before a time expired in these partitions, whose entries stay."""
        key = definition_key(canonical(definition))
        for number in numbers:
            store = self.partitions[number].store
            (value,) = store.get([key])
            assert value is not None
            entry = msgspec.structs.replace(decode_definition(value), expired_before_ms=before_ms)
            store.write([key], [encode_definition(entry)])

    def folding(self, interval_s: float = 0.002) -> AbstractContextManager[None]:
        """Fold in a thread, again and again, until the context ends."""
        return again_and_again(self.fold, interval_s)


def scanned(reader: ViewReader, query: Query) -> Answer:
    """Return the answer of a scan, even where a few keys would do."""
    return reader._scan(reader._stores(), query, reader.clock.now_ms(), 1e18, lambda _: None).answer


class Part:
    """A server that follows some of a world's partitions, as `pipeline serve --partitions` does."""

    def __init__(self, world: World, numbers: frozenset[int], settings: QuerySettings) -> None:
        self.world, self.numbers, self.settings = world, numbers, settings
        self.clock = world.clock
        self.metrics = PrometheusMetrics()
        self.ready = True
        self.ingest: Ingest | None = None
        self.letters = world.letters
        self.app = "pipeline"
        self._ends = EndsPolled(
            partial(world.log.high_watermarks, DELTAS),
            partial(world.log.start_offsets, DELTAS),
            world.clock,
            interval_ms=1,
            source_id=partial(world.log.topic_id, DELTAS),
            partitions=numbers,
            partition_count=len(world.partitions),
        )
        self.reader = ViewReader(
            stores=self.stores, ends=self._polled, clock=self.clock, settings=settings, metrics=self.metrics
        )

    def _polled(self) -> LogEnds:
        self._ends.step()
        return self._ends()

    def stores(self) -> Mapping[int, Store]:
        if not self.ready:
            raise NotReady("restoring: about 7 changelog records to go")
        return {number: store for number, store in self.world.stores().items() if number in self.numbers}

    def status(self) -> Status:
        return Status(
            role="server",
            app=self.app,
            ready=self.ready,
            partition_count=len(self.world.partitions),
            topic_id=self.world.log.topic_id(DELTAS),
            partitions=[PartitionStatus(partition=number, phase="following") for number in sorted(self.numbers)],
        )


def travelling(definition: Definition, series: Mapping[Sequence[str], Any]) -> tuple[Definition, dict[Sequence[str], Any]]:
    """Return a definition and its series with the labels in the order in which publishers send them."""
    order = [definition.labels.index(name) for name in sorted(definition.labels)]
    return canonical(definition), {tuple(labels[i] for i in order): state for labels, state in series.items()}


class Reply(NamedTuple):
    """A server's answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running server and the world that it serves."""

    def __init__(self, world: World | Part, port: int) -> None:
        self.world = world
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Reply:
        """Send a request; a POST without a Content-Type has that of its path."""
        headers = dict(headers or {})
        if method == "POST":
            headers.setdefault("Content-Type", _TYPES.get(path, "application/json"))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, headers)  # type: ignore[arg-type]
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, *query: tuple[str, object]) -> Reply:
        return self.request("GET", path + ("?" + urlencode(query) if query else ""))

    def view(self, view: str, *query: tuple[str, object]) -> Any:
        """Return the answer to a read of a view, which must succeed."""
        reply = self.get(f"/v1/views/{view}", *query)
        assert reply.status == 200, reply.body
        return reply.json()

    def problem(self, status: int, reply: Reply) -> str:
        """Return the detail of a reply, which must be a problem of this status."""
        assert reply.status == status, (reply.status, reply.body)
        assert reply.headers["content-type"] == "application/problem+json"
        problem = reply.json()
        assert problem.keys() == {"type", "title", "status", "detail"}
        assert problem["status"] == status
        detail: str = problem["detail"]
        assert "Traceback" not in detail
        return detail


@contextmanager
def serving(
    world: World | Part, port: int = 0, access: Access | None = None, *, takes_totals: bool = True
) -> Iterator[Server]:
    """Serve a world, on a free port, until the context ends."""
    totals = None
    if world.ingest is not None and takes_totals:
        totals = RunningTotals(world.ingest, world.clock, 1_000)
    app = create_app(
        world.reader,
        world.ingest,
        world.settings,
        world.metrics,
        world.status,
        lambda: world.ready,
        render_views,
        parse_pushed,
        ExportTaking(parse_export, totals),
        world.letters,
        access,
    )
    with running(app, port, world.settings, world.metrics, open_tls(world.settings, world.metrics)) as at:
        yield Server(world, at)


@contextmanager
def running(
    app: Any,
    port: int = 0,
    settings: QuerySettings | None = None,
    metrics: Metrics = NO_METRICS,
    tls: MakeContext | None = None,
) -> Iterator[int]:
    """Run an application, on a free port, until the context ends; yield the port."""
    with bind(replace(settings or QuerySettings(), host="127.0.0.1", port=port)) as listener:
        server = HttpServer(app, listener, settings, metrics, tls)
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition; fail after the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)
