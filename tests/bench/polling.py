"""Cost of many dashboards that poll the same view, with answers kept and without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import pipeline.metrics as m
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.core.record import Definition
from pipeline.query.params import ReadHeaders, ReadRequest, parse_read
from pipeline.query.service import ReadService
from pipeline.settings import QuerySettings
from tests.bench.measure import Figure, Row, at_most, cheaper
from tests.query.support import World

VIEW = Definition("polled", "sum", ("group", "item"))
GROUP_COUNT = 100


class _Polls(NamedTuple):
    """Cost of polls, and the work that they made the server do."""

    cpu_us: float
    """Time for a poll, all threads."""
    computed: float


def _count(metrics: PrometheusMetrics, how: str) -> float:
    return metrics.registry.get_sample_value(m.ANSWERS.name, {"how": how}) or 0.0


def _commit(world: World, value: int) -> None:
    for number in range(len(world.partitions)):
        world.append(number, VIEW, {("g0", "item-0"): value})
    world.fold()


def _poll(world: World, requests: Sequence[ReadRequest], *, commits: int, bytes_max: int) -> _Polls:
    """Poll once for each request after each commit, all at once."""
    settings = QuerySettings(answer_cache_bytes=bytes_max, reads_waiting_max=10_000)
    metrics = PrometheusMetrics()
    used = 0.0

    async def run() -> None:
        nonlocal used
        service = ReadService(world.new_reader(), settings, metrics)
        try:
            for commit in range(commits):
                _commit(world, commit)
                begun = time.process_time()
                replies = await asyncio.gather(*[service.answer(it) for it in requests])
                used += time.process_time() - begun
                assert {reply.status for reply in replies} == {200}
        finally:
            service.close()

    asyncio.run(run())
    return _Polls(used / (len(requests) * commits) * 1e6, _count(metrics, "computed"))


def polling(quick: bool) -> list[Row]:
    """A thousand clients poll a group-by over many series after each commit; then as many with a query of their own each."""
    series_count, clients, commits = (2_000, 40, 2) if quick else (100_000, 1_000, 5)
    world = World(partition_count=4)
    world.publish(VIEW, {(f"g{i % GROUP_COUNT}", f"item-{i:07d}"): i % 97 for i in range(series_count)})
    headers = ReadHeaders(encoding="gzip")
    same = [parse_read("polled", b"by=group&timeout_ms=60000", QuerySettings(), headers)] * clients
    # Each has a limit of its own, so that none shares with another: what polling cost without kept answers.
    few = 4 if quick else 8
    other = [
        parse_read("polled", f"by=group&limit={101 + i}&timeout_ms=60000".encode(), QuerySettings(), headers)
        for i in range(few)
    ]
    alone = _poll(world, other, commits=1, bytes_max=0)
    shared = _poll(world, same, commits=commits, bytes_max=2**26)
    name = f"{clients:,} clients poll {series_count:,} series in {GROUP_COUNT} groups"
    return [
        cheaper(
            f"{name}: CPU a poll",
            Figure(shared.cpu_us, "us"),
            Figure(alone.cpu_us, "us", "each computed alone"),
            20,
        ),
        at_most(
            f"{name}: computations a commit",
            Figure(shared.computed / commits, "computations"),
            Figure(float(clients), "polls", "a commit"),
            1,
        ),
    ]
