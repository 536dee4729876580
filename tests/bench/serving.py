"""Speed of `pipeline up` over HTTP, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import msgspec

import tests.bench.data as data
from pipeline.adapters.http import HttpLogWriter
from pipeline.adapters.rocks import RocksStores
from pipeline.core.record import prefix_end, series_prefix
from pipeline.core.token import Token
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import DELTAS
from tests.bench.measure import Figure, Row, at_least, at_most
from tests.bench.server import Server, load, paced, pinned, running, two_cores

_SEND_BATCHES = 8


@contextmanager
def up(folder: Path, *options: str, core: int | None = None) -> Iterator[Server]:
    """Run `pipeline up`, with options, on a new data directory."""
    command = ["-c", "from pipeline.cli import main; main()", "up", "--json", "--port", "0", "--data", str(folder)]
    with running([*command, *options], core=core) as server:
        yield server


def publish(server: Server, series_count: int) -> None:
    """Publish every series once, over HTTP, and wait until they can be read."""
    writer = HttpLogWriter(server.url)
    writer.introduce(data.SECRET)
    offsets: dict[int, int] = {}
    messages: list[Message] = []

    def send() -> None:
        for message, result in zip(messages, writer.append(messages, timeout_s=60), strict=True):
            if not isinstance(result, int):
                raise result
            offsets[message.partition] = result
        messages.clear()

    for partition, value in data.batches(series_count, series_count, writer.partition_count(DELTAS)):
        messages.append(Message(DELTAS, partition, None, value))
        if len(messages) == _SEND_BATCHES:
            send()
    if messages:
        send()
    token = Token(offsets, writer.topic_id(DELTAS))
    writer.close()
    answer = read(server, f"/v1/views/{data.VIEW.view}?by=&after={token}&timeout_ms=60000")
    assert len(answer["series"]) == 1, answer


def read(server: Server, path: str) -> dict:  # type: ignore[type-arg]
    """Return one answer."""
    with urlopen(server.url + path) as response:
        return msgspec.json.decode(response.read())


def point(quick: bool) -> list[Row]:
    """Read one series at a time, all over 100,000; server and client have a core each."""
    series_count = 1_000 if quick else 100_000
    seconds = 0.3 if quick else 4.0
    server_core, client_core = two_cores()
    every = [data.labels(i) for i in range(0, series_count, 7)]
    paths = [f"/v1/views/{data.VIEW.view}?where=region={region}&where=product={product}" for product, region in every]

    def rate(server: Server) -> tuple[float, float]:
        with pinned(client_core):
            load(server, paths[:100], seconds=seconds / 10)
            count, wall_s, cpu_s = load(server, paths, seconds=seconds)
        return count / max(cpu_s, 0.01), count / wall_s  # the kernel counts in hundredths

    with TemporaryDirectory(prefix="pipeline-bench-") as folder, up(Path(folder), core=server_core) as server:
        publish(server, series_count)
        with running(["-m", "tests.bench.constant_app"], core=server_core) as bare:
            rounds = [(rate(server), rate(bare)) for _ in range(1 if quick else 3)]
            (measured, wall), (baseline, _) = max(r[0] for r in rounds), max(r[1] for r in rounds)
            half = wall / 2
            with pinned(client_core):
                took, constant = (paced(it, paths, rate=half, seconds=seconds) for it in (server, bare))
    return [
        at_least(
            "point read over HTTP",
            Figure(measured, "answers per CPU s", f"{wall:,.0f}/s of wall time with 32 connections"),
            Figure(baseline, "answers per CPU s", "Starlette route, constant answer"),
            10_000,
        ),
        at_most(
            f"point read over HTTP at {half:,.0f}/s, p99",
            Figure(took[len(took) * 99 // 100], "ms", f"median {median(took):.2f} ms"),
            Figure(constant[len(constant) * 99 // 100], "ms", "Starlette route, constant answer, p99"),
            5,
        ),
    ]


def group_by(quick: bool) -> list[Row]:
    """Group 100,000 series by a label of 16 values."""
    series_count = 1_000 if quick else 100_000
    with TemporaryDirectory(prefix="pipeline-bench-") as folder:
        with up(Path(folder)) as server:
            publish(server, series_count)
            times = []
            for _ in range(2 if quick else 15):
                start = time.perf_counter()
                answer = read(server, f"/v1/views/{data.VIEW.view}?by=region")
                times.append((time.perf_counter() - start) * 1000)
            assert len(answer["series"]) == data.REGION_COUNT, answer
        scan_ms = min(_scan_ms(Path(folder)) for _ in range(3))
    return [
        at_most(
            f"group by over {series_count:,} series",
            Figure(min(times), "ms", f"median {median(times):.0f} ms"),
            Figure(scan_ms, "ms", "walk over the same entries in RocksDB"),
            300,
        )
    ]


def _scan_ms(folder: Path) -> float:
    prefix = series_prefix(data.VIEW)
    stores = RocksStores(folder / "stores", LogSettings(data=str(folder)))
    opened = [stores.open(int(path.name)) for path in sorted((folder / "stores").iterdir())]
    start = time.perf_counter()
    for store in opened:
        for _ in store.scan(prefix, prefix_end(prefix)):
            pass
    taken_ms = (time.perf_counter() - start) * 1000
    stores.close()
    return taken_ms


def memory(quick: bool) -> list[Row]:
    """Measure the memory of a million series, published over HTTP to an otherwise idle server."""
    series_count = 2_000 if quick else 1_000_000
    with TemporaryDirectory(prefix="pipeline-bench-") as folder:
        with up(Path(folder) / "none") as server:
            read(server, "/v1/views")
            idle_mb = server.memory_mb("VmRSS")
        with up(Path(folder) / "many") as server:
            publish(server, series_count)
            rss_mb, peak_mb = server.memory_mb("VmRSS"), server.memory_mb("VmHWM")
    return [
        at_most(
            f"RSS of up with {series_count:,} series",
            Figure(rss_mb, "MB", f"{peak_mb:.0f} MB at its highest"),
            Figure(idle_mb, "MB", "up with none"),
            400,
        )
    ]
