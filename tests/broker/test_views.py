"""`pipeline views` and `inspect` on a real broker: without a server and through a gateway, under load, through kill -9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.core.query import order
from pipeline.errors import NotFound
from pipeline.roles.view_admin import change, open_views
from pipeline.settings import KafkaSettings, PublisherSettings
from tests.broker.drive import finish, loaded, server, worker
from tests.broker.kafka import App, create_topics
from tests.support import pipeline, wait_until

PARTITIONS = 2
WAIT_S = 60.0


def ran(*arguments: str, code: int = 0) -> Any:
    done = pipeline(*arguments, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", ["broker", pytest.param("gateway", marks=pytest.mark.long)])
def test_dropped_under_load(app: App, tmp_path: Path, way: str) -> None:
    """Other views are exact; deltas of the dropped view acknowledged before are gone, and those behind the token count."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with server(app, tmp_path / "server", "--ingest") as reads, worker(app, tmp_path / "worker"):
        url = app.url if way == "broker" else reads.url
        with loaded(app) as (publisher, loads), Publisher(app.url) as own, Reader(reads.url) as reader:
            view = own.sum("dropped", labels=("a",))
            for action in ("reset", "drop"):
                for number in range(500):
                    view.add(1, a=str(number))
                reader.get("dropped", after=own.flush(WAIT_S), timeout_ms=60_000)
                (listed,) = [it for it in ran("views", "ls", "--from", url)[0]["views"] if it["name"] == "dropped"]
                assert (listed["kind"], listed["series_count"], listed["answers"]) == ("sum", 500, True)
                (said,) = ran("views", action, "dropped", "--to", url)
                assert (said["folded"], said["definitions"][0]["series_count"]) == (True, 500)
                if action == "drop":
                    with pytest.raises(NotFound):
                        reader.get("dropped", after=said["token"], timeout_ms=60_000)
                else:
                    assert reader.get("dropped", after=said["token"], timeout_ms=60_000).series == []
            view.add(7, a="after")
            answer = reader.get("dropped", after=own.flush(WAIT_S), timeout_ms=60_000)
            assert [(it.labels, it.value) for it in answer.series] == [({"a": "after"}, 7)]
            load = finish(publisher, loads)
        from tests.broker.drive import assert_same
        from tests.process.load import answers

        assert_same(answers(reads.url, load[0]), load[1], reads)
        done = pipeline("views", "drop", "nobody", "--to", url)
        assert done.returncode == 2
        assert "no view nobody" in done.stderr


@pytest.mark.timeout(180)
def test_worker_killed_in_the_middle_twice(app: App, tmp_path: Path) -> None:
    """The next worker carries the order out, once, and keeps all deltas published behind it."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with (
        server(app, tmp_path / "server") as reads,
        worker(app, tmp_path / "worker", commit_interval_ms=300) as role,
        Publisher(app.url) as publisher,
        Reader(reads.url) as reader,
    ):
        view = publisher.sum("killed", labels=("a",))
        for number in range(20_000):
            view.add(1, a=str(number))
        reader.get("killed", by=[], after=publisher.flush(WAIT_S), timeout_ms=60_000)
        views = open_views(app.url, KafkaSettings(), PublisherSettings(), timeout_s=WAIT_S)
        clock = SystemClock()
        outcome = change(views, order("drop", "killed", None, None), timeout_s=0.0, clock=clock)
        assert outcome.definitions[0].series_count == 20_000
        role.kill()
        for number in range(0, 20_000, 7):
            view.add(1, a=str(number))
        token = publisher.flush(WAIT_S)
        role.start(wait_ready=False)
        wait_until(lambda: role.exit_code is None, "it runs")
        role.kill()
        role.start()
        answer = reader.get("killed", by=[], after=token, timeout_ms=60_000)
        assert answer.value() == len(range(0, 20_000, 7))
        views.close()


@pytest.mark.timeout(120)
def test_inspect(app: App, tmp_path: Path) -> None:
    """`inspect` shows deltas and changelog beside a worker that runs, and its store once it has ended."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with worker(app, tmp_path / "worker") as role, Publisher(app.url) as publisher:
        for number in range(3):
            publisher.sum("seen", labels=("a",)).add(1, a=str(number))
            publisher.flush(WAIT_S)
        deltas = ran("inspect", "deltas", "--from", app.url, "--view", "seen")
        found = [series["labels"]["a"] for it in deltas for group in it["batch"]["groups"] for series in group["series"]]
        assert sorted(found) == ["0", "1", "2"]
        wait_until(
            lambda: len([it for it in ran("inspect", "changelog", "--from", app.url, "--view", "seen")
                         if it["entry"]["what"] == "series"]) == 3,
            "three entries",
        )  # fmt: skip
        changelog = ran("inspect", "changelog", "--from", app.url)
        assert {it["entry"]["what"] for it in changelog} == {"fence", "definition", "series", "producer", "position"}
        done = pipeline("inspect", "store", "--data", str(role.data))
        assert done.returncode == 1
        assert "in use" in done.stderr
        role.terminate()
        stored = ran("inspect", "store", "--data", str(role.data), "--view", "seen")
        assert len([it for it in stored if it["entry"]["what"] == "series"]) == 3
