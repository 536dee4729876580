"""Streams of one read to very many clients: time from a commit to their receipt of it, and what they cost the server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec

import pipeline.metrics as m
from pipeline import Publisher
from tests.bench.measure import ROOT, Figure, Row, at_most
from tests.bench.server import Server, pinned, two_cores
from tests.bench.serving import read, up

VIEW = "watched"
REGION_COUNT = 16
PATH = f"/v1/views/{VIEW}/stream?by=region"
PATTERN = r'"region":"r0"\},"value":(\d+)'
INTERVAL_S = 0.35
"""Time between commits: above `stream_interval_ms`, and no multiple of it."""


class _Watched(NamedTuple):
    """Result of some clients' watching."""

    latency_ms: list[float]
    """From each commit to each client's receipt, in ascending order."""
    cpu_us: float
    """The server's CPU for one event of one client."""
    core: float
    """The part of a core that the server used."""
    computed: float
    """Computations for a commit."""
    stream_kb: float
    """Memory for a stream."""

    def p99(self) -> float:
        return self.latency_ms[len(self.latency_ms) * 99 // 100]


def streams(quick: bool) -> list[Row]:
    """Watch a group-by over 1,600 series with a thousand clients, with one, and with as many as are allowed."""
    many, most, commits = (20, 40, 2) if quick else (1_000, 2_000, 40)
    server_core, client_core = two_cores()
    with (
        TemporaryDirectory(prefix="pipeline-bench-") as folder,
        up(Path(folder), "--set", f"streams_per_client_max={most + 1}", core=server_core) as server,
        pinned(client_core),
        Publisher(server.url) as publisher,
    ):
        view = publisher.sum(VIEW, labels=("region", "product"))
        for i in range(100 * REGION_COUNT):
            view.add(1, region=f"r{i % REGION_COUNT}", product=f"product-{i}")
        _committed_ms(server, publisher.flush().next_offsets)
        alone, watched, limit = (_watch(server, publisher, count, commits) for count in (1, many, most))
        if not quick:
            _check_refused(server, most)
    name = "streams of a group-by over 1,600 series"
    return [
        at_most(
            f"{many:,} {name}: commit to receipt, p99",
            Figure(watched.p99(), "ms", f"median {median(watched.latency_ms):.0f} ms"),
            Figure(alone.p99(), "ms", "one stream, p99"),
            500,
        ),
        at_most(
            f"{most:,} {name}, which is streams_max: the same",
            Figure(limit.p99(), "ms", f"median {median(limit.latency_ms):.0f} ms"),
            Figure(alone.p99(), "ms", "one stream, p99"),
            1_000,
        ),
        at_most(
            f"{many:,} {name}: computations a commit",
            Figure(watched.computed, "computations"),
            Figure(float(many), "streams", "each of which would compute it"),
            1,
        ),
        at_most(
            f"{many:,} {name}: server CPU an event",
            Figure(watched.cpu_us, "us", f"{watched.core:.0%} of a core, {watched.stream_kb:.0f} KB a stream"),
            Figure(alone.cpu_us, "us", "one stream"),
            200,
        ),
    ]


def _watch(server: Server, publisher: Publisher, count: int, commits: int) -> _Watched:
    """Let clients watch while something is committed again and again."""
    view = publisher.sum(VIEW, labels=("region", "product"))
    before = read(server, f"/v1/views/{VIEW}?by=region&where=region=r0")["series"][0]["value"]
    idle_mb = server.memory_mb("VmRSS")
    committed_ms: dict[int, int] = {}
    with _clients(server, count) as clients:
        time.sleep(min(1.0, commits / 20))
        stream_kb = (server.memory_mb("VmRSS") - idle_mb) * 1024 / count
        computed, cpu_s, begun_s = _computed(server), server.cpu_seconds(), time.perf_counter()
        for number in range(1, commits + 1):
            started_s = time.perf_counter()
            view.add(1, region="r0", product="product-0")
            token = publisher.flush()
            time.sleep(max(0.0, started_s + INTERVAL_S - time.perf_counter()))
            committed_ms[before + number] = _committed_ms(server, token.next_offsets)
        time.sleep(INTERVAL_S)
        computed, cpu_s = _computed(server) - computed, server.cpu_seconds() - cpu_s
        seconds = time.perf_counter() - begun_s
        latency_ms = _latencies(_end(clients), committed_ms)
    cpu_s = max(cpu_s, 0.01)  # the kernel counts in hundredths
    return _Watched(sorted(latency_ms), cpu_s / (count * commits) * 1e6, cpu_s / seconds, computed / commits, stream_kb)


@contextmanager
def _clients(server: Server, count: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.stream_clients", *map(str, (*server.address, PATH, count, PATTERN))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{count} clients can't all watch")
            yield process
        finally:
            process.kill()


def _end(clients: subprocess.Popen[str]) -> list[list[tuple[int, float]]]:
    assert clients.stdin is not None
    assert clients.stdout is not None
    clients.stdin.write("end\n")
    clients.stdin.flush()
    return msgspec.json.decode(clients.stdout.readline(), type=list[list[tuple[int, float]]])


def _latencies(seen: Sequence[Sequence[tuple[int, float]]], committed_ms: Mapping[int, int]) -> Iterator[float]:
    """Yield for each client and commit the time to the first event that has it."""
    for events in seen:
        waiting = sorted(committed_ms)
        for value, at_s in events:
            while waiting and waiting[0] <= value:
                yield at_s * 1_000 - committed_ms[waiting.pop(0)]
        if waiting:
            raise RuntimeError(f"a client has not seen {len(waiting)} of {len(committed_ms)} commits")


def _committed_ms(server: Server, offsets: Mapping[int, int]) -> int:
    """Return when the last of what a token covers was committed, if nothing has come since."""
    while True:
        states = read(server, "/v1/status")["partitions"]
        if all(it["next_offset"] >= offsets.get(it["partition"], 0) for it in states):
            return max(int(it["committed_at_ms"]) for it in states)
        time.sleep(0.01)


def _computed(server: Server) -> float:
    with urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(it.split()[1]) for it in lines if it.startswith(f'{m.ANSWERS.name}{{how="streamed"}}'))


def _check_refused(server: Server, most: int) -> None:
    """Raise an error unless one stream more than `most` is refused."""
    with _clients(server, most):
        try:
            urlopen(server.url + PATH).close()
        except HTTPError as error:
            if error.code == 503:
                return
    raise RuntimeError(f"more than {most} streams are open")
