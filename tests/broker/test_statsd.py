"""StatsD on a real broker: what a client library sends is in the views, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from datadog.dogstatsd import DogStatsd

from pipeline import Reader
from tests.broker.drive import server, worker
from tests.broker.kafka import App, create_topics
from tests.cli.test_ingest import ingesting

LINES = 500


@pytest.mark.timeout(180)
def test_a_client_of_statsd_on_kafka(app: App, tmp_path: Path) -> None:
    """Counters, gauges, timers and sets of Datadog's client equal what it was told, and a second start adds to them."""
    create_topics(app.bootstrap, app.app, 2)
    options = ("--to", app.url, "--dialect", "dogstatsd", "--labels", "jobs=env,kind")
    options += ("--set", "ingest_timers=histogram", "--set", "ingest_sets=distinct")
    with worker(app, tmp_path / "worker"), server(app, tmp_path / "server") as query, Reader(query.url) as reader:
        for start in (1, 2):
            with ingesting(tmp_path, *options) as ingest:
                client = DogStatsd("127.0.0.1", ingest.address[1], constant_tags=["env:prod"], disable_telemetry=True)
                for number in range(LINES):
                    client.increment("jobs", 2, tags=["env:prod", f"kind:{number % 3}"])
                    client.timing("took", number)
                    client.set("users", f"user{number % 7}")
                client.gauge("level", -start)
                client.close_socket()
                report = ingest.end()
            assert (report["complete"], report["lines"], report["left_out"]) == (True, 3 * LINES + 1, {})
            token = report["token"]
            found = {
                series.labels["kind"]: series.value for series in reader.get("jobs", after=token, timeout_ms=60_000).series
            }
            assert found == {str(kind): start * 2 * len(range(kind, LINES, 3)) for kind in range(3)}
            took = reader.get("took_ms", after=token, timeout_ms=60_000).value()
            assert (took["count"], took["sum"], took["max"]) == (start * LINES, start * sum(range(LINES)), LINES - 1)
            assert reader.get("users", after=token, timeout_ms=60_000).value()["estimate"] == 7
            assert reader.get("level", after=token, timeout_ms=60_000).value() == -start
