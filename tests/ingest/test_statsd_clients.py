"""Client libraries of StatsD against a live server: the views equal what the app has counted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import statsd
from datadog.dogstatsd import DogStatsd

from pipeline.adapters.clock import SystemClock
from pipeline.ingest.statsd_server import StatsdServer
from pipeline.settings import IngestSettings
from tests.ingest.test_statsd import World

# mypy: disable-error-code="no-untyped-call"


@contextmanager
def listening(**settings: Any) -> Iterator[tuple[World, int]]:
    """Yield a world with a live server and its port, which takes all that has arrived in the end."""
    world = World(**settings)
    server = StatsdServer("127.0.0.1", 0, IngestSettings(**settings), world.sink, SystemClock())
    server.start()
    try:
        yield world, server.address[1]
    finally:
        assert server.stop()
    assert not world.refused


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("dialect", ["auto", "statsd"])
def test_the_client_of_statsd(protocol: str, dialect: str) -> None:
    """PyPI's `statsd`: counters, steps of gauges and negative gauges, timers, sets, pipelines and prefixes."""
    with listening(ingest_dialect=dialect) as (world, port):
        make = statsd.StatsClient if protocol == "udp" else statsd.TCPStatsClient
        client = make("127.0.0.1", port, prefix="app")
        for _ in range(3):
            client.incr("hits", 2)
        client.decr("hits")
        client.gauge("level", 10)
        client.gauge("level", 3, delta=True)
        client.gauge("level", -4, delta=True)
        client.gauge("cold", 5)
        client.gauge("cold", -7)
        client.timing("took", 320)
        client.timing("took", 80.5)
        client.set("users", "ann")
        client.set("users", "bob")
        with client.pipeline() as batch:
            batch.incr("batch.jobs", 4)
            batch.incr("batch.jobs", 6)
        if protocol == "tcp":
            client.close()
    assert world.views().answers == {
        ("app_hits", ()): 5,
        ("app_level", ()): 9,
        ("app_cold", ()): -7,
        ("app_took_ms", ()): 200.25,
        ("app_took_ms_max", ()): 320,
        ("app_took_ms_count", ()): 2,
        ("app_users", ("ann",)): 1,
        ("app_users", ("bob",)): 1,
        ("app_batch_jobs", ()): 10,
    }


def flush(client: DogStatsd) -> None:
    client.flush_aggregated_metrics()
    client.flush()


@pytest.mark.parametrize("packs", [False, True])
def test_the_client_of_datadog(packs: bool) -> None:
    """PyPI's `datadog`: tags that stand twice, times, negative gauges, packed values, origins."""
    options = {"ingest_dialect": "dogstatsd", "ingest_timers": "histogram", "ingest_sets": "distinct"}
    with listening(**options) as (world, port):
        client = DogStatsd(
            "127.0.0.1",
            port,
            constant_tags=["env:prod"],
            disable_telemetry=True,
            disable_aggregation=not packs,
            disable_buffering=not packs,
            max_metric_samples_per_context=100 * packs,
            container_id="ci-1234",
            cardinality="low",
        )
        for _ in range(3):
            client.increment("hits", tags=["env:prod"])
        client.decrement("hits", 5, tags=["env:prod"])
        client.gauge("cold", 5, tags=["place:x"])
        client.gauge("cold", -7, tags=["place:x"])
        for value in (10, 20, 30):
            client.histogram("size", value)
            client.distribution("spread", value)
            client.timing("took", value)
        for user in ("ann", "bob", "ann"):
            client.set("users", user)
        flush(client)
        client.gauge_with_timestamp("late", 1, 1_700_000_100)
        flush(client)  # it joins gauges of different times
        client.gauge_with_timestamp("late", 2, 1_700_000_000)
        client.count_with_timestamp("jobs", 4, 1_700_000_000)
        flush(client)
        client.close_socket()
    answers = world.views().answers
    assert {name: answers.pop((name, ("prod",))) for name in ("hits", "late", "jobs")} == {"hits": -2, "late": 1, "jobs": 4}
    assert answers.pop(("cold", ("prod", "x"))) == -7
    assert answers.pop(("users", ("prod",)))["estimate"] == 2
    for name in ("size", "spread", "took_ms"):
        found = answers.pop((name, ("prod",)))
        assert (found["count"], found["sum"], found["max"]) == (3, 60, 30), name
    assert not answers


HOT_SHOTS = """
const StatsD = require('hot-shots');
const client = new StatsD({host: '127.0.0.1', port: Number(process.argv[2]), globalTags: {env: 'prod'}, maxBufferSize: 1400,
                           errorHandler: error => { console.error(error); process.exit(1); }});
for (let n = 0; n < 200; n++) { client.increment('jobs'); client.timing('took', n); }
client.increment('jobs', 5, 0.99999999, ['env:prod']);
client.gauge('cold', -7);
client.histogram('size', [1, 2, 3].length);
client.distribution('spread', 4, ['place:x']);
client.set('users', 'ann'); client.unique('users', 'bob');
client.gauge('late', 9, {timestamp: 1700000000}); client.gauge('late', 5);
client.close(() => {});
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js")
def test_the_client_of_node(tmp_path: Path) -> None:
    """npm's `hot-shots`, which packs lines into packets: counts, negative gauges, times, distributions, sets."""
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "hot-shots@17"], cwd=tmp_path, check=False, timeout=120
    )
    if done.returncode:
        pytest.skip("hot-shots can't be installed")
    script = tmp_path / "send.js"
    script.write_text(HOT_SHOTS)
    with listening(ingest_dialect="dogstatsd") as (world, port):
        subprocess.run(["node", str(script), str(port)], cwd=tmp_path, check=True, timeout=60)
    answers = world.views().answers
    assert answers["jobs", ("prod",)] >= 200
    assert (answers["took_ms_count", ("prod",)], answers["took_ms", ("prod",)]) == (200, 99.5)
    assert (answers["cold", ("prod",)], answers["size", ("prod",)], answers["late", ("prod",)]) == (-7, 3, 5)
    assert answers["spread", ("prod", "x")] == 4
    assert {labels for name, labels in answers if name == "users"} == {("prod", "ann"), ("prod", "bob")}
